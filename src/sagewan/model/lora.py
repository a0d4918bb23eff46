"""LoRAs on a transformer: beside its weights, never merged into them.

A layer's output gets B·(A·x) added, whatever its weights are stored in. So a LoRA has the same
effect on 16-bit and on quantised weights, taking it off restores the model exactly, and another can
be put on without loading the model again. It costs a layer two thin products.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagewan.checkpoint.lora import LoraLayer
from sagewan.errors import CheckpointError

_NAME = "lora"


class LoraTerm(nn.Module):
    """What the LoRAs of one layer add to its output: their ranks are stacked, so that any number
    of them is one pair of products. a [R, K], b [N, R], diff [N, K], diff_b [N]."""

    a: Tensor | None
    b: Tensor | None
    diff: Tensor | None
    diff_b: Tensor | None

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in ("a", "b", "diff", "diff_b"):
            self.register_buffer(name, parts.get(name), persistent=False)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """The layer's input x [..., K] and output [..., N] → the output with the term added, in
        place: a second output the size of a block's widest would be its largest."""
        rows = output.view(-1, output.shape[-1])
        x = x.reshape(-1, x.shape[-1])
        if self.a is not None and self.b is not None:
            rows.addmm_(F.linear(x.to(self.a.dtype), self.a), self.b.t())
        if self.diff is not None:
            rows.addmm_(x.to(self.diff.dtype), self.diff.t())
        if self.diff_b is not None:
            rows.add_(self.diff_b)
        return output


class Adapters:
    """The LoRAs that are on one transformer. :meth:`put` replaces them."""

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = transformer
        self._terms: dict[str, Any] = {}
        self._originals: dict[str, Tensor] = {}

    @torch.no_grad()
    def put(self, loras: Iterable[Mapping[str, LoraLayer]]) -> int:
        """Take off what is on, and put these on, by the names of the layers; how many it changed.

        Raises CheckpointError for a layer that the transformer has not, or in another shape.
        """
        self.take_off()
        gathered: dict[str, list[LoraLayer]] = {}
        for lora in loras:
            for name, layer in lora.items():
                gathered.setdefault(name, []).append(layer)
        for name, changes in gathered.items():
            self._change(name, changes)
        return len(gathered)

    @torch.no_grad()
    def take_off(self) -> None:
        """The transformer as it was before any LoRA, to the bit."""
        for name, handle in self._terms.items():
            handle.remove()
            delattr(self._transformer.get_submodule(name), _NAME)
        for name, original in self._originals.items():
            self._transformer.get_parameter(name).copy_(original)
        self._terms, self._originals = {}, {}

    def _change(self, name: str, changes: list[LoraLayer]) -> None:
        owner, _, last = name.rpartition(".")
        try:
            module: Any = self._transformer.get_submodule(name)
        except AttributeError:
            # A table of numbers is a parameter by itself, with no module of its own.
            self._shift(f"{owner}.{last}" if owner else last, changes, "diff")
            return
        if not isinstance(module, nn.Linear):
            self._shift(f"{name}.weight", changes, "diff")
            if any(change.diff_b is not None for change in changes):
                self._shift(f"{name}.bias", changes, "diff_b")
            return
        parts = _summed(changes)
        _check(name, parts, (module.out_features, module.in_features))
        weight = module.weight
        term = LoraTerm({key: x.to(weight.device, weight.dtype) for key, x in parts.items()})
        setattr(module, _NAME, term)
        self._terms[name] = module.register_forward_hook(_add)

    def _shift(self, name: str, changes: list[LoraLayer], part: str) -> None:
        """Add to a parameter that no product reads; the original is kept for taking off."""
        try:
            parameter = self._transformer.get_parameter(name)
        except AttributeError:
            raise CheckpointError(f"the model has no {name}, which a LoRA changes") from None
        differences = [x for change in changes if (x := getattr(change, part)) is not None]
        if any(x.shape != parameter.shape for x in differences):
            raise CheckpointError(
                f"a LoRA changes {name} by {list(differences[0].shape)}, and the model's is "
                f"{list(parameter.shape)}: choose one made for this model"
            )
        if not differences:
            return
        self._originals[name] = parameter.detach().clone()
        whole = parameter.float()
        for difference in differences:
            whole = whole + difference.to(parameter.device)
        parameter.copy_(whole)


def _add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    changed: Tensor = getattr(layer, _NAME)(inputs[0], output)
    return changed


def _summed(changes: list[LoraLayer]) -> dict[str, Tensor]:
    """Several LoRAs of one layer as one: ranks side by side, whole differences added."""
    parts: dict[str, Tensor] = {}
    pairs = [(c.a, c.b) for c in changes if c.a is not None and c.b is not None]
    if pairs:
        parts["a"] = torch.cat([a for a, _ in pairs])
        parts["b"] = torch.cat([b for _, b in pairs], dim=1)
    for key in ("diff", "diff_b"):
        wholes = [x for change in changes if (x := getattr(change, key)) is not None]
        if wholes:
            parts[key] = torch.stack(wholes).sum(0)
    return parts


def _check(name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
    sizes: list[tuple[int, ...]] = []
    sizes += [(parts["b"].shape[0], parts["a"].shape[1])] if "a" in parts else []
    sizes += [tuple(parts["diff"].shape)] if "diff" in parts else []
    sizes += [(parts["diff_b"].shape[0], shape[1])] if "diff_b" in parts else []
    wrong = next((size for size in sizes if size != shape), None)
    if wrong:
        raise CheckpointError(
            f"a LoRA changes {name} by {list(wrong)}, and the model's is {list(shape)}: choose one "
            "made for this model"
        )
