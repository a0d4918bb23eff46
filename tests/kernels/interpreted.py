"""The kernels' arithmetic, run by Triton's interpreter on the CPU: ``test_interpreted`` starts it.

float16 only: the interpreter multiplies bfloat16's bit patterns. Its conversion to e4m3 loses the
carry of the mantissa, so it is replaced by torch's, which rounds as the hardware does.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from benchmarks.prove import prove
from sagewan.errors import ShapeError
from sagewan.kernels import (
    fp4_attention,
    fp8_attention,
    int8_attention,
    online,
    prepare,
    prepare_fp4,
    query_key,
    sequence,
)
from sagewan.plan.catalogue import row_named
from sagewan.reference import emulation, formats
from sagewan.reference.attention import attention_with_lse, relative_error

Mode = Callable[..., tuple[Tensor, Tensor]]
MODES: dict[str, Mode] = {
    "sageattn": int8_attention.sageattn,
    "sageattn_3": int8_attention.sageattn_3,
    "sageattn_3_fp8": fp8_attention.sageattn_3_fp8,
    "sageattn_3_fp4": fp4_attention.sageattn_3_fp4,
}
# What rounding may move in the tests of properties.
ROUNDING = {"sageattn": 0.03, "sageattn_3": 0.03, "sageattn_3_fp8": 0.08, "sageattn_3_fp4": 0.2}
# The most a kernel may differ from the emulation of the same formats in the same order.
KERNEL_ERROR = 1e-3


@pytest.fixture(autouse=True)
def _exact_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    convert = interpreter._convert_float

    def exact(x: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        if str(target) != "fp8e4nv":
            return convert(x, source, target, mode)
        values = torch.from_numpy(np.asarray(x).view(np.float32)).clamp(-448, 448)
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", exact)


def sample(
    queries: int, keys: int, *, heads: int = 2, key_heads: int = 2, size: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(queries * keys + size)
    q = 1.5 * torch.randn(1, heads, queries, size) + torch.randn(1, heads, 1, size)
    k = torch.randn(1, key_heads, keys, size) + 3 * torch.randn(1, key_heads, 1, size)
    v = torch.randn(1, key_heads, keys, size) + 0.5 * torch.randn(1, key_heads, 1, size)
    return q.half(), k.half(), v.half()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "key_heads", "size"),
    [
        (150, 215, 4, 2, 128),
        (1, 1, 2, 2, 128),
        (3, 64, 2, 1, 64),
        (130, 65, 1, 1, 72),
        (20, 33, 1, 1, 8),
        (70, 100, 1, 1, 248),
    ],
)
def test_kernel_is_its_emulation(
    mode: str, queries: int, keys: int, heads: int, key_heads: int, size: int
) -> None:
    q, k, v = sample(queries, keys, heads=heads, key_heads=key_heads, size=size)
    out, lse = MODES[mode](q, k, v, return_lse=True)
    blocks = {}
    if size > 128 and mode != "sageattn_3_fp4":
        blocks = {"block_n": 32, "rows_per_scale": 64}
    same, same_lse = getattr(emulation, mode)(q, k, v, return_lse=True, **blocks)
    assert relative_error(out, same) < KERNEL_ERROR
    torch.testing.assert_close(lse, same_lse, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_kernel_with_a_block_mask_is_its_emulation(mode: str) -> None:
    q, k, v = sample(200, 300, heads=2, key_heads=1)
    mask = torch.tensor([[[True, False, True], [False, True, False]]]).unsqueeze(0)
    out, lse = MODES[mode](q, k, v, return_lse=True, block_mask=mask)
    same, same_lse = getattr(emulation, mode)(q, k, v, return_lse=True, block_mask=mask)
    assert relative_error(out, same) < KERNEL_ERROR
    torch.testing.assert_close(lse, same_lse, atol=2e-3, rtol=1e-4)


HOPPER = {
    "sageattn": {"block_m": 128, "block_n": 64},
    "sageattn_3": {"block_m": 128, "block_n": 64},
    "sageattn_3_fp8": {
        "block_m": 64,
        "block_n": 128,
        "rows_per_scale": 64,
        "keys_per_scale": 128,
    },
}


@pytest.mark.parametrize("mode", HOPPER)
@pytest.mark.parametrize("strided", [False, True])
def test_tiles_copied_by_the_memory_accelerator_are_the_same(
    mode: str, strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (int8_attention, fp8_attention):
        monkeypatch.setattr(module, "compute_capability", lambda _: 90)
    q, k, v = sample(130, 300, heads=2, key_heads=1, size=72)
    # It can't copy rows whose channels are apart.
    v = v.mT.contiguous().mT if strided else v
    mask = torch.tensor([[[True, False, True], [False, True, True]]]).unsqueeze(0)
    options: dict[str, Tensor]
    for options in ({}, {"block_mask": mask}):
        out, lse = MODES[mode](q, k, v, return_lse=True, **options)
        same, same_lse = getattr(emulation, mode)(
            q, k, v, return_lse=True, **HOPPER[mode], **options
        )
        assert relative_error(out, same) < KERNEL_ERROR
        torch.testing.assert_close(lse, same_lse, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("mode", ["sageattn_3", "sageattn_3_fp8"])
def test_scores_of_any_size_are_exact(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a score's unit is worth several powers of two, the base is taken off first."""
    q, k, v = sample(40, 300, heads=1, key_heads=1)
    q, k = 60 * q, 60 * k
    out, lse = MODES[mode](q, k, v, return_lse=True)
    same, same_lse = getattr(emulation, mode)(q, k, v, return_lse=True)
    assert relative_error(out, same) < KERNEL_ERROR
    torch.testing.assert_close(lse, same_lse, atol=0, rtol=1e-3)
    mask = torch.tensor([[[True, False, True]]]).unsqueeze(0)
    masked = MODES[mode](q, k, v, block_mask=mask)
    same = getattr(emulation, mode)(q, k, v, block_mask=mask)
    assert relative_error(masked, same) < KERNEL_ERROR
    # Left on, it takes the exponent's last digits.
    monkeypatch.setattr(online, "_MOST_FACTOR", tl.constexpr(1e30))
    _, rounded = MODES[mode](q, k, v, return_lse=True)
    assert (rounded - lse).abs().max() > 0.02


@pytest.mark.parametrize("mode", MODES)
def test_layout_does_not_matter_and_inputs_are_kept(mode: str) -> None:
    q, k, v = sample(40, 70)
    expected = MODES[mode](q, k, v)
    wide = torch.zeros(1, 2, 70, 256, dtype=torch.float16)
    wide[..., ::2] = v
    given = (q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT, wide[..., ::2])
    before = [x.clone() for x in given]
    assert torch.equal(MODES[mode](*given), expected)
    assert all(map(torch.equal, given, before))
    assert MODES[mode](*given).stride() == given[0].stride()


@pytest.mark.parametrize("mode", MODES)
def test_shifting_k_and_permuting_keys_change_little(mode: str) -> None:
    q, k, v = sample(20, 90, heads=1, key_heads=1)
    expected = MODES[mode](q, k, v)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    permuted = MODES[mode](q, k[:, :, order], v[:, :, order])
    shifted = MODES[mode](q, k + 2, v)
    assert relative_error(permuted, expected) < ROUNDING[mode]
    assert relative_error(shifted, expected) < ROUNDING[mode]


@pytest.mark.parametrize("mode", MODES)
def test_equal_keys_give_the_mean_of_v(mode: str) -> None:
    q, k, v = sample(5, 100, heads=1, key_heads=1)
    out = MODES[mode](q, k[:, :, :1].expand_as(k), v)
    limit = 2e-3 if mode in ("sageattn", "sageattn_3") else ROUNDING[mode]
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), atol=limit, rtol=limit)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [0.0, 2**-13, 60.0])
def test_large_and_tiny_inputs_stay_finite(mode: str, factor: float) -> None:
    q, k, v = sample(30, 70, heads=1, key_heads=1)
    q, k, v = (factor * x for x in (q, k, v))
    out, lse = MODES[mode](q, k, v, return_lse=True)
    reference, reference_lse = attention_with_lse(q, k, v)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    if factor < 1:
        limit = max(0.05, 2 * ROUNDING[mode]) * factor
        torch.testing.assert_close(out.double(), reference, atol=limit, rtol=0.1)
    else:
        limit = ROUNDING[mode] * float(reference_lse.abs().max())
        torch.testing.assert_close(lse.double(), reference_lse, atol=limit, rtol=0.1)


def test_smoothed_rows_hold_the_scores() -> None:
    """Data, scales and dots give back q·k, but for what softmax ignores."""
    q, k, _ = sample(40, 90, heads=2, key_heads=1)
    options = {"k_mean": None, "with_lse": True, "along": False}
    queries, keys = query_key.smoothed(q, k, None, query_key.Grain(), **options)
    assert keys.dots is not None
    scores = (queries.data.float() * queries.scale[..., None]) @ (
        keys.data.float() * keys.scale[..., None]
    ).mT + keys.dots[:, :, None]
    scores = scores[:, :, :40, :90]
    exact = q.double() @ k.double().mT * (128**-0.5 * query_key.LOG2E)
    centred, expected = (x - x.mean(-1, keepdim=True) for x in (scores.double(), exact))
    assert relative_error(centred, expected) < 0.012


def test_padding_is_zero_and_each_block_has_its_scale() -> None:
    _, k, _ = sample(1, 70, heads=1, key_heads=1)
    rows = prepare.int8_rows(k, prepare.Recipe(block=64), minus=sequence.mean(k))
    assert rows.data.shape == (1, 1, 128, 128)
    assert not rows.data[:, :, 70:].any()
    assert all(block.abs().max() == 127 for block in rows.data.split(64, 2))
    assert all(len(block.unique()) == 1 for block in rows.scale.split(64, 2))


def test_keys_are_rounded_along_themselves_as_in_the_reference() -> None:
    _, k, _ = sample(1, 200, heads=1, key_heads=1)
    k[:, :, 70:] *= torch.linspace(0.1, 2, 130)[:, None]
    keys = prepare.int8_rows(k, prepare.Recipe(rotate=True, along=True), minus=sequence.mean(k))
    centred = formats.rotate(k.float() - k.float().mean(2, keepdim=True))
    expected = formats.int8(centred, 64, along=True)
    # One row in some has two stretches as good, where sums are taken in another order.
    different = (keys.data[:, :, :200].float() - expected.data).abs()
    assert different.max() <= 1
    assert different.mean() < 1e-3
    torch.testing.assert_close(
        keys.scale[:, :, :200], expected.scale.squeeze(-1), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("size", [32, 72, 128, 256])
def test_rotation_is_the_emulations(size: int) -> None:
    _, k, _ = sample(1, 50, heads=1, key_heads=1, size=size)
    rows = prepare.int8_rows(k, prepare.Recipe(rotate=True))
    values = rows.data[:, :, :50, :size] * rows.scale[:, :, :50, None]
    step = rows.scale[:, :, :50, None].expand_as(values)
    assert ((values - formats.rotate(k)).abs() <= 0.501 * step).all()


def test_columns_of_v_are_e4m3_in_the_stored_order() -> None:
    _, _, v = sample(1, 37, heads=1, key_heads=1)
    columns = prepare.e4m3_columns(v, 448.0)
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    stored = columns.data.float().unflatten(-1, (-1, 16))
    natural = torch.empty_like(stored)
    natural[..., order] = stored
    values = (natural.flatten(-2) * columns.scale[..., None]).mT
    expected = formats.e4m3_per_channel(v)
    torch.testing.assert_close(values[:, :, :37], expected.value(), atol=0, rtol=1e-6)
    assert not values[:, :, 37:].any()


HALVES = {
    "sageattn": (int8_attention.prepare_sageattn, int8_attention.attend),
    "sageattn_3": (int8_attention.prepare_sageattn_3, int8_attention.attend),
    "sageattn_3_fp8": (fp8_attention.prepare_sageattn_3_fp8, fp8_attention.attend),
    "sageattn_3_fp4": (fp4_attention.prepare_sageattn_3_fp4, fp4_attention.attend),
}


# The most error of the output, and of the log-sum-exp, with a block mask.
MASKED = {
    "sageattn": (0.01, 0.06),
    "sageattn_3": (0.01, 0.06),
    "sageattn_3_fp8": (0.05, 0.06),
    "sageattn_3_fp4": (0.15, 0.6),
}


def masked_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:  # rows that attend to nothing: zeros, minus infinity
    allowed = mask.repeat_interleave(128, 2).repeat_interleave(128, 3)
    allowed = allowed[:, :, : q.shape[2], : k.shape[2]]
    scores = (q.double() @ k.double().mT * q.shape[3] ** -0.5).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v.double(), scores.logsumexp(-1)


@pytest.mark.parametrize("mode", HALVES)
@pytest.mark.parametrize("keys", [300, 256])
def test_a_block_mask_skips_keys_and_empty_rows_are_zero(mode: str, keys: int) -> None:
    q, k, v = sample(300, keys)
    prepare_mode, attend = HALVES[mode]
    prepared = prepare_mode(q, k, v, with_lse=True)
    mask = torch.ones(1, 2, 3, -(-keys // 128), dtype=torch.bool)
    mask[:, 0, 0, 0] = mask[:, 0, 1, -1] = mask[:, 1, 0, 1:] = False
    mask[:, 1, 2] = False
    out, lse = attend(prepared, block_mask=mask, return_lse=True)
    expected, expected_lse = masked_reference(q, k, v, mask)
    assert not out[:, 1, 256:].any()
    assert relative_error(out, expected) < MASKED[mode][0]
    torch.testing.assert_close(lse.double(), expected_lse, atol=MASKED[mode][1], rtol=1e-3)
    everything = attend(prepared, block_mask=torch.ones_like(mask[:, :1]))
    assert torch.equal(everything, attend(prepared))


def test_skipped_blocks_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = sample(130, 390, heads=1, key_heads=1)
    mask = torch.tensor([[True, False, True, False], [False, True, False, True]])[None, None]
    prepared = int8_attention.prepare_sageattn(q, k, v)
    expected = int8_attention.attend(prepared, block_mask=mask)
    poisoned = v.clone()
    poisoned[:, :, 128:256] = torch.nan
    prepared = int8_attention.prepare_sageattn(q, k, poisoned)
    out = int8_attention.attend(prepared, block_mask=mask)
    assert torch.equal(out[:, :, :128], expected[:, :, :128])
    assert out[:, :, 128:].isnan().all()


@pytest.mark.parametrize("mode", HALVES)
def test_the_mean_of_k_may_come_from_several_parts(mode: str) -> None:
    """Two devices that each hold half of the keys merge to what one would compute."""
    q, k, v = sample(40, 256, heads=1, key_heads=1)
    prepare_mode, attend = HALVES[mode]
    parts = [(k[:, :, half], v[:, :, half]) for half in (slice(0, 128), slice(128, 256))]
    sums, counts = zip(*(sequence.sum_and_count(part) for part, _ in parts), strict=True)
    k_mean = sum(sums) / sum(counts)
    torch.testing.assert_close(k_mean, sequence.mean(k))
    halves = [
        attend(prepare_mode(q, key, value, k_mean=k_mean, with_lse=True), return_lse=True)
        for key, value in parts
    ]
    weights = torch.stack([lse for _, lse in halves]).softmax(0)
    merged = sum(w[..., None] * out.float() for w, (out, _) in zip(weights, halves, strict=True))
    whole = attend(prepare_mode(q, k, v))
    exact = mode in ("sageattn", "sageattn_3")
    assert relative_error(merged, whole) < (2e-3 if exact else ROUNDING[mode] / 2)
    other = attend(prepare_mode(q, k, v, k_mean=k_mean + 1))
    assert relative_error(other, attention_with_lse(q, k, v)[0]) < MASKED[mode][0]


def test_what_a_mask_may_not_be_is_refused() -> None:
    q, k, v = sample(130, 390, heads=1, key_heads=1)
    prepared = int8_attention.prepare_sageattn(q, k, v)
    for wrong in (torch.ones(1, 1, 2, 3, dtype=torch.bool), torch.ones(1, 1, 2, 4)):
        with pytest.raises(ShapeError, match=r"give \[1 or 1, 1 or 1, 2, 4\] bool"):
            int8_attention.attend(prepared, block_mask=wrong)
    with pytest.raises(ShapeError, match="with_lse"):
        int8_attention.attend(prepared, return_lse=True)


def test_scales_of_fewer_rows_than_a_block_has_are_refused() -> None:
    q, k, v = sample(130, 390, heads=1, key_heads=1)
    rows = query_key.plain(q, k, None, query_key.Grain(), k_mean=None, with_lse=False)
    with pytest.raises(ShapeError, match=r"64 queries and 64 keys .* for 128 and 64"):
        int8_attention.attend(query_key.whole(q, k, rows, v))


def off_by_one(prepared: Any) -> Any:
    """The last block of keys ends one key early."""
    return replace(prepared, keys=prepared.keys - 1)


def wrong_scale(prepared: Any) -> Any:
    return replace(prepared, k=replace(prepared.k, scale=prepared.k.scale * 1.25))


def wrong_values(prepared: Any) -> Any:
    """A scale of V is wrong, or V itself where it has none."""
    v = prepared.v
    if isinstance(v, Tensor):
        return replace(prepared, v=v * 1.05)
    return replace(prepared, v=replace(v, scale=v.scale * 1.05))


@pytest.mark.parametrize("mode", HALVES)
@pytest.mark.parametrize("fault", [off_by_one, wrong_scale, wrong_values])
def test_a_planted_fault_is_caught(mode: str, fault: Callable[[Any], Any]) -> None:
    """Each leaves the emulation by far more than the bound that the right kernel keeps."""
    q, k, v = sample(20, 90, heads=1, key_heads=1)
    q = 0.2 * q  # every key counts
    prepare_mode, attend = HALVES[mode]
    prepared, expected = prepare_mode(q, k, v), getattr(emulation, mode)(q, k, v)
    assert relative_error(attend(prepared), expected) < KERNEL_ERROR
    assert relative_error(attend(fault(prepared)), expected) > 10 * KERNEL_ERROR


@pytest.mark.parametrize("module", [fp8_attention, fp4_attention])
def test_probabilities_that_saturate_are_caught(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P scaled to twice what its format holds: its largest values are cut off."""
    q, k, v = sample(20, 90, heads=1, key_heads=1)
    mode = module.__name__.rpartition(".")[2].replace("fp", "sageattn_3_fp").partition("_atten")[0]
    expected = getattr(emulation, mode)(q, k, v)
    monkeypatch.setattr(module, "_LOG2_P_MAX", tl.constexpr(module._LOG2_P_MAX.value + 1))
    assert relative_error(MODES[mode](q, k, v), expected) > 10 * KERNEL_ERROR


def test_nvfp4_is_the_formats_bit_for_bit() -> None:
    """Quantised and unpacked again at every scale: values, ties and subnormals are the same."""
    _, k, _ = sample(1, 200, heads=1, key_heads=1)
    k = k * torch.logspace(-9, 2, 200, base=2.0).half()[:, None]
    rows = prepare_fp4.fp4_keys(k, sequence.mean(torch.zeros_like(k)))
    low, high = rows.data & 15, rows.data >> 4
    codes = torch.stack((low, high), -1).flatten(-2).long()
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = sizes[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    scales = rows.scales.view(torch.float8_e4m3fn).float().repeat_interleave(16, -1)
    whole = rows.scale.repeat_interleave(128, -1)[..., None]
    assert torch.equal((values * scales * whole)[:, :, :200], formats.nvfp4_rows(k).value())
    assert not values[:, :, 200:].any()


def test_columns_of_v_in_nvfp4_run_along_the_keys() -> None:
    _, _, v = sample(1, 75, heads=1, key_heads=1)
    columns = prepare_fp4.fp4_columns(v)
    codes = torch.stack((columns.data & 15, columns.data >> 4), -1).flatten(-2).long()
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = sizes[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    together = columns.scales.view(torch.float8_e4m3fn).float()
    scales = together.transpose(2, 3).flatten(-2).repeat_interleave(16, -1)
    found = (values * scales * columns.scale[..., None]).mT
    assert torch.equal(found[:, :, :75], emulation._nvfp4_columns(v))


def test_fp4_in_several_launches_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = sample(300, 70)
    prepared = fp4_attention.prepare_sageattn_3_fp4(q, k, v)
    whole = fp4_attention.attend(prepared)
    monkeypatch.setattr(fp4_attention, "_blocks_at_a_time", lambda _: 1)
    assert torch.equal(fp4_attention.attend(prepared), whole)


def test_weights_that_fall_by_far_more_than_float32_holds_stay_right() -> None:
    """A first key far above all others: the reference of later steps stays within its headroom."""
    q, k, v = sample(20, 300, heads=1, key_heads=1)
    k = k - k.mean(2, keepdim=True)
    k[:, :, 3] = 40 * q.mean(2)
    out, lse = fp4_attention.sageattn_3_fp4(q.abs(), k, v, return_lse=True)
    same, same_lse = emulation.sageattn_3_fp4(q.abs(), k, v, return_lse=True)
    assert relative_error(out, same) < KERNEL_ERROR
    torch.testing.assert_close(lse, same_lse, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_programs_call_the_operators_without_a_break(mode: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = MODES[mode](q, k, v, return_lse=True)
        return out + MODES[mode](q, k, v), lse

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for keys in (60, 70):  # the second compiles for any length
        q, k, v = sample(20, keys, heads=1, key_heads=1)
        out, lse = compiled(q, k, v)
        expected, expected_lse = program(q, k, v)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("mode", MODES)
def test_operators_are_what_they_declare(mode: str) -> None:
    """Their fake forms have the shape, dtype and strides of the true ones; no input changes."""
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in sample(20, 70)]
    for name in (mode, f"{mode}_with_lse"):
        operator = getattr(torch.ops.sagewan, name)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, (*inputs, None), test_utils=tests)


@pytest.mark.parametrize("mode", MODES)
def test_random_problems_are_right(mode: str) -> None:
    """A few of those that ``benchmarks/prove.py`` runs by the thousand on a GPU."""
    row = row_named(f"sagewan.{mode}")
    wrong = [one for one in prove(row, range(1, 10), "cpu", small=True) if one.wrong]
    assert not wrong, wrong


@pytest.mark.parametrize("fault", ["scale", "last key"])
def test_random_problems_show_a_planted_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = int8_attention.attend

    def wrong(prepared: Any, **options: Any) -> Any:
        if fault == "scale":
            prepared = replace(prepared, v=1.1 * prepared.v)
        elif prepared.keys > 1:
            prepared = replace(prepared, keys=prepared.keys - 1)
        return right(prepared, **options)

    def faulty(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        with_lse = options.get("return_lse", False)
        scale = options.get("scale")
        prepared = int8_attention.prepare_sageattn_3(q, k, v, scale=scale, with_lse=with_lse)
        return wrong(prepared, return_lse=with_lse)

    monkeypatch.setattr(int8_attention, "sageattn_3", faulty)
    row = row_named("sagewan.sageattn_3")
    assert any(one.wrong for one in prove(row, range(1, 6), "cpu", small=True))


@pytest.mark.parametrize("keys", [64, 130])
def test_sums_in_float16_do_not_overflow(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As consumer cards add P·V: every probability and every value at its largest."""
    monkeypatch.setattr(fp8_attention, "compute_capability", lambda _: 89)
    q, k, _ = sample(5, keys, heads=1, key_heads=1)
    v = torch.full_like(k, 60000.0)
    v[..., ::2] *= -1
    out = fp8_attention.sageattn_3_fp8(q, k[:, :, :1].expand_as(k), v)
    assert relative_error(out, v[:, :, :5].double()) < 0.01
    # One step of scaling more, and they do: the test can fail.
    monkeypatch.setattr(fp8_attention, "HALF_SUM_V_MAX", 3.5)
    with np.errstate(over="ignore", invalid="ignore"):
        out = fp8_attention.sageattn_3_fp8(q, k[:, :, :1].expand_as(k), v)
    assert not out.isfinite().all()
