"""The budget: the sums hold together, and the decisions follow from them."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagewan.plan.budget.stage import CONTEXT, WORKSPACE
from sagewan.plan.budget.text import UMT5_BLOCKS
from sagewan.plan.budget.transformer import (
    Chunks,
    Weights,
    activations,
    block_parameters,
    usual_chunks,
)
from sagewan.plan.budget.vae import tile_sizes
from sagewan.plan.evidence import Evidence, Shortage
from sagewan.plan.hardware import GIB
from sagewan.plan.layers import weight_shapes
from sagewan.plan.models import PUBLISHED
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.pretend import pretend
from sagewan.plan.request import Request
from sagewan.plan.speed import RATES, card_of, estimated_seconds
from tests.machines import machine

T2V = PUBLISHED["wan2.1-t2v-14b"]


def plan(
    model: str = "wan2.1-t2v-14b",
    *,
    vram: float | None = 12,
    gpu: str | None = None,
    ram: float | None = 32,
    evidence: Evidence | None = None,
    **fields: Any,
) -> Plan:
    hardware = pretend(machine(), gpu=gpu, vram=vram, ram=ram)
    request = Request(prompt="x", **fields)
    return make_plan(request, PUBLISHED[model], hardware, evidence or Evidence())


@pytest.mark.parametrize("name", PUBLISHED)
def test_blocks_and_what_is_around_them_are_all_parameters(name: str) -> None:
    model = PUBLISHED[name]
    around = model.parameters - model.layers * block_parameters(model)
    assert 0 < around < 0.06 * model.parameters
    # The table of every weight agrees, but for biases.
    in_blocks = sum(
        prod(shape)
        for weight, shape in weight_shapes(model).items()
        if weight.startswith("blocks.")
    )
    assert 0 <= model.layers * block_parameters(model) - in_blocks < 0.001 * model.parameters


@settings(max_examples=60)
@given(
    st.sampled_from(["wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b"]),
    st.sampled_from([6, 8, 12, 16, 24, 48, 80]),
    st.sampled_from([(832, 480), (1280, 704), (1920, 1088)]),
    st.sampled_from([17, 81, 121]),
    st.sampled_from(["none", "fp8_scaled", "fp4_scaled"]),
)
def test_a_plan_fits_or_says_so(
    name: str, vram: float, size: tuple[int, int], frames: int, quantization: str
) -> None:
    image = {"image": "a.png"} if "i2v-a" in name else {}
    found = plan(name, vram=vram, size=size, frames=frames, quantization=quantization, **image)
    memory = found.memory
    said = any("will not fit" in note for note in found.notes)
    assert memory.fits != said
    assert memory.room <= vram * GIB - GIB // 2
    assert memory.device_peak == max(stage.device for stage in memory.stages)
    if memory.fits:
        assert all(stage.device <= memory.room for stage in memory.stages)
    assert 0 <= memory.block_swap <= found.model.layers


@settings(max_examples=30)
@given(st.sampled_from(["none", "fp8_scaled", "fp4_scaled"]), st.sampled_from([17, 49, 81]))
def test_more_memory_never_swaps_more(quantization: str, frames: int) -> None:
    swaps = [
        plan(vram=vram, quantization=quantization, frames=frames).memory.block_swap
        for vram in (6, 8, 10, 12, 16, 24, 32, 48, 80)
    ]
    assert swaps == sorted(swaps, reverse=True)
    assert swaps[-1] == 0


def test_no_more_is_swapped_than_is_needed() -> None:
    found = plan(vram=12, quantization="fp8_scaled").memory
    assert 3 <= found.block_swap < 40
    denoise = next(stage for stage in found.stages if stage.name == "denoise")
    weights = Weights.of(T2V, plan(quantization="fp8_scaled").weights.bytes, 2)
    assert denoise.device + weights.block > found.room


def test_what_is_asked_for_is_the_least_that_is_swapped() -> None:
    assert plan(vram=80, quantization="fp8_scaled", block_swap=20).memory.block_swap == 20
    assert plan(vram=80, quantization="fp8_scaled", block_swap=500).memory.block_swap == 40
    found = plan(vram=12, quantization="fp8_scaled", block_swap=4)
    assert found.memory.block_swap > 4
    assert any("not 4" in note for note in found.notes)


def test_on_a_cpu_nothing_is_swapped_and_it_is_said() -> None:
    request = Request(prompt="x", block_swap=4)
    found = make_plan(request, PUBLISHED["wan2.1-t2v-1.3b"], machine(), Evidence())
    assert found.memory.block_swap == 0
    assert any("changes nothing on a CPU" in note for note in found.notes)


def test_half_of_a_windows_machine_s_memory_is_not_pinned() -> None:
    hardware = replace(pretend(machine(), gpu=None, vram=8, ram=16), system="Windows")
    request = Request(prompt="x", quantization="none")
    found = make_plan(request, T2V, hardware, Evidence()).memory
    assert found.pinned <= 0.45 * 16 * GIB
    denoise = next(stage for stage in found.stages if stage.name == "denoise")
    transformer = denoise.items[0]
    # What is not pinned stays in the pages of its files.
    assert transformer.host + transformer.mapped > 20 * GIB
    assert transformer.host == transformer.pinned


def test_weights_that_are_made_anew_are_whole_on_the_host_and_it_is_said() -> None:
    """Files of float32, as Wan 2.1's and A14B's own are, can't be used in their pages."""
    request = Request(prompt="x", quantization="none", size=(832, 480))
    found = {}
    for dtype in ("bfloat16", "float32"):
        model = replace(T2V, dtypes={"transformer": dtype, "text_encoder": dtype})
        for ram in (24, 48):
            hardware = pretend(machine(), gpu=None, vram=48, ram=ram)
            found[dtype, ram] = make_plan(request, model, hardware, Evidence())
    text, denoise = (
        [next(s for s in plan.memory.stages if s.name == name) for plan in found.values()]
        for name in ("text", "denoise")
    )
    assert text[2].host - text[0].host == text[0].items[0].mapped > 10 * GIB
    assert denoise[2].host - denoise[0].host == found["float32", 24].weights.bytes > 26 * GIB
    assert [plan.memory.fits for plan in found.values()] == [True, True, False, True]
    note = next(note for note in found["float32", 24].notes if "host memory" in note)
    assert "--quantization fp8_scaled would fit" in note
    # What is advised helps; what is quantised while loading was never in the file's pages.
    model = replace(T2V, dtypes={"transformer": "float32", "text_encoder": "float32"})
    hardware = pretend(machine(), gpu=None, vram=48, ram=24)
    eight = replace(request, quantization="fp8_scaled")
    assert make_plan(eight, model, hardware, Evidence()).memory.fits
    # A file of 8 bits stays where it is, but not its 16-bit copy.
    stored = replace(T2V, quantized="float8_e4m3fn", dtypes={"transformer": "float8_e4m3fn"})
    hosts = [
        make_plan(replace(request, quantization=x), stored, hardware, Evidence()).memory.host_peak
        for x in ("fp8_scaled", "none")
    ]
    assert hosts[0] < 3 * GIB < 26 * GIB < hosts[1]


def test_a_card_that_is_too_small_for_the_text_gets_no_advice_that_would_not_help() -> None:
    note = next(note for note in plan(vram=4, ram=64).notes if "will not fit" in note)
    assert "larger card" in note
    assert "--frames" not in note
    assert "fp4_scaled" not in note


@pytest.mark.parametrize(("asked", "said"), [(None, False), (1, True), (2, True), (3, False)])
def test_swapping_one_or_two_blocks_is_said_to_save_nothing(asked: int | None, said: bool) -> None:
    notes = plan("wan2.1-t2v-1.3b", vram=32, block_swap=asked).notes
    assert any("saves nothing" in note for note in notes) == said


def test_on_a_cpu_the_text_encoder_is_counted_in_float32() -> None:
    hardware = pretend(machine(), gpu=None, vram=None, ram=16)
    request = Request(prompt="x", size=(416, 240), frames=17)
    found = make_plan(request, PUBLISHED["wan2.1-t2v-1.3b"], hardware, Evidence())
    assert found.memory.stages[0].host > 20 * GIB
    assert any("--dtype bfloat16" in note for note in found.notes)
    less = replace(request, dtype="bfloat16")
    model = PUBLISHED["wan2.1-t2v-1.3b"]
    assert make_plan(less, model, hardware, Evidence()).memory.fits


@pytest.mark.parametrize("stage", ["text", "picture", "denoise", "decode"])
def test_after_a_shortage_the_next_plan_takes_less(stage: str) -> None:
    model, image = "wan2.2-i2v-a14b", {"image": "a.png"}
    before = plan(model, vram=24, quantization="fp4_scaled", **image).memory
    for _ in range(3):
        tile = before.encode_tile if stage == "picture" else before.decode_tile
        short = Shortage(stage=stage, block_swap=before.block_swap, tile=tile, what="no memory")
        after = plan(
            model,
            vram=24,
            quantization="fp4_scaled",
            evidence=Evidence(shortages=(short,)),
            **image,
        ).memory
        if stage == "denoise":
            assert after.block_swap > before.block_swap or before.block_swap == 40
            assert (after.chunks.tokens or 0) <= (before.chunks.tokens or 0)
        elif stage == "text":
            assert after.text_swap == UMT5_BLOCKS
        else:
            new = after.encode_tile if stage == "picture" else after.decode_tile
            assert new is not None
            assert tile is None or prod(new) < prod(tile)
        before = after


def test_the_run_that_was_measured_is_planned_as_it_went() -> None:
    """14B in fp8 at 832x480x81 on an H100 made to look like 12 GB (docs/measured.md)."""
    found = plan(quantization="fp8_scaled", size=(832, 480), frames=81, attention="sdpa")
    memory = found.memory
    stages = {stage.name: stage for stage in memory.stages}
    # Whole, it ran out.
    assert memory.text_swap > 0
    # In bfloat16 the VAE decoded it whole in 5.41 GiB, with what the allocator can't use, and 720p,
    # where that is the largest share, in 13.94.
    assert memory.decode_tile is None
    large = plan(vram=24, quantization="fp8_scaled", size=(1280, 720), frames=81).memory
    assert large.decode_tile is None
    for found_, taken in ((memory, 5.41), (large, 13.94)):
        decode = next(stage for stage in found_.stages if stage.name == "decode")
        own = sum(item.device for item in decode.items if item.name != "waiting transformer")
        assert 1.0 <= (own - CONTEXT - WORKSPACE) / GIB / taken < 1.2
    # With 21 blocks swapped, denoising took 9.86 GiB of the device and pinned 6.881 of the host.
    more = plan(quantization="fp8_scaled", size=(832, 480), attention="sdpa", block_swap=21)
    denoise = next(stage for stage in more.memory.stages if stage.name == "denoise")
    assert 1.0 <= denoise.device / GIB / 9.86 < 1.1
    assert abs(denoise.pinned / GIB / 6.881 - 1) < 0.05
    # The text encoder's blocks pass through two buffers, and so do all weights on their way; no
    # more of the host is pinned for them.
    copies = 2 * 32 * 2**20
    assert stages["text"].pinned == memory.text_pin_budget + copies < GIB
    # Four pieces of four frames are on their way from the VAE, each in a power of two.
    assert stages["decode"].pinned == copies + 4 * 8 * 2**20
    assert all(stage.host >= stage.pinned >= copies for stage in memory.stages)


@given(st.integers(6, 150), st.integers(6, 250))
def test_tiles_come_largest_first_and_the_first_is_everything(rows: int, columns: int) -> None:
    sizes = tile_sizes((rows, columns))
    assert sizes[0] == (rows, columns)
    areas = [prod(size) for size in sizes]
    assert areas == sorted(areas, reverse=True)


def test_activations_at_480p_and_720p_stay_below_what_was_promised() -> None:
    for tokens, limit in ((32_760, 1.5), (75_600, 3.3)):
        chunks = usual_chunks(T2V, tokens)
        assert activations(T2V, tokens, 2, chunks, quantised=False) <= limit * GIB


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", "rtx-4060-ti"),
        ("NVIDIA GeForce RTX 4060", "rtx-4060"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4070 SUPER", "rtx-4070"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_card_is_known_by_the_name_its_driver_has(found: str, name: str | None) -> None:
    device = replace(machine("H100").devices[0], name=found)
    assert card_of(device) == name


def test_minutes_grow_with_steps_and_length_and_shrink_with_the_card() -> None:
    def seconds(**changes: Any) -> float:
        settings_ = {"gpu": "rtx-4090", "vram": None, "quantization": "fp8_scaled", **changes}
        found = estimated_seconds(plan(**settings_))
        assert found is not None
        return found

    assert seconds(steps=40) > 1.8 * seconds(steps=20)
    assert seconds(frames=81) > 4 * seconds(frames=21)
    assert seconds(gpu="rtx-4060") > 2 * seconds()
    assert seconds(cfg=1.0) < 0.6 * seconds()
    assert set(RATES) >= {"rtx-3060", "h100"}


def test_chunks_are_for_long_sequences() -> None:
    assert usual_chunks(T2V, 1000) == Chunks(None, None)
    assert usual_chunks(T2V, 75_600) == Chunks(4096, 8)


def test_what_only_saves_time_is_kept_where_all_blocks_are() -> None:
    large = plan(vram=80, quantization="fp8_scaled", size=(832, 480)).memory
    assert large.block_swap == 0
    assert large.chunks == Chunks(16384, None)
    # 40 layers, 512 tokens, K and V, 5120 features, 2 bytes; for the prompt and the negative one.
    assert large.text_keys == 2 * 40 * 512 * 2 * 5120 * 2
    (denoise,) = (stage for stage in large.stages if stage.name == "denoise")
    assert large.text_keys in {item.device for item in denoise.items}
    assert plan(vram=80, cfg=1.0).memory.text_keys == large.text_keys // 2
    small = plan(vram=12, quantization="fp8_scaled", size=(832, 480)).memory
    assert small.block_swap > 0
    assert small.text_keys == 0
    assert small.chunks.tokens == 2048
    evidence = Evidence().with_shortage(
        Shortage(stage="denoise", block_swap=0, tile=None, what="out of memory")
    )
    assert plan(vram=80, evidence=evidence).memory.text_keys == 0


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.2-ti2v-5b"])
@pytest.mark.parametrize("vram", [8, 12, 16])
def test_where_segments_grow_decoding_takes_less(name: str, vram: int) -> None:
    request = Request(prompt="x", size=(1280, 704), quantization="fp8_scaled")
    found = {}
    for grow in (False, True):
        hardware = pretend(machine(), gpu=None, vram=vram, ram=32)
        hardware = replace(hardware, segments_grow=grow)
        found[grow] = make_plan(request, PUBLISHED[name], hardware, Evidence()).memory
    tiles = {grow: prod(memory.decode_tile or (44, 80)) for grow, memory in found.items()}
    assert tiles[True] >= tiles[False]
    if tiles[True] == tiles[False]:
        decode = [next(s for s in found[g].stages if s.name == "decode") for g in (False, True)]
        assert decode[1].device < decode[0].device
    # Denoising keeps what it has.
    assert found[True].block_swap == found[False].block_swap
    assert [memory.segments_grow for memory in found.values()] == [False, True]


@pytest.mark.parametrize(("dtype", "anew"), [("bfloat16", True), ("float32", False)])
def test_a_decoder_that_is_made_anew_passes_through_the_host(dtype: str, anew: bool) -> None:
    """Its files hold float32: in that it stays in their pages until it is on the card."""
    found = plan("wan2.2-ti2v-5b", vram=48, ram=64, dtype=dtype, size=(1280, 704)).memory
    decode = next(stage for stage in found.stages if stage.name == "decode")
    vae = next(item for item in decode.items if item.name == "VAE")
    assert vae.device > GIB
    assert vae.host == (vae.device if anew else 0)
