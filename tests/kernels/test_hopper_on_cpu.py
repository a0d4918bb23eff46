"""What the Hopper kernel computes, by its own source on a CPU: everything but what is asynchronous
on a GPU."""

import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sagewan.kernels.hopper_attention import output_scale
from sagewan.reference import emulation
from sagewan.reference.attention import attention, attention_with_lse, relative_error
from tests.kernels.hopper_on_cpu import attend, prepare

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux"
)
ORDER = {
    "sageattn_3": {"rows_per_scale": 64, "keys_per_scale": 64},
    "sageattn_3_fp8": {
        "rows_per_scale": 64,
        "keys_per_scale": 128,
        "rounded_sums": True,
        "own_place": True,
        "headroom": 2,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@cache
def inputs(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """150 queries of two heads, 520 keys of one, in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, 128, generator=generator)

    q, k, v = 1.5 * normal(2, 150) + normal(2, 1), normal(1, 520) + 3 * normal(1, 1), normal(1, 520)
    if kind == "steep":
        # Scores worth so many powers of two each that P is zero but for a row's largest.
        q = 200 * q
    elif kind != "normal":
        # Scores that rise, or fall, from key to key by 80 natural units in all.
        direction = normal(1, 1).sign()
        place = torch.linspace(0, 80, 520)[:, None]
        q, k = direction + 0.1 * normal(2, 150), direction * place / 128**0.5 + 0.3 * normal(1, 520)
        k = k.flip(2) if kind == "falling" else k
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


@pytest.mark.parametrize("kind", ["normal", "rising", "falling", "steep"])
@pytest.mark.parametrize("mode", ["sageattn_3", "sageattn_3_fp8"])
def test_it_is_the_emulation_of_its_formats(mode: str, kind: str, folder: Path) -> None:
    q, k, v = inputs(kind)
    out, lse = attend(prepare(mode, q, k, v), folder, return_lse=True)
    expected, expected_lse = attention_with_lse(q, k, v)
    emulated = getattr(emulation, mode)
    same, same_lse = emulated(q, k, v, block_m=64, block_n=128, **ORDER[mode], return_lse=True)
    # The output's rounding to bfloat16, twice.
    assert relative_error(out, same) < 0.004
    assert relative_error(out, expected) < 1.1 * relative_error(same, expected)
    assert relative_error(lse, same_lse) < 2e-3
    assert relative_error(lse, expected_lse) < 1e-3 + relative_error(same_lse, expected_lse)


@pytest.mark.parametrize("kind", ["normal", "rising"])
def test_in_fp8_too_64_keys_may_share_a_scale(kind: str, folder: Path) -> None:
    # As where normalised and rotated projections are prepared in one pass.
    q, k, v = inputs(kind)
    out = attend(prepare("sageattn_3_fp8", q, k, v, keys_per_scale=64), folder)
    order = ORDER["sageattn_3_fp8"] | {"keys_per_scale": 64}
    same = emulation.sageattn_3_fp8(q, k, v, block_m=64, block_n=128, **order)
    assert relative_error(out, same) < 0.004
    assert relative_error(out, attention(q, k, v)) < 1.1 * relative_error(same, attention(q, k, v))


def test_its_output_in_fp8_is_the_one_in_16_bit_rounded(folder: Path) -> None:
    prepared = prepare("sageattn_3_fp8", *inputs("normal"))
    exact = attend(prepared, folder).float()
    rows = torch.empty(1, 150, 2 * 128).to(torch.float8_e4m3fn)
    narrow = rows.view(1, 150, 2, 128).transpose(1, 2)
    attend(prepared, folder, out=narrow)
    found = narrow.float() * output_scale(prepared)
    assert 0.01 < relative_error(found, exact) < 0.03


def test_blocks_of_keys_are_left_out(folder: Path) -> None:
    q, k, v = inputs("normal")
    mask = torch.tensor([[[True, False, True, False, True], [False, True, True, False, False]]])
    prepared = prepare("sageattn_3", q, k, v)
    out = attend(prepared, folder, block_mask=mask.unsqueeze(0))
    assert relative_error(out, attention(q, k, v, block_mask=mask.unsqueeze(0))) < 0.03
    assert not attend(prepared, folder, block_mask=torch.zeros_like(mask).unsqueeze(0)).any()
    few = prepare("sageattn_3", q[:, :, :100], k[:, :, :100], v[:, :, :100])
    assert not attend(few, folder, block_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool)).any()


def compute_everything(text: str) -> str:
    found = "int look_at = FP8 ? 0 : visit.steps"
    assert found in text
    return text.replace(found, "int look_at = visit.steps")


def leave_out_everything(text: str) -> str:
    found = "bool nothing = is_nothing(most, x);"
    assert found in text
    return text.replace(found, "bool nothing = is_nothing(most, x) || step > 1;")


def test_where_p_is_zero_nothing_is_lost(folder: Path) -> None:
    # With scores that fall, only the first steps count.
    prepared = prepare("sageattn_3_fp8", *inputs("falling"))
    out, whole, first = (
        attend(prepared, folder, edit=edit)
        for edit in (None, compute_everything, leave_out_everything)
    )
    assert torch.equal(out, whole)
    # The second block of queries begins with the second block of keys, and reaches the first last.
    assert torch.equal(first[:, :, :128], whole[:, :, :128])
    assert not relative_error(first[:, :, 128:], whole[:, :, 128:]) < 0.5


def forget_what_was_subtracted(text: str) -> str:
    found = "sums[i] *= rescale[i / 2 % 2];"
    assert found in text
    return text.replace(found, "sums[i] *= 1.0f;")


def test_a_planted_fault_is_seen(folder: Path) -> None:
    q, k, v = inputs("rising")
    out = attend(prepare("sageattn_3", q, k, v), folder, edit=forget_what_was_subtracted)
    assert not relative_error(out, attention(q, k, v)) < 0.1
