"""Every kernel compiles for every architecture its row claims, to the instructions it promises.

What is compiled is what the launchers launch, configuration and all; no GPU is needed. The version
of Triton is the one that is installed: ``make triton-versions`` runs this file with the others.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import triton
from packaging.version import Version

from sagewan.kernels import fp4_attention, fp8_attention, int8_attention
from sagewan.plan.catalogue import row_named
from tests.kernels.ahead import SHARED_MEMORY, Built, Launch, build, record

MODES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sageattn": (int8_attention.prepare_sageattn, int8_attention.attend),
    "sageattn_3": (int8_attention.prepare_sageattn_3, int8_attention.attend),
    "sageattn_3_fp8": (fp8_attention.prepare_sageattn_3_fp8, fp8_attention.attend),
    "sageattn_3_fp4": (fp4_attention.prepare_sageattn_3_fp4, fp4_attention.attend),
}
# One of each family of instructions: 8.0 and 8.6 share theirs, as do 10.0 and 10.3.
SMS = (80, 89, 90, 100, 120)
CELLS = [(mode, sm) for mode in MODES for sm in SMS if sm in row_named(f"sagewan.{mode}").sms]
# Bytes a thread, where registers are capped, in exchange for another block on a multiprocessor.
SPILLED_FOR_A_BLOCK = 512 if Version(triton.__version__) >= Version("3.8") else 128


@cache
def built(
    mode: str, sm: int, *, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> tuple[Built, ...]:
    """Every kernel of a mode, each variant once; the attention itself comes last."""
    q, k, v = (torch.empty(1, 2, n, head_dim, dtype=dtype, device="meta") for n in (333, 457, 457))
    prepare_mode, attend = MODES[mode]

    def run() -> None:
        attend(prepare_mode(q, k, v, with_lse=True), return_lse=True)

    launches = record(sm, run)
    return tuple(compiled(launch, sm) for launch in {key(one): one for one in launches}.values())


@pytest.mark.parametrize("mode", ["sageattn", "sageattn_3_fp8"])
def test_what_is_launched_again_gets_its_arguments_in_the_kernels_order(mode: str) -> None:
    # A launch that is looked up once hands them over by their place.
    q = torch.empty(1, 2, 333, 128, dtype=torch.bfloat16, device="meta")
    launches = record(90, lambda: MODES[mode][0](q, q, q, with_lse=True))
    assert launches
    for launch in launches:
        assert list(launch.arguments) == [one.name for one in launch.kernel.params], launch.name


def key(launch: Launch) -> str:
    kinds = {
        name: value.dtype if isinstance(value, torch.Tensor) else value
        for name, value in launch.arguments.items()
    }
    return f"{launch.name} {kinds} {launch.schedule}"


_KERNELS: dict[tuple[str, int], Built] = {}


def compiled(launch: Launch, sm: int) -> Built:
    """The modes share their preparation: nothing is compiled twice."""
    place = (key(launch), sm)
    if place not in _KERNELS:
        _KERNELS[place] = build(launch, sm)
    return _KERNELS[place]


def is_int8(product: str) -> bool:
    return bool(re.search(r"\.s8\.s8|kind::i8", product))


def is_fp8(product: str) -> bool:
    return bool(re.search(r"e4m3\.e4m3|kind::f8f6f4", product))


def is_nvfp4(product: str) -> bool:
    # Two spellings of a scale for each 16.
    return bool(re.search(r"kind::mxf4nvf4\.block_scale\.(scale_vec::4X|block16)", product))


def fp4_products(attention: Built, sm: int) -> int:
    """How many instructions both products take in a warp, in the loop and in its last step: each
    multiplies 64 values, and in tcgen05 a whole tile of the others."""
    sizes = attention.launch.arguments
    m, n, d = (int(str(sizes[name])) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D"))
    tiles = 1 if sm in (100, 103) else m // 16 // attention.launch.schedule.warps
    columns = (1, 1) if sm in (100, 103) else (n // 8, d // 8)
    return 2 * tiles * (columns[0] * d // 64 + columns[1] * n // 64)


def is_16_bit(product: str) -> bool:
    return bool(re.search(r"\.bf16\.bf16|\.f16\.f16(?!\.e4m3)|kind::f16", product))


def test_the_rows_claim_what_is_compiled_here() -> None:
    for mode in MODES:
        families = {sm // 10 if sm >= 100 else sm for sm in row_named(f"sagewan.{mode}").sms}
        tried = {sm // 10 if sm >= 100 else sm for sm in SMS}
        # 8.6 and 8.7 run the code of 8.0.
        assert families - {86, 87} <= tried


@pytest.mark.parametrize(("mode", "sm"), CELLS)
def test_both_products_use_the_promised_instructions(mode: str, sm: int) -> None:
    *_, attention = built(mode, sm)
    products = attention.products()
    if mode == "sageattn_3_fp4":
        assert all(map(is_nvfp4, products)), products
        assert len(attention.all_products()) == fp4_products(attention, sm)
        return
    assert any(map(is_int8, products)), products
    if mode == "sageattn_3_fp8":
        assert any(map(is_fp8, products)), products
        assert not any(map(is_16_bit, products)), products
    else:
        assert any(map(is_16_bit, products)), products
        assert not any(map(is_fp8, products)), products
    if sm == 90:
        assert all(product.startswith("wgmma") for product in products), products


@pytest.mark.parametrize(("mode", "sm"), CELLS)
def test_kernels_fit_the_hardware_and_spill_next_to_nothing(mode: str, sm: int) -> None:
    for kernel in built(mode, sm):
        assert kernel.shared <= SHARED_MEMORY[86 if sm == 80 else sm], kernel.launch.name
        limit = SPILLED_FOR_A_BLOCK if kernel.launch.schedule.registers else 0
        assert kernel.spilled <= limit, f"{kernel.launch.name}: {kernel.spilled} bytes"


@pytest.mark.parametrize("sm", [89, 120])
def test_fp8_sums_of_a_step_are_float16_on_consumer_cards(sm: int) -> None:
    *_, attention = built("sageattn_3_fp8", sm)
    assert {p for p in attention.products() if is_fp8(p)} == {
        "mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16"
    }
    assert attention.launch.arguments["BLOCK_N"] <= fp8_attention.HALF_SUM_KEYS


def test_sums_of_a_step_stay_within_float16() -> None:
    most = fp8_attention.HALF_SUM_KEYS * fp8_attention.E4M3_MAX * fp8_attention.HALF_SUM_V_MAX
    # However the additions are ordered, each rounds up by 2⁻¹¹ at most.
    assert most * (1 + 2**-11) ** fp8_attention.HALF_SUM_KEYS < torch.finfo(torch.float16).max


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head_dim", [72, 248])
def test_other_head_sizes_fit_a_consumer_card(mode: str, head_dim: int) -> None:
    sm = 120 if mode == "sageattn_3_fp4" else 89
    for kernel in built(mode, sm, head_dim=head_dim, dtype=torch.float16):
        assert kernel.shared <= SHARED_MEMORY[sm], kernel.launch.name


def test_fp4_takes_large_heads_on_datacentre_cards() -> None:
    *_, attention = built("sageattn_3_fp4", 103, head_dim=248)
    assert all(map(is_nvfp4, attention.products()))


@pytest.mark.skipif(Version(triton.__version__) < Version("3.8"), reason="as its row says")
def test_fp4_compiles_for_12_1() -> None:
    *_, attention = built("sageattn_3_fp4", 121)
    assert all(map(is_nvfp4, attention.products()))
    assert attention.shared <= SHARED_MEMORY[121]


@pytest.mark.parametrize("sm", [80, 90])
def test_fp4_is_emulated_in_float16_where_it_must(sm: int) -> None:
    for kernel in built("sageattn_3_fp4", sm):
        assert kernel.shared <= SHARED_MEMORY[86 if sm == 80 else sm], kernel.launch.name
    assert any(map(is_16_bit, kernel.products()))


@pytest.mark.parametrize(
    ("mode", "sm"),
    [("sageattn_3", 89), ("sageattn_3_fp8", 89), ("sageattn_3_fp8", 90), ("sageattn_3_fp4", 120)],
)
def test_the_form_with_a_block_mask_fits_too(mode: str, sm: int) -> None:
    q = torch.empty(1, 2, 300, 128, dtype=torch.bfloat16, device="meta")
    mask = torch.empty(1, 1, 3, 3, dtype=torch.bool, device="meta")
    prepare_mode, attend = MODES[mode]
    launches = record(sm, lambda: attend(prepare_mode(q, q, q), block_mask=mask))
    kernel = compiled(launches[-1], sm)
    assert kernel.launch.arguments["blocks"] is not None
    assert kernel.shared <= SHARED_MEMORY[sm]
    dense = compiled(record(sm, lambda: attend(prepare_mode(q, q, q)))[-1], sm)
    assert bytewise(kernel) == bytewise(dense), "what the list points to is aligned"
    assert kernel.spilled <= (SPILLED_FOR_A_BLOCK if kernel.launch.schedule.registers else 64)


def bytewise(kernel: Built) -> int:
    """Loads of single bytes."""
    return len(re.findall(r"ld\.global\S*\.b8", kernel.ptx))


def test_the_check_of_instructions_can_fail() -> None:
    *_, sixteen_bit = built("sageattn", 90)
    *_, eight_bit = built("sageattn_3_fp8", 90)
    assert any(map(is_16_bit, sixteen_bit.products()))
    assert not any(map(is_16_bit, eight_bit.products()))
    assert is_16_bit("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
    assert not is_16_bit("mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16")
