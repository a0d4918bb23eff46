"""A linear layer whose weight is quantised, and what multiplies by it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sagewan.attention.launch import failed, is_out_of_memory
from sagewan.attention.resolve import Function, ImplementationError, load, name_of
from sagewan.checkpoint.packed import FP8_DTYPES, Packed
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.model.matmul import Gate, unpacked
from sagewan.plan.layers import role_of
from sagewan.plan.linear import LinearRow
from sagewan.plan.weights import WeightsPlan

_FIELDS = ("data", "scale", "tensor_scale", "pre_scale")
Multiply = Callable[[Any, Packed, Tensor | None], Tensor]
# x, weight, bias and gate, and what their product is added to.
MultiplyAdd = Callable[[Fp8Rows, Packed, Tensor | None, Gate, Tensor], None]
# x, weight, bias, and what is known of the weight on each device.
MultiplyGelu = Callable[[Fp8Rows, Packed, Tensor | None, dict[torch.device, Tensor]], Fp8Rows]


class QuantLinear(nn.Linear):
    """y = x·Wᵀ + bias with W packed: in: x [..., K] in 16 or 32 bit, out: [..., N] in x's dtype.

    Every tensor of the weight is a buffer, so that the layer moves as any other; their dtypes are
    the format's, and no ``.to(dtype)`` changes them. ``multiply`` does the product; it is set by
    :class:`Multiplier` for a run, and unpacks to x's dtype before.
    """

    data: Tensor
    scale: Tensor | None
    tensor_scale: Tensor | None
    pre_scale: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.format = packed.format
        self.full_precision = packed.full_precision
        self.dtype = dtype
        tensors = packed.tensors
        if packed.format in FP8_DTYPES or packed.format == "int8":
            # One for each row: products with a scale per row of the input want it so.
            rows = tensors["scale"].view(-1, 1).expand(packed.shape[0], 1)
            tensors["scale"] = rows.contiguous()
        for name in _FIELDS:
            self.register_buffer(name, tensors.get(name))
        own = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.register_parameter("bias", own)
        self.multiply: Multiply = unpacked
        self.multiplies_fp8 = False
        self.multiply_add: MultiplyAdd | None = None
        self.multiply_gelu: MultiplyGelu | None = None
        self._known: dict[torch.device, Tensor] = {}

    @property
    def takes_fp8(self) -> bool:
        """Whether :meth:`of_fp8` gives what the layer does: nothing else looks at its input."""
        return self.multiplies_fp8 and self.pre_scale is None and not self._forward_hooks

    @property
    def adds(self) -> bool:
        """Whether there is :meth:`add_of_fp8`."""
        return self.takes_fp8 and self.multiply_add is not None

    def add_of_fp8(self, x: Fp8Rows, gates: Sequence[Gate], into: Tensor) -> None:
        """into [B, n, N] += gate·(what the layer gives for x [B, n, K]), without a tensor between;
        a gate for each video, or one for all. Tokens may lie in a longer sequence."""
        assert self.multiply_add is not None
        parts = [(x.data, x.scale, gates[0], into)]
        if len(gates) > 1 or not into.is_contiguous():
            each = gates if len(gates) > 1 else [gates[0]] * len(into)
            parts = list(zip(x.data, x.scale, each, into, strict=True))
        for data, scale, own, here in parts:
            rows = Fp8Rows(data.view(-1, self.in_features), scale.view(-1, 1))
            place = here.view(-1, self.out_features)
            self.multiply_add(rows, self.packed, self.bias, own, place)

    @property
    def gives_gelu(self) -> bool:
        """Whether there is :meth:`gelu_of_fp8`."""
        return self.takes_fp8 and self.multiply_gelu is not None

    def gelu_of_fp8(self, x: Fp8Rows) -> Fp8Rows:
        """GELU's approximation by tanh of what the layer gives for x [B, n, K], whose norm is
        given, as FP8 [B, n, N]. Tokens lie without gaps."""
        assert self.multiply_gelu is not None
        flat = (None if t is None else t.view(-1, t.shape[-1]) for t in (x.data, x.scale, x.norm))
        data, scale, norm = flat
        assert data is not None
        assert scale is not None
        rows = Fp8Rows(data, scale, norm)
        out = self.multiply_gelu(rows, self.packed, self.bias, self._known)
        shape = x.data.shape[:-1]
        return Fp8Rows(out.data.view(*shape, -1), out.scale.view(*shape, 1))

    def of_fp8(self, x: Fp8Rows) -> Tensor:
        """As the layer's forward pass, for an input [..., K] that is FP8 already. Tokens may lie in
        longer sequences: of several videos they are copied."""
        rows = Fp8Rows(x.data.reshape(-1, self.in_features), x.scale.reshape(-1, 1))
        out: Tensor = self.multiply(rows, self.packed, self.bias)
        return out.view(*x.data.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What libraries ask for the shape, dtype and device of. Its values are NaN and take no
        memory: whoever multiplied by them would see it."""
        nan = torch.full((), torch.nan, dtype=self.dtype, device=self.data.device)
        return nan.expand(self.out_features, self.in_features)

    @property
    def packed(self) -> Packed:
        """The weight as a value, of the same tensors."""
        # As attributes they would be looked for in three places, at each call of each layer.
        held = self._buffers
        return Packed(
            format=self.format,
            shape=(self.out_features, self.in_features),
            data=cast("Tensor", held["data"]),
            scale=held["scale"],
            tensor_scale=held["tensor_scale"],
            pre_scale=held["pre_scale"],
            full_precision=self.full_precision,
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.pre_scale is not None:
            rows = rows * self.pre_scale.to(rows.dtype)
        return self.multiply(rows, self.packed, self.bias).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """As any module's, but that the packed tensors keep their dtypes."""
        own = {id(tensor) for tensor in self._buffers.values()}

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            changed = id(tensor) in own and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if changed else moved

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self


class Multiplier:
    """Gives a run's layers the rows of its plan, and keeps the count that the report shows.

    As attention's, the count is by the function that was called, not by the name asked for; and
    whatever the function raises, but for running out of memory, is an ImplementationError.
    """

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str, str]] = Counter()
        self._functions: dict[str, Function] = {}

    def install(self, transformer: nn.Module, plan: WeightsPlan) -> None:
        """Set what multiplies in every quantised layer, by its format and role."""
        for name, module in transformer.named_modules():
            if isinstance(module, QuantLinear):
                role = role_of(name)
                row = plan.row(module.format, role)
                if row.low and module.full_precision:
                    row = plan.precise(module.format)
                module.multiply = self._counting(row, module.format)
                module.multiplies_fp8 = row.takes_fp8
                module.multiply_add = module.multiply_gelu = None
                if row.gelu:
                    through = replace(row, call=row.gelu)
                    told = f"{row.compute}, through GELU to fp8"
                    module.multiply_gelu = self._counting(through, module.format, told)
                if row.adds:
                    adding = replace(row, call=row.adds)
                    added = f"{row.compute}, added to the residual"
                    module.multiply_add = self._counting(adding, module.format, added)

    def ran(self) -> list[dict[str, object]]:
        """What multiplied and how often, for the report, the most frequent first."""
        return [
            {"implementation": name, "format": format_, "compute": compute, "calls": calls}
            for (name, format_, compute), calls in self._calls.most_common()
        ]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """As attention's: what is broken off and done again counts once."""
        before = self._calls.copy()
        try:
            yield
        except (ImplementationError, RuntimeError, MemoryError):
            self._calls = before
            raise

    def _counting(
        self, row: LinearRow, format_: str, compute: str | None = None
    ) -> Callable[..., Any]:
        function = self._functions.get(row.call) or load(row)
        self._functions[row.call] = function
        key = name_of(function, row), format_, compute or row.compute

        def multiply(*arguments: Any) -> Any:
            try:
                out = function(*arguments)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise failed(row, error) from error
            self._calls[key] += 1
            return out

        return multiply


def matrices(module: nn.Module) -> dict[str, int]:
    """How many linear layers of a model store their weight in each format."""
    formats = [
        layer.format if isinstance(layer, QuantLinear) else str(layer.weight.dtype)[6:]
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    ]
    return dict(Counter(formats))
