"""A row of the table of blocks against a block in float32, on the device it is to serve on."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sagewan.attention.launch import Launcher, is_out_of_memory
from sagewan.attention.resolve import ImplementationError, one_line
from sagewan.checkpoint.packed import unpack
from sagewan.checkpoint.quantize import pack
from sagewan.model import matmul
from sagewan.model.attention import Attention, Turn
from sagewan.model.block import Block
from sagewan.model.blocks import Blocks
from sagewan.model.linear import QuantLinear
from sagewan.model.times import Modulation
from sagewan.plan.attention import AttentionPlan, Choice
from sagewan.plan.blocks import BlockRow
from sagewan.plan.catalogue import Problem, row_named
from sagewan.plan.evidence import SelfTest
from sagewan.plan.hardware import Device
from sagewan.plan.linear import E4M3
from sagewan.plan.models import TEXT_TOKENS
from sagewan.plan.objection import Objection
from sagewan.plan.row import ADA_UP

# Of the block's change to its hidden state. bfloat16's own rounding costs .006 on these inputs and
# FP8's .04; a step that is left out or misplaced costs a tenth of it and more.
_LIMITS = {"16 bit": 0.02, "fp8": 0.08}
_HEADS, _FFN, _TOKENS = 3, 640, 70


def self_test_block(row: BlockRow, device: Device, problem: Problem) -> SelfTest:
    """‖hidden − expected‖ / ‖change‖ with weights in 16 bit and, where the device multiplies so, in
    FP8: what is nearest to its limit."""
    error: float | None = None
    limit, objection = _LIMITS["16 bit"], None
    try:
        error, limit = max(_errors(row, device, problem), key=lambda pair: pair[0] / pair[1])
    except Exception as failure:
        if is_out_of_memory(failure):
            raise
        objection = Objection("self-test-crashed", {"error": one_line(failure)})
        if isinstance(failure, ImplementationError):
            objection = failure.objection
    else:
        if not math.isfinite(error):
            objection = Objection("self-test-not-finite")
        elif error > limit:
            values = {"error": f"{error:.3g}", "limit": f"{limit:.3g}"}
            objection = Objection("self-test-error", values)
    return SelfTest(
        implementation=row.name, error=error, limit=limit, milliseconds=None, objection=objection
    )


def _errors(row: BlockRow, device: Device, problem: Problem) -> Iterator[tuple[float, float]]:
    dtype: torch.dtype = getattr(torch, problem.dtype)
    plain = _block(problem.head_dim, dtype).to(device.torch_name)
    # Attention in 8 bits rounds as products in FP8 do.
    yield _error(row, plain, plain, problem), _LIMITS["fp8" if row.prepares else "16 bit"]
    if device.sm in ADA_UP and dtype == torch.bfloat16:
        # For which torch's products with a scale a row are made.
        fp8, stored = _quantised(plain)
        yield _error(row, fp8, stored, problem), _LIMITS["fp8"]


def _error(row: BlockRow, block: Any, stored: Any, problem: Problem) -> float:
    """``stored`` has the weights of the block, as they are stored, without a format."""
    weight = stored.attn1.to_q.weight
    hidden, text, times, rotary = _inputs(problem.head_dim, weight.device)
    holder = nn.Module()
    holder.blocks = nn.ModuleList([block])
    given, text = hidden.to(weight.dtype), text.to(weight.dtype)
    attention = Attention(Launcher())
    Blocks().install(holder, attention, row)
    try:
        with torch.inference_mode(), attention.during(_turn(row.prepares, problem)):
            found = block(given.clone(), text, times, rotary)
        exact = Block(copy.deepcopy(stored).float(), attention, 0)
        with torch.inference_mode(), attention.during(_turn(None, problem)):
            expected = exact(given.float().clone(), text.float(), times, rotary)
    finally:
        # The next trial's block is a copy of this one.
        del block.forward
    return float((found - expected).norm() / (expected - given).norm())


def _turn(implementation: str | None, problem: Problem) -> Turn:
    """Attention by an implementation, torch's if none is named, and the rest in chunks."""
    choice = Choice("sdpa", row_named(implementation or "torch.sdpa"))
    plan = AttentionPlan(requested="sdpa", problem=problem, main=choice)
    return Turn(plan, 1, lambda: None, chunk=32)


def _block(head_dim: int, dtype: torch.dtype) -> Any:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    width = _HEADS * head_dim
    block = WanTransformerBlock(width, _FFN, _HEADS, cross_attn_norm=True).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in block.named_parameters():
        scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.1
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + offset)
        if not name.startswith(("norm", "scale_shift")):
            parameter.data = parameter.data.to(dtype)
    return block.eval()


def _quantised(block: Any) -> tuple[Any, Any]:
    """The block with FP8 weights, and with the same weights in their dtype."""
    quantised, stored = copy.deepcopy(block), copy.deepcopy(block)
    for name, module in list(quantised.named_modules()):
        if isinstance(module, nn.Linear) and name not in ("attn2.to_k", "attn2.to_v"):
            packed = pack(module.weight, E4M3)
            layer = QuantLinear(packed, module.bias, module.weight.dtype)
            layer.multiply, layer.multiplies_fp8 = matmul.fp8_rows, True
            quantised.set_submodule(name, layer)
            stored.get_submodule(name).weight.copy_(unpack(packed, torch.float32))
    return quantised, stored


def _inputs(
    head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Modulation, tuple[Tensor, Tensor]]:
    """Tokens of two times, of which the second begins within a chunk."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    angles = 3 * noise(1, _TOKENS, 1, head_dim // 2)
    cos, sin = (turn(angles).repeat_interleave(2, -1) for turn in (torch.cos, torch.sin))
    width = _HEADS * head_dim
    times = Modulation(0.5 * noise(1, 2, 6, width), (0, 20, _TOKENS))
    return noise(1, _TOKENS, width), noise(1, TEXT_TOKENS, width), times, (cos, sin)
