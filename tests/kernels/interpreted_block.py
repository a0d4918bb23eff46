"""The kernels of a block's rows, run by Triton's interpreter: ``test_interpreted`` starts it."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.packed import Packed
from sagewan.checkpoint.quantize import pack
from sagewan.errors import ShapeError
from sagewan.kernels import fp8_linear, hopper_prepare, sequence, token_rows
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.kernels.hopper_prepare import Position
from sagewan.kernels.token_rows import Norm, Residual
from sagewan.model import fused
from sagewan.model.attention import Attention, Turn
from sagewan.model.block import Block
from sagewan.model.blocks import Passes
from sagewan.model.fused import FusedBlock, HopperBlock
from sagewan.model.linear import QuantLinear
from sagewan.model.matmul import Gate
from sagewan.model.times import Modulation
from sagewan.plan.attention import AttentionPlan, Choice
from sagewan.plan.blocks import BLOCK_ROWS
from sagewan.plan.catalogue import Problem, row_named
from sagewan.reference import formats
from tests.kernels.interpreted import _exact_e4m3  # noqa: F401 a fixture for every test here

PLAN = AttentionPlan(
    requested="sdpa",
    problem=Problem(head_dim=32, dtype="float16"),
    main=Choice("sdpa", row_named("torch.sdpa")),
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(found: Tensor, expected: Tensor, most: float) -> bool:
    return float((found.double() - expected).norm() / expected.norm()) < most


def value(x: Tensor | Fp8Rows) -> Tensor:
    return x.data.double() * x.scale if isinstance(x, Fp8Rows) else x.double()


def output(kind: str, *shape: int) -> Tensor | Fp8Rows:
    if kind == "fp8":
        return Fp8Rows.empty(*shape, device=torch.device("cpu"))
    return torch.empty(shape, dtype=torch.float16)


@pytest.mark.parametrize("kind", ["fp8", "16 bit"])
@pytest.mark.parametrize("columns", [64, 80])
def test_a_residual_is_added_and_the_sum_normalised_and_modulated(kind: str, columns: int) -> None:
    whole = (3 * random(2, 9, columns) + 1).half()
    # Tokens of a longer sequence: the batches lie apart.
    hidden, y = whole[:, 2:7], random(2, 5, columns, seed=1).half()
    vectors = random(2, 6, columns, seed=2)
    shift, scale, gate = vectors[:, 0], vectors[:, 1], vectors[:, 5]
    before = whole.clone()
    added = (hidden.float() + y.float() * gate[:, None]).half()
    normed = F.layer_norm(added.double(), (columns,), eps=1e-6)
    expected = normed * (1 + scale.double())[:, None] + shift.double()[:, None]
    out = output(kind, 2, 7, columns)
    here = out.tokens(1, 6) if isinstance(out, Fp8Rows) else out[:, 1:6]
    norm = Norm(eps=1e-6, shift=shift, scale=scale)
    token_rows.add_and_norm(hidden, norm, here, Residual(y=y, gate=gate))
    assert hidden.equal(added)
    assert whole[:, [0, 1, 7, 8]].equal(before[:, [0, 1, 7, 8]])
    assert near(value(here), expected, 0.035 if kind == "fp8" else 1e-3)
    if isinstance(here, Fp8Rows):
        exact = formats.e4m3_per_row(expected.float())
        assert (here.data.float() != exact.data).float().mean() < 0.01


def test_its_parts_may_be_left_out() -> None:
    hidden, y = random(1, 4, 48).half(), random(1, 4, 48, seed=1).half()
    weight, bias = random(48, seed=2), random(48, seed=3)
    out = torch.empty_like(hidden)
    token_rows.add_and_norm(hidden, Norm(eps=1e-6, weight=weight, bias=bias), out)
    assert near(out, F.layer_norm(hidden.double(), (48,), weight.double(), bias.double()), 1e-3)
    token_rows.add_and_norm(hidden, Norm(eps=None), out)
    assert out.equal(hidden)
    added = hidden + y
    token_rows.add_and_norm(hidden, None, None, Residual(y=y))
    assert hidden.equal(added)


@pytest.mark.parametrize("heads", [2, 3])
def test_q_is_normalised_over_all_heads_and_rotated(heads: int) -> None:
    x = random(2, 5, heads, 32).half()
    weight, angles = random(heads * 32, seed=1), random(1, 5, 1, 16, seed=2)
    cos, sin = (f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    exact = F.rms_norm(x.double().flatten(2), (heads * 32,), weight.double(), 1e-6).view(x.shape)
    even, odd = exact[..., 0::2], exact[..., 1::2]
    turn = torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_real(torch.complex(even, odd) * turn).flatten(-2)
    out = torch.empty(2, 9, heads, 32, dtype=torch.float16)[:, 3:8]
    token_rows.norm_and_rotate(x, out, weight, 1e-6, (cos, sin))
    assert near(out, turned, 1e-3)
    token_rows.norm_and_rotate(x, x, weight, 1e-6, None)
    assert near(x, exact, 1e-3)


@pytest.mark.parametrize("tokens", [70, 8195])
def test_the_mean_of_what_projections_become(tokens: int) -> None:
    x = random(2, tokens, 1, 128).half() if tokens < 100 else random(1, tokens, 1, 128).half()
    weight, angles = random(128, seed=1), random(1, tokens, 1, 64, seed=2)
    cos, sin = (f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    position = Position(weight=weight, eps=1e-6, cos=cos, sin=sin)
    # One program a row takes the interpreter long.
    factors = (x.float().square().mean((2, 3)) + 1e-6).rsqrt()
    if tokens < 100:
        assert torch.allclose(hopper_prepare.row_factors(x, 1e-6), factors, rtol=1e-5)
    exact = x.float() * factors[:, :, None, None] * weight.view(1, 1, 1, 128)
    even, odd = exact[..., 0::2], exact[..., 1::2]
    turn = torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_real(torch.complex(even, odd) * turn).flatten(-2)
    expected = turned[:, :: sequence.stride_of(tokens)].mean(1)
    found = hopper_prepare.turned_mean(x, factors, position)
    assert torch.allclose(found, expected, atol=1e-5)


def test_gelu_before_the_rounding() -> None:
    x = (4 * random(6, 80)).half()
    expected = F.gelu(x.double(), approximate="tanh")
    found = fp8_linear.quantize_rows(x, gelu=True)
    assert near(value(found), expected, 0.035)
    assert (found.data.float() != formats.e4m3_per_row(expected).data).float().mean() < 0.01


def test_strides_that_the_kernels_do_not_take_are_refused() -> None:
    hidden = torch.empty(1, 4, 48, dtype=torch.float16)
    with pytest.raises(ShapeError, match="without gaps"):
        token_rows.add_and_norm(hidden, Norm(eps=1e-6), torch.empty(1, 48, 4).mT)
    with pytest.raises(ShapeError, match="columns"):
        token_rows.add_and_norm(torch.empty(1, 1, 20000), Norm(eps=1e-6), torch.empty(1, 1, 20000))
    apart = Norm(eps=1e-6, shift=torch.empty(2, 48), scale=torch.empty(2, 2, 48)[:, 0])
    with pytest.raises(ShapeError, match="apart"):
        token_rows.add_and_norm(hidden, apart, hidden)


def small_block(*, fp8: bool, pictures: bool = False) -> Any:
    """A block of 3 heads of 32 channels, in float16 but for its norms; with FP8 weights, those
    multiply in FP8 as the GPU's rows do, but in float32."""
    torch.manual_seed(0)
    block = WanTransformerBlock(
        96, 160, 3, cross_attn_norm=True, added_kv_proj_dim=96 if pictures else None
    )
    for name, parameter in block.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.1)
        if not name.startswith(("norm2", "scale_shift")):
            parameter.data = parameter.data.half()
    block.requires_grad_(False).eval()
    for name, module in list(block.named_modules()):
        if fp8 and isinstance(module, torch.nn.Linear) and "attn2.to_k" != name != "attn2.to_v":
            layer = QuantLinear(pack(module.weight, "float8_e4m3fn"), module.bias, torch.float16)
            layer.multiply, layer.multiplies_fp8 = multiply_fp8, True
            block.set_submodule(name, layer)
    return block


def add_fp8(x: Fp8Rows, packed: Packed, bias: Tensor | None, gate: Gate, into: Tensor) -> None:
    # As the kernel takes it: made for the first chunk, and the same for the others.
    scale, offset = gate.folded(packed.scale, bias)
    assert gate.folded(packed.scale, bias)[0] is scale
    weight = packed.data.float() * scale[:, None]
    into.copy_(into.float() + F.linear(x.data.float() * x.scale, weight, offset.float()))


def gelu_fp8(x: Fp8Rows, packed: Packed, bias: Tensor | None, _: Any) -> Fp8Rows:
    assert x.norm is not None
    torch.testing.assert_close(
        x.norm, (x.data.float() * x.scale).norm(dim=1)[:, None], rtol=0.1, atol=0
    )
    rounded = formats.e4m3_per_row(
        F.gelu(multiply_fp8(x, packed, bias).float(), approximate="tanh")
    )
    return Fp8Rows(rounded.data.to(torch.float8_e4m3fn), rounded.scale)


def multiply_fp8(x: Any, packed: Packed, bias: Tensor | None) -> Tensor:
    if isinstance(x, Tensor):
        x = fp8_linear.quantize_rows(x)
    weight = packed.data.float() * packed.scale
    return F.linear(x.data.float() * x.scale, weight, bias.float()).half()


def exact_block(block: Any) -> Any:
    """The same block with all weights as they are stored, in float32."""
    exact = copy.deepcopy(block)
    for name, module in list(exact.named_modules()):
        if isinstance(module, QuantLinear):
            layer = torch.nn.Linear(module.in_features, module.out_features)
            layer.weight.data = module.data.float() * module.scale
            layer.bias.data = module.bias.data
            exact.set_submodule(name, layer)
    return exact.float()


def test_videos_of_one_batch_may_share_their_time() -> None:
    block = small_block(fp8=False)
    hidden, text, times, rotary = inputs(pictures=False)
    shared = Modulation(times.vectors[:1], times.bounds)
    each = Modulation(times.vectors[:1].expand(2, -1, -1, -1).contiguous(), times.bounds)
    attention = Attention(Launcher())
    forward = FusedBlock(block, attention, 0, Passes(BLOCK_ROWS[1], "fused", Counter()))
    with torch.inference_mode(), attention.during(Turn(PLAN, 1, lambda: None)):
        found, expected = (forward(hidden.clone(), text, t, rotary) for t in (shared, each))
    assert found.equal(expected)


def inputs(*, pictures: bool) -> tuple[Tensor, Tensor, Modulation, tuple[Tensor, Tensor]]:
    """7 tokens of two times, whose border lies within a chunk."""
    angles = random(1, 7, 1, 16, seed=3)
    cos, sin = (f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    return (
        random(2, 7, 96).half(),
        random(2, 512 + 20 * pictures, 96, seed=1).half(),
        Modulation(random(2, 2, 6, 96, seed=2).half(), (0, 4, 7)),
        (cos, sin),
    )


@pytest.mark.parametrize("weights", ["16 bit", "fp8", "fp8, added", "fp8, GELU, added"])
@pytest.mark.parametrize(("turn", "pictures"), [({}, False), ({"chunk": 3, "heads": 2}, True)])
def test_the_fused_block_is_as_near_as_the_block(
    weights: str, turn: dict[str, int], pictures: bool
) -> None:
    fp8, adds = weights != "16 bit", weights.endswith("added")
    block = small_block(fp8=fp8, pictures=pictures)
    for layer in block.modules():
        if adds and isinstance(layer, QuantLinear):
            layer.multiply_add = add_fp8
            layer.multiply_gelu = gelu_fp8 if "GELU" in weights else None
    hidden, text, times, rotary = inputs(pictures=pictures)
    attention = Attention(Launcher())
    kernels: Counter[tuple[str, str]] = Counter()
    passes = Passes(BLOCK_ROWS[1], "fused", kernels)
    with torch.inference_mode(), attention.during(Turn(PLAN, 1, lambda: None, **turn)):
        precise = Block(exact_block(block), attention, 0)
        expected = precise(hidden.float(), text.float(), times, rotary)
        found = FusedBlock(block, attention, 0, passes)(hidden.clone(), text, times, rotary)
        plain = Block(block, attention, 0)(hidden.clone(), text, times, rotary)
    error, usual = (
        float((x - expected).norm() / (expected - hidden).norm()) for x in (found, plain)
    )
    assert error < 1.1 * usual < (0.06 if fp8 else 2e-3)
    parts = 3 if turn else 1
    runs = parts + 1  # of tokens with one time
    assert {name: count for (_, name), count in kernels.items()} == {
        # Where the products add themselves, nothing but what is normalised, and FP8 for three.
        "add_and_norm": (3 if adds else 4) * runs,
        "norm_and_rotate": 3 * parts,
        **(
            {"quantize_rows": (3 if adds else 1) * parts - ("GELU" in weights) * parts}
            if fp8
            else {}
        ),
    }


@pytest.mark.parametrize(
    ("fp8", "chunk"), [(False, None), (True, None), (True, 3)], ids=["16 bit", "fp8", "in chunks"]
)
def test_only_the_attention_it_is_prepared_for_gets_q_and_k_prepared(
    fp8: bool, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = small_block(fp8=fp8)
    hidden, text, times, rotary = inputs(pictures=False)
    attention, kernels = Attention(Launcher()), Counter[tuple[str, str]]()
    forward = HopperBlock(block, attention, 0, Passes(BLOCK_ROWS[0], "hopper", kernels))
    plain = Block(block, attention, 0)

    def prepare_projections(q: Tensor, k: Tensor, v: Tensor, for_q: Any, for_k: Any) -> Any:
        made = [torch.empty_like(x) for x in (q, k)]
        for x, out, place in zip((q, k), made, (for_q, for_k), strict=True):
            table = (place.cos, place.sin)
            token_rows.norm_and_rotate(x, out, place.weight, place.eps, table)
        return [x.transpose(1, 2) for x in (*made, v)]

    written: list[torch.dtype] = []

    def output_scale(prepared: Any) -> Tensor:
        return prepared[2].float().abs().amax((1, 2, 3)) / 448

    def attend_prepared(self: Attention, prepared: Any, out: Tensor, layer: int) -> Tensor:
        written.append(out.dtype)
        attended = F.scaled_dot_product_attention(*prepared)
        if out.dtype == torch.float8_e4m3fn:
            attended = attended.float() / output_scale(prepared)[:, None, None, None]
        return out.copy_(attended)

    monkeypatch.setattr(fused, "output_scale", output_scale)
    monkeypatch.setattr(fused, "prepare_projections", prepare_projections)
    monkeypatch.setattr(Attention, "attend_prepared", attend_prepared)
    with torch.inference_mode(), attention.during(Turn(PLAN, 1, lambda: None, chunk=chunk)):
        expected = plain(hidden.clone(), text, times, rotary)
        for implementation in ("torch.sdpa", "sagewan.sageattn_3_fp8_hopper"):
            kernels.clear()
            choice = Choice("", row_named(implementation))
            monkeypatch.setattr(Attention, "choice", lambda *_, choice=choice: choice)
            found = forward(hidden.clone(), text, times, rotary)
            assert near(found - hidden, expected - hidden, 0.08 if fp8 else 5e-3)
            prepared = implementation != "torch.sdpa"
            assert kernels["hopper", "prepare_projections"] == prepared
            of_text = 3 if chunk else 1
            assert kernels["hopper", "norm_and_rotate"] == of_text + (0 if prepared else 2)
        assert written == [torch.float8_e4m3fn if fp8 else torch.float16]
        # Heads in groups are prepared by the group: this is for all of them.
        kernels.clear()
        attention.turn.heads = 2
        monkeypatch.setattr(
            Attention, "attend", lambda _, *qkv: F.scaled_dot_product_attention(*qkv[:3])
        )
        forward(hidden.clone(), text, times, rotary)
        assert kernels["hopper", "prepare_projections"] == 0
