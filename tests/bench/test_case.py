"""What is measured, and the least its arithmetic takes."""

import pytest

from sagewan.bench import floor
from sagewan.bench.case import TINY, case_of, model_of
from sagewan.bench.floor import Arithmetic
from sagewan.bench.growth import fitted
from sagewan.bench.stages import ATTENTION, OTHER, PREPARATION, PRODUCTS, by_stage, stage_of
from sagewan.errors import RequestError
from sagewan.plan.speed import RATES, Rate


@pytest.mark.parametrize(
    ("model", "size", "frames", "tokens"),
    [
        ("14b", "480p", 81, 32_760),
        ("14b", "720p", 81, 75_600),
        ("1.3b", "832x480", 1, 1_560),
        ("5b", "720p", 121, 31 * 23 * 40),  # on its grid of 32 pixels, 720 rows become 736
    ],
)
def test_the_tokens_are_those_of_a_run(model: str, size: str, frames: int, tokens: int) -> None:
    assert case_of(model_of(model), size, frames).tokens == tokens


@pytest.mark.parametrize("tokens", [8_000, 64_000, 250_000])
def test_wanted_tokens_are_met_by_whole_frames(tokens: int) -> None:
    case = case_of(model_of("14b"), "480p", 81, tokens)
    assert abs(case.tokens - tokens) <= 1560 / 2
    assert case.tokens % 1560 == 0


@pytest.mark.parametrize(("size", "frames"), [("480p", 80), ("0x480", 81), ("wide", 81)])
def test_what_there_is_not_is_refused(size: str, frames: int) -> None:
    with pytest.raises(RequestError):
        case_of(TINY, size, frames)
    with pytest.raises(RequestError, match="did you mean"):
        model_of("wan2.1-t2v-14")


def test_the_floor_of_wan_14b_is_the_one_computed_by_hand() -> None:
    case = case_of(model_of("14b"), "480p", 81)
    n, w, f = 32_760, 5120, 13824
    products = 2 * n * (6 * w * w + 2 * w * f) + 2 * 512 * 2 * w * w
    attention = 4 * n * (n + 512) * w
    assert floor.products(case, Arithmetic()).operations == products
    later = floor.products(case, Arithmetic(), keeps_text=True)
    assert later.operations == products - 2 * 512 * 2 * w * w
    assert floor.attention(case).operations == attention
    same = Rate(bits16=1000, fp8=1000, fp4=1000, int8=1000, bandwidth=3)
    for arithmetic in (Arithmetic(), Arithmetic(products=8, scores=8, values=4)):
        found = floor.floor_ms(case, arithmetic, same)
        assert found == pytest.approx((products + attention) / 1e12, rel=1e-9)
        kept = floor.floor_ms(case, arithmetic, same, keeps_text=True)
        assert found - kept == pytest.approx(2 * 512 * 2 * w * w / 1e12, rel=1e-6)


def test_fewer_bits_lower_the_floor_where_the_card_has_them() -> None:
    case = case_of(model_of("14b"), "480p", 81)
    low, plain = Arithmetic(products=8, scores=8, values=8), Arithmetic()
    faster = floor.floor_ms(case, plain, RATES["h100"]) / floor.floor_ms(case, low, RATES["h100"])
    assert 1.95 < faster < 2, "all but the text's keys and values"
    four = Arithmetic(products=4, scores=4, values=4)
    assert floor.floor_ms(case, four, RATES["h100"]) == floor.floor_ms(case, low, RATES["h100"])
    assert floor.floor_ms(case, four, RATES["b200"]) < floor.floor_ms(case, low, RATES["b200"])
    assert floor.products(case, low).bytes < floor.products(case, plain).bytes


@pytest.mark.parametrize(
    ("kernel", "stage"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6", ATTENTION),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128>>", ATTENTION),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90", ATTENTION),
        ("attention", ATTENTION),
        ("_int8_attention_kernel", ATTENTION),
        ("_int8_rows_kernel", PREPARATION),
        ("_e4m3_columns_kernel", PREPARATION),
        ("_reduce_kernel", PREPARATION),
        ("_quantize_rows_kernel", PREPARATION),
        ("_unpack_kernel", PREPARATION),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNT", PRODUCTS),
        ("product", PRODUCTS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", PRODUCTS),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x", PRODUCTS),
        ("triton_poi_fused__scaled_dot_product_attention_add_mul_4", OTHER),
        ("void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl", OTHER),
        ("Memcpy DtoD (Device -> Device)", OTHER),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel: str, stage: str) -> None:
    assert stage_of(kernel) == stage


def test_no_time_is_lost_between_the_stages() -> None:
    found = by_stage([("nvjet", 2.0), ("attention", 3.0), ("copy", 1.0), ("copy", 0.5)])
    assert found == {ATTENTION: 3.0, PREPARATION: 0.0, PRODUCTS: 2.0, OTHER: 1.5}


def test_the_model_of_growth_finds_what_made_the_points() -> None:
    tokens = (8_000, 32_000, 250_000)
    found = fitted("exact", [(n, 2e-5 * n + 3e-10 * n * n) for n in tokens])
    assert (found.linear, found.quadratic) == pytest.approx((2e-5, 3e-10), rel=1e-6)
    assert found.worst < 1e-6
    cliff = fitted("cliff", [(8_000, 0.2), (32_000, 0.8), (64_000, 8.0)])
    assert cliff.worst > 0.2


@pytest.mark.parametrize(
    "points",
    [
        [(10, 1.0)],
        [(10, 1.0), (20, 1.1)],
        [(10, 1.0), (20, 9.0)],
        # One picture of so many tokens is what comes nearest to all of three counts.
        [(3600, 0.744040198074901), (3600, 0.7176778970520505), (3600, 0.6488790235495333)],
    ],
)
def test_no_part_of_the_model_is_negative(points: list[tuple[int, float]]) -> None:
    found = fitted("noise", points)
    assert found.linear >= 0
    assert found.quadratic >= 0
