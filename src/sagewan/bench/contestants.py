"""The transformers that are compared: one set of random weights, run by diffusers and by us."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sagewan.attention.launch import Launcher
from sagewan.attention.peak import bits_of
from sagewan.attention.resolve import ImplementationError, load
from sagewan.bench.case import Case
from sagewan.bench.floor import Arithmetic
from sagewan.checkpoint.quantize import pack
from sagewan.errors import UnsupportedError
from sagewan.model.attention import Attention, KeysValues
from sagewan.model.block import text_keys
from sagewan.model.blocks import Blocks
from sagewan.model.linear import Multiplier, QuantLinear
from sagewan.pipeline.denoise import turn_of
from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.request import NO_QUANTIZATION, Request
from sagewan.plan.weights import WeightsPlan

BASELINE = "diffusers"
FLASH = "diffusers, FA2"
COMPILED = "diffusers, compiled"
RIVALS = {"eager": BASELINE, "fa2": FLASH, "compiled": COMPILED}
DTYPE = "bfloat16"
# The most that a prediction may differ from diffusers' own: of the same arithmetic in another
# order; and of what each quantization and each mode of attention adds, on these random weights.
_SAME = 0.02
_WEIGHTS = {NO_QUANTIZATION: 0.0, "fp8_scaled": 0.07, "fp4_scaled": 0.22}
_ATTENTION = {"sageattn": 0.03, "sageattn_3": 0.03, "sageattn_3_fp8": 0.06, "sageattn_3_fp4": 0.2}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to compute a step. ``weights`` is the quantization, ``products`` what multiplies what
    in the feed-forward, ``attention`` and ``blocks`` the rows' names, ``chunks`` how many tokens
    and heads go at a time; ``during`` the context of a pass; ``limit`` the most error against the
    baseline. ``keeps_text``: the text's keys and values are those of the first pass, as in a run.
    """

    name: str
    model: Any
    weights: str = NO_QUANTIZATION
    products: str = "16 bit × 16 bit"
    attention: str = "torch.sdpa"
    blocks: str = "diffusers"
    chunks: tuple[int | None, int | None] = (None, None)
    during: Callable[[], AbstractContextManager[object]] = nullcontext
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    limit: float = _SAME
    keeps_text: bool = False

    def predict(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One pass: the prediction [1, C, F, H, W]."""
        with torch.no_grad(), self.during():
            prediction: Tensor = self.model(**inputs, return_dict=False)[0]
        return prediction

    def ends(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`predict`, of the transformer without its blocks."""
        blocks, self.model.blocks = self.model.blocks, nn.ModuleList()
        try:
            return self.predict(inputs)
        finally:
            self.model.blocks = blocks

    def text(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The text as the blocks attend to it, [1, 512, W]."""
        with torch.no_grad():
            text = inputs["encoder_hidden_states"]
            embedded: Tensor = self.model.condition_embedder.text_embedder(text)
        return embedded

    def text_keys(self, text: Tensor) -> KeysValues:
        """Its keys and values in the block, as the first pass computes them."""
        with torch.no_grad():
            return text_keys(self.model.blocks[0].attn2, text)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's weights."""
        tensors = (*self.model.blocks[0].parameters(), *self.model.blocks[0].buffers())
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and with what contestants meet."""

    case: Case
    device: Device
    hardware: Hardware
    emulate: bool = False


def contestants(
    setting: Setting, rivals: Sequence[str], quantizations: Sequence[str], modes: Sequence[str]
) -> tuple[list[Contestant], dict[str, str]]:
    """Those that can run here, the baseline first, and why not the others."""
    transformer = random_transformer(setting.case, setting.device)
    chosen = [Contestant(name=BASELINE, model=transformer), *_of_diffusers(transformer, rivals)]
    refused: dict[str, str] = {}
    for quantization in quantizations:
        stored = None
        for mode in modes:
            try:
                plan = _plan(setting, quantization, mode)
            except UnsupportedError as error:
                refused[mode] = str(error)
                continue
            stored = stored or _quantised(transformer, plan.weights)
            chosen.append(_ours(stored, plan, mode))
    return chosen, refused


def random_transformer(case: Case, device: Device) -> Any:
    """diffusers' transformer of one block in a model's widths, with random weights that behave:
    keys resemble queries and are biased by channel, as in Wan, so that attention has something to
    find, and what the block adds outweighs what it is given."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    model = case.model
    with torch.device(device.torch_name):
        transformer = WanTransformer3DModel(
            patch_size=model.patch,
            num_attention_heads=model.heads,
            attention_head_dim=model.head_dim,
            in_channels=model.in_channels,
            out_channels=model.latent_channels,
            ffn_dim=model.ffn,
            num_layers=1,
        )
    generator = torch.Generator(device.torch_name).manual_seed(0)
    # diffusers keeps these in float32, whatever the dtype.
    kept = transformer._keep_in_fp32_modules  # noqa: SLF001
    for name, parameter in transformer.named_parameters():
        parts = name.split(".")
        value = torch.empty_like(parameter, dtype=torch.float32)
        value.normal_(std=_deviation(name, parameter), generator=generator)
        if parts[-1] == "weight" and parameter.ndim == 1:
            value.add_(1.5 if parts[-2] in ("norm_q", "norm_k") else 1.0)
        dtype = torch.float32 if any(part in kept for part in parts) else getattr(torch, DTYPE)
        parameter.data = value.to(dtype)
    attn = transformer.blocks[0].attn1
    attn.to_k.weight.data.mul_(0.6).add_(0.8 * attn.to_q.weight.data)
    return transformer.requires_grad_(requires_grad=False).eval()


def _deviation(name: str, parameter: Tensor) -> float:
    if name.endswith("scale_shift_table"):
        return 0.5
    if name.endswith("attn1.to_k.bias"):
        return 1.5
    if parameter.ndim == 1:
        return 0.02
    spread = float(parameter[0].numel() ** -0.5)
    return 0.1 * spread if name.startswith("patch_embedding") else spread


def random_inputs(case: Case, device: Device) -> dict[str, Tensor]:
    """Noise [1, C, F, H, W] that neighbours share in part, a time, and a text [1, 512, 4096]."""
    name = device.torch_name
    generator = torch.Generator(name).manual_seed(1)
    frames, rows, columns = case.latents

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=name)

    channels = case.model.in_channels
    places = normal(1, channels, frames, -(-rows // 8), -(-columns // 8))
    shared = places.repeat_interleave(8, 3).repeat_interleave(8, 4)[..., :rows, :columns]
    noise = shared + 0.5 * normal(1, channels, frames, rows, columns)
    dtype = getattr(torch, DTYPE)
    return {
        "hidden_states": noise.to(dtype),
        "timestep": torch.full((1,), 500.0, device=name),
        "encoder_hidden_states": normal(1, 512, 4096).to(dtype),
    }


def _of_diffusers(transformer: Any, rivals: Sequence[str]) -> Iterator[Contestant]:
    if "fa2" in rivals:
        flash = partial(sdpa_kernel, [SDPBackend.FLASH_ATTENTION])
        yield Contestant(name=FLASH, model=shared_copy(transformer), attention="FA2", during=flash)
    if "compiled" in rivals:
        compiled = shared_copy(transformer)
        compiled.compile_repeated_blocks(fullgraph=True)
        yield Contestant(name=COMPILED, model=compiled)


def shared_copy(transformer: Any) -> Any:
    """A module of its own with the same tensors, so that each may be run in another way."""
    tensors = (*transformer.parameters(), *transformer.buffers())
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors})


def _ours(stored: Any, plan: Plan, mode: str) -> Contestant:
    transformer, attention = shared_copy(stored), Attention(Launcher())
    Blocks().install(transformer, attention, plan.blocks.row)
    Multiplier().install(transformer, plan.weights)
    row, main = plan.attention.main.row, plan.weights.main
    low = main is not None and main.low
    arithmetic = Arithmetic(
        products=bits_of(main.compute.partition("×")[0]) if main is not None and low else 16,
        scores=bits_of(row.qk),
        values=bits_of(row.pv),
    )
    stored_as, chunks = plan.weights.quantization, plan.memory.chunks
    turn = turn_of(plan, 1, lambda: None)
    return Contestant(
        name=f"ours {_word(stored_as)} + {mode}",
        model=transformer,
        weights=stored_as,
        products="16 bit × 16 bit" if main is None else main.compute,
        attention=row.name,
        blocks=plan.blocks.row.name,
        chunks=(chunks.tokens, chunks.heads),
        during=partial(attention.during, turn),
        arithmetic=arithmetic,
        limit=_SAME + _WEIGHTS[stored_as] + _ATTENTION.get(mode, 0.0),
        keeps_text=turn.known is not None,
    )


def _word(quantization: str) -> str:
    return "bf16" if quantization == NO_QUANTIZATION else quantization


def _plan(setting: Setting, quantization: str, mode: str) -> Plan:
    """The plan of a run on this device, but that what it would test first is taken to pass: here
    it is checked anyway. Rows that can't be loaded give way to the next; UnsupportedError says why
    none serves the mode."""
    case, model = setting.case, setting.case.model
    frames, rows, columns = case.latents
    request = Request(
        prompt="bench",
        attention=mode,
        quantization=quantization,
        size=(columns * model.spatial, rows * model.spatial),
        frames=(frames - 1) * model.temporal + 1,
        dtype=DTYPE,
        device=setting.device.torch_name,
        strict=True,
        emulate=setting.emulate,
    )
    evidence = Evidence()
    while True:
        plan = make_plan(request, model, setting.hardware, evidence)
        try:
            load(plan.attention.main.row)
            load(plan.blocks.row)
        except ImplementationError as error:
            evidence = evidence.with_failure(error.implementation, error.objection)
        else:
            return plan


def _quantised(transformer: Any, plan: WeightsPlan) -> Any:
    """The transformer with the policy's matrices packed, all else shared."""
    if plan.format is None:
        return transformer
    found = shared_copy(transformer)
    for name, layer in list(found.named_modules()):
        if isinstance(layer, nn.Linear) and plan.quantises(name):
            packed = pack(layer.weight.data, plan.format)
            found.set_submodule(name, QuantLinear(packed, layer.bias, layer.weight.dtype))
    return found
