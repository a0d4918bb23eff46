"""The whole plan from a request: sizes, steps, tasks, and what a model refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagewan.errors import RequestError
from sagewan.plan.evidence import Evidence
from sagewan.plan.models import PUBLISHED, Model
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.request import Ends, Request
from tests.machines import DEMO, WAN_14B, machine


def plan_for(model: Model = WAN_14B, **fields) -> Plan:
    fields.setdefault("prompt", "x" if not model.words else "a red ball moves to the right")
    return make_plan(Request(**fields), model, machine("H100"), Evidence())


def test_1080_rows_are_generated_as_1088_and_cropped() -> None:
    plan = plan_for(size=(1920, 1080))
    assert plan.size == (1920, 1080)
    assert plan.grid_size == (1920, 1088)
    assert "cropped" in plan.notes[0]


def test_ti2v_has_a_grid_of_32() -> None:
    assert plan_for(PUBLISHED["wan2.2-ti2v-5b"], size=(1280, 720)).grid_size == (1280, 736)


@given(st.integers(32, 1024), st.integers(32, 1024), st.sampled_from(list(PUBLISHED)))
def test_the_generated_size_is_on_the_grid_and_covers_what_was_asked(
    width: int, height: int, name: str
) -> None:
    model = PUBLISHED[name]
    pictures = {} if "t2v" in model.tasks else {"image": "a.png"}
    if model.tasks == ("flf2v",):
        pictures["last_image"] = "b.png"
    plan = plan_for(model, size=(width, height), frames=5, **pictures)
    for asked, made, step in zip(plan.size, plan.grid_size, model.grid, strict=True):
        assert made % step == 0
        assert 0 <= made - asked < step


def test_tokens_of_the_known_shapes() -> None:
    # The lengths that Wan's self-attention is known by: 480p and 720p with 81 frames.
    assert plan_for(size=(832, 480), frames=81).tokens == 32_760
    assert plan_for(size=(1280, 720), frames=81).tokens == 75_600


def test_settings_come_from_the_request_then_the_preset_then_the_model() -> None:
    assert plan_for().steps.count == 50
    assert plan_for(preset="balanced").steps.count == 25
    assert plan_for(preset="balanced", steps=7).steps.count == 7
    assert plan_for(preset="balanced").size == (1280, 720)
    assert plan_for(DEMO, preset="balanced").size == (256, 256)


@pytest.mark.parametrize(
    ("device", "dtype", "found"),
    [
        ("auto", "auto", "bfloat16"),
        ("auto", "float32", "float32"),
        ("auto", "float16", "float32"),
        ("cpu", "auto", "float32"),
        ("cpu", "bfloat16", "float32"),
    ],
)
def test_frames_are_decoded_in_bfloat16_on_a_gpu_that_computes_in_it(
    device: str, dtype: str, found: str
) -> None:
    decoding = plan_for(device=device, dtype=dtype).decoding
    assert decoding.dtype == found
    assert decoding.channels_last == decoding.rounds == (found == "bfloat16")


def test_latent_frames_of_small_pictures_are_decoded_together_on_a_gpu() -> None:
    assert plan_for(DEMO).decoding.at_once > 1
    assert plan_for(DEMO, device="cpu").decoding.at_once == 1
    assert plan_for(size=(832, 480)).decoding.at_once == 1


def test_two_experts_have_two_guidance_scales() -> None:
    model = PUBLISHED["wan2.2-t2v-a14b"]
    assert (plan_for(model).steps.cfg, plan_for(model).steps.cfg_2) == (4.0, 3.0)
    assert plan_for(model, cfg=2.0).steps.cfg_2 == 2.0
    assert plan_for(model, cfg=2.0, cfg_2=1.0).steps.cfg_2 == 1.0
    assert plan_for(model).steps.boundary == 0.875


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (WAN_14B, {"cfg_2": 1.0}, "two experts"),
        (WAN_14B, {"image": "a.png"}, "text alone"),
        (WAN_14B, {"size": (16, 8 * 16), "frames": 1, "device": "cuda:3"}, "this machine has"),
        (WAN_14B, {"size": (4096, 4096), "frames": 401}, "tokens"),
        (PUBLISHED["wan2.1-i2v-14b"], {}, "starts from a picture"),
        (PUBLISHED["wan2.1-i2v-14b"], {"image": "a", "last_image": "b"}, "only a first picture"),
        (PUBLISHED["wan2.2-ti2v-5b"], {"size": (16, 64)}, "smallest is 32x32"),
        (DEMO, {"image": "a", "last_image": "b"}, "only a first picture"),
    ],
)
def test_what_a_model_can_not_do_is_refused(model: Model, fields: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan_for(model, **fields)


@pytest.mark.parametrize(("first", "last", "refused"), [(2, 1, False), (2, 2, True), (9, 0, True)])
def test_ends_leave_steps_to_the_mode_between_them(first: int, last: int, refused: bool) -> None:
    fields = {"attention": "flash_attn", "steps": 4}
    ends = Ends(mode="sdpa", first=first, last=last)
    if not refused:
        assert plan_for(attention_ends=ends, **fields).attention.first == first
        return
    with pytest.raises(RequestError, match="4 in all, none is left for flash_attn"):
        plan_for(attention_ends=ends, **fields)


def test_first_and_last_frame_where_the_model_takes_it() -> None:
    model = PUBLISHED["wan2.1-flf2v-14b"]
    assert plan_for(model, image="a", last_image="b").task == "flf2v"
    with pytest.raises(RequestError, match="last_image is missing"):
        plan_for(model, image="a")


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red ball", None),
        ("A RED Ball, moves to the right!", None),
        ("一个红色的球向右移动", None),
        ("a purple ball", "'purple'"),
        ("一个红色的龙", "'龙'"),
        ("7 red ball", "'7'"),
        ("красный ball", "'красный'"),
        ("a red ball 🎈", "'🎈'"),
    ],
)
def test_a_word_the_demo_was_never_taught_is_refused(prompt: str, unknown: str | None) -> None:
    if unknown is None:
        assert plan_for(DEMO, prompt=prompt).task == "t2v"
        return
    with pytest.raises(RequestError, match="never taught") as refusal:
        plan_for(DEMO, prompt=prompt)
    assert unknown in str(refusal.value)
    # In the language it was asked in.
    known = "colour: 红色" if "红" in prompt else "colour: red"
    assert str(refusal.value).endswith(known)


def test_the_negative_prompt_is_checked_too() -> None:
    with pytest.raises(RequestError, match=r"^negative: .*'ugly'"):
        plan_for(DEMO, negative="ugly")


def test_dtype_follows_the_device() -> None:
    request = Request(prompt="x")
    dtypes = {
        card: make_plan(request, WAN_14B, machine(*card), Evidence()).dtype
        for card in ((), ("3080",), ("H100",))
    }
    assert dtypes == {(): "float32", ("3080",): "bfloat16", ("H100",): "bfloat16"}


def test_a_cpu_build_of_torch_beside_a_gpu_is_named() -> None:
    hardware = machine("4090", torch_cuda=None)
    assert hardware.device("auto").torch_name == "cpu"
    with pytest.raises(RequestError, match="CPU build"):
        hardware.device("cuda")


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"scheduler": "lcm"}, "distilled"),
        ({"emulate": True}, "emulate changes nothing here: sdpa"),
        ({"preset": "low-vram"}, "distilled LoRA"),
    ],
)
def test_settings_that_need_a_word_get_one(fields: dict, note: str) -> None:
    assert any(note in said for said in plan_for(**fields).notes)
    assert not any(note in said for said in plan_for().notes)
