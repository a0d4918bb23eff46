"""What the weights are stored in and multiplied by, on cards that are not here."""

from dataclasses import replace
from typing import Any

import pytest

from sagewan.plan.evidence import Evidence, SelfTest
from sagewan.plan.layers import Role, block_layers, layer_shapes, role_of, weight_shapes
from sagewan.plan.linear import LINEAR_ROWS
from sagewan.plan.models import PUBLISHED, Model
from sagewan.plan.objection import Objection
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.request import Request
from sagewan.plan.serialize import plan_to_json
from sagewan.plan.weights import weight_bytes
from tests.machines import DEMO, WAN_14B, machine

_FP8 = ("torch.fp8_rows", "torch.fp8_rows_of_nvfp4")
PACKAGES = {"triton": "3.6", "comfy_kitchen": "0.2.40"}


def planned(
    *cards: str, model: Model = WAN_14B, evidence: Evidence | None = None, **fields: Any
) -> Plan:
    hardware = machine(*cards, **PACKAGES)
    prompt = "a red ball" if model.words else "a cat"
    request = Request(prompt=prompt, **fields)
    return make_plan(request, model, hardware, evidence or Evidence())


@pytest.mark.parametrize(
    ("card", "quantization", "main", "compute"),
    [
        ("H100", "fp8_scaled", "cublas.fp8_rows", "fp8 e4m3 × fp8 e4m3"),
        ("4090", "fp8_scaled", "torch.fp8_rows", "fp8 e4m3 × fp8 e4m3"),
        ("3080", "fp8_scaled", "torch.unpacked", "unpacked before the product"),
        ("4090", "fp4_scaled", "torch.fp8_rows_of_nvfp4", "fp8 e4m3 × nvfp4 unpacked to fp8 e4m3"),
        ("H100", "fp4_scaled", "cublas.fp8_rows_of_nvfp4", "fp8 e4m3 × nvfp4 unpacked to fp8 e4m3"),
        ("5090", "fp4_scaled", "comfy_kitchen.nvfp4", "nvfp4 × nvfp4"),
        ("3080", "fp4_scaled", "sagewan.nvfp4_unpacked", "unpacked before the product"),
    ],
)
def test_what_multiplies_on_which_card(
    card: str, quantization: str, main: str, compute: str
) -> None:
    plan = planned(card, quantization=quantization)
    weights = plan.weights
    assert weights.main
    assert (weights.main.name, weights.main.compute) == (main, compute)
    assert weights.quantization == quantization
    for role in (Role.SELF_ATTENTION, Role.CROSS_QUERY, Role.FEED_FORWARD):
        assert weights.row(weights.format or "", role) == weights.main
    # The text's keys and values multiply in 16 bit, and one row in the kernel for a few.
    assert not weights.row(weights.format or "", Role.CROSS_KEY_VALUE).low
    assert weights.row(weights.format or "", Role.TIME).name == "sagewan.thin"
    unpacks = [note for note in plan.notes if "unpacked to multiply in bfloat16 here" in note]
    assert bool(unpacks) is (card == "3080")


@pytest.mark.parametrize(
    ("cuda", "main"),
    [("12.6", "torch.fp8_rows"), ("12.9", "cublas.fp8_rows"), ("any", "cublas.fp8_rows")],
)
def test_cublas_adds_products_since_cuda_12_9(cuda: str, main: str) -> None:
    hardware = replace(machine("H100", **PACKAGES), torch_cuda=cuda)
    request = Request(prompt="a cat", quantization="fp8_scaled")
    plan = make_plan(request, WAN_14B, hardware, Evidence())
    assert plan.weights.main
    assert plan.weights.main.name == main


@pytest.mark.parametrize(
    ("card", "cuda", "bindings", "main"),
    [
        ("H100", "13.0", "13.3.1", "sagewan.fp8_rows_hopper"),
        ("H100", "12.6", "13.3.1", "torch.fp8_rows"),
        ("H100", "13.0", "12.6", "cublas.fp8_rows"),
        ("4090", "13.0", "13.3.1", "torch.fp8_rows"),
    ],
)
def test_our_own_product_through_gelu_wants_hopper_and_a_compiler(
    card: str, cuda: str, bindings: str, main: str
) -> None:
    hardware = replace(machine(card, **PACKAGES, cuda_bindings=bindings), torch_cuda=cuda)
    request = Request(prompt="a cat", quantization="fp8_scaled")
    plan = make_plan(request, WAN_14B, hardware, Evidence())
    assert plan.weights.main
    assert plan.weights.main.name == main
    assert bool(plan.weights.main.gelu) is (main == "sagewan.fp8_rows_hopper")


def test_a_cpu_unpacks_and_emulates_where_it_is_asked_to() -> None:
    plan = planned(model=DEMO, quantization="fp8_scaled")
    assert plan.weights.main
    assert plan.weights.main.name == "torch.unpacked"
    assert not plan.weights.unproven
    emulated = planned(model=DEMO, quantization="fp4_scaled", emulate=True)
    assert emulated.weights.main
    assert emulated.weights.main.name == "emulated.nvfp4"
    assert not any("emulate changes nothing" in note for note in emulated.notes)
    # The real one comes first.
    on_card = planned("H100", quantization="fp8_scaled", emulate=True)
    assert on_card.weights.main
    assert on_card.weights.main.name == "cublas.fp8_rows"


def test_rows_wait_for_a_self_test_and_one_that_failed_is_left_out() -> None:
    plan = planned("H100", quantization="fp8_scaled")
    assert [row.name for row in plan.weights.unproven] == ["cublas.fp8_rows"]
    passed = SelfTest(implementation="cublas.fp8_rows", error=0.03, limit=0.05, milliseconds=None)
    plan = planned("H100", quantization="fp8_scaled", evidence=Evidence().with_test(passed))
    assert not plan.weights.unproven
    objection = Objection("self-test-crashed", {"error": "RuntimeError: not built"})
    failed = replace(passed, error=None, objection=objection)
    evidence = Evidence().with_test(failed)
    plan = planned("H100", quantization="fp8_scaled", evidence=evidence)
    assert [row.name for row in plan.weights.unproven] == ["torch.fp8_rows"]
    evidence = evidence.with_test(replace(failed, implementation="torch.fp8_rows"))
    plan = planned("H100", quantization="fp8_scaled", evidence=evidence)
    assert plan.weights.main
    assert plan.weights.main.name == "torch.unpacked"
    assert any("RuntimeError: not built" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("card", "model", "chosen"),
    [
        ("H100", "wan2.1-t2v-14b", "none"),
        ("4090", "wan2.1-t2v-14b", "fp8_scaled"),
        ("3080", "wan2.1-t2v-14b", "fp4_scaled"),
        ("3080", "wan2.1-t2v-1.3b", "none"),
        ("4090", "wan2.2-ti2v-5b", "none"),
    ],
)
def test_auto_keeps_16_bit_where_it_leaves_room(card: str, model: str, chosen: str) -> None:
    plan = planned(card, model=PUBLISHED[model])
    assert plan.weights.quantization == chosen
    said = [note for note in plan.notes if "--quantization none keeps them so" in note]
    assert bool(said) is (chosen != "none")
    assert planned(card, model=PUBLISHED[model], quantization="none").weights.format is None


def test_presets_bring_theirs() -> None:
    chosen = {
        preset: planned("4090", preset=preset).weights.quantization
        for preset in ("low-vram", "balanced", "quality")
    }
    assert chosen == {
        "low-vram": "fp4_scaled",
        "balanced": "fp8_scaled",
        "quality": "fp8_scaled",
    }
    assert planned("4090", preset="quality", quantization="none").weights.format is None


@pytest.mark.parametrize(("format_", "share"), [("float8_e4m3fn", 0.515), ("nvfp4", 0.30)])
@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.2-i2v-a14b"])
def test_bytes_of_the_quantised_14b(format_: str, share: float, name: str) -> None:
    model = PUBLISHED[name]
    plain = weight_bytes(model, "bfloat16", None)
    assert plain == 2 * model.parameters
    assert weight_bytes(model, "bfloat16", format_) <= share * plain


def test_files_that_are_quantised_stay_so() -> None:
    model = replace(WAN_14B, quantized="nvfp4")
    assert planned("4090", model=model).weights.format == "nvfp4"
    unproven = {row.name for row in planned("4090", model=model).weights.unproven}
    assert unproven == {"sagewan.thin", "sagewan.nvfp4_unpacked", *_FP8}
    asked = planned("4090", model=model, quantization="fp8_scaled")
    assert asked.weights.format == "nvfp4"
    assert any("would lose twice" in note for note in asked.notes)
    plain = planned("4090", model=model, quantization="none")
    assert plain.weights.unpacks
    assert plain.weights.format is None


def test_every_format_has_a_row_everywhere() -> None:
    for card in ((), ("3080",), ("H100",), ("5090",)):
        weights = planned(*card).weights
        formats = {format_ for row in LINEAR_ROWS for format_ in row.formats}
        for format_ in formats | {"gguf:Q4_K"}:
            for role in Role:
                assert weights.row(format_, role)


def test_layers_and_their_roles() -> None:
    shapes = layer_shapes(WAN_14B)
    assert len(shapes) == 40 * 10
    assert shapes["blocks.39.ffn.net.2"] == (5120, 13824)
    assert role_of("blocks.3.attn2.add_k_proj") == Role.CROSS_KEY_VALUE
    assert role_of("blocks.3.ffn.net.0.proj") == Role.FEED_FORWARD
    assert role_of("condition_embedder.time_proj") == Role.TIME
    assert role_of("proj_out") == Role.OTHER
    assert len(block_layers(PUBLISHED["wan2.1-i2v-14b"])) == 12


def test_the_shapes_are_those_of_the_models() -> None:
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    from tests.published import TRANSFORMERS

    for name in ("wan2.1-i2v-14b", "wan2.2-ti2v-5b"):
        with init_empty_weights():
            model = WanTransformer3DModel(**TRANSFORMERS[name])
        found = {n.removesuffix(".weight"): tuple(x.shape) for n, x in model.named_parameters()}
        for layer, shape in weight_shapes(PUBLISHED[name]).items():
            assert found[layer] == shape, layer


def test_the_plan_tells_it_in_json() -> None:
    told = plan_to_json(planned("H100", quantization="fp8_scaled"))["weights"]
    assert told["format"] == "float8_e4m3fn"
    assert told["multiply"]["feed-forward"]["implementation"] == "cublas.fp8_rows"
    assert plan_to_json(planned("H100", quantization="none"))["weights"]["multiply"] == {}
