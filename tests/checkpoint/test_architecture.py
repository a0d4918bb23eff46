import math
from pathlib import Path

import pytest
import torch

from sagewan.checkpoint.architecture import Architecture
from sagewan.errors import CheckpointError
from sagewan.plan.models import PUBLISHED
from tests.published import TRANSFORMERS
from tests.shrunken import transformer_config

HERE = Path("config.json")
# What the models are called: the sizes their authors name, in thousand millions.
NAMED_SIZES = {"1.3b": 1.3, "14b": 14, "a14b": 14, "5b": 5}


def shapes_of(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Those of diffusers' own class."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def parameters_of(config: dict[str, object]) -> int:
    return sum(math.prod(shape) for shape in shapes_of(config).values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_weight_of_a_published_model_is_known_with_its_shape(name: str) -> None:
    config = TRANSFORMERS[name]
    assert Architecture.of(config, HERE).shapes() == shapes_of(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_models_have_the_published_number_of_parameters(name: str) -> None:
    built = parameters_of(TRANSFORMERS[name])
    assert Architecture.of(TRANSFORMERS[name], HERE).parameters == built
    assert PUBLISHED[name].parameters == built
    size = NAMED_SIZES[name.rpartition("-")[2]]
    # Wan 2.1's I2V adds a second cross-attention to what its name counts.
    extra = 2.1 if TRANSFORMERS[name]["image_dim"] else 0
    assert built / 1e9 == pytest.approx(size + extra, rel=0.1)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("change", [{}, {"cross_attn_norm": False}, {"patch_size": [1, 1, 2]}])
def test_the_formula_counts_shrunken_models_too(name: str, change: dict[str, object]) -> None:
    config = transformer_config(name) | change
    assert Architecture.of(config, HERE).parameters == parameters_of(config)


def test_keys_left_out_take_the_defaults_of_diffusers() -> None:
    assert Architecture.of({}, HERE).parameters == parameters_of({})


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": "40"},
        {"num_layers": 0},
        {"num_attention_heads": 2.5},
        {"ffn_dim": True},
        {"patch_size": [1, 2]},
        {"patch_size": 2},
        {"cross_attn_norm": "yes"},
        {"in_channels": math.nan},
    ],
)
def test_what_is_no_size_is_refused_by_name(change: dict[str, object]) -> None:
    (name,) = change
    with pytest.raises(CheckpointError, match=f"config.json: {name} is"):
        Architecture.of(TRANSFORMERS["wan2.1-t2v-14b"] | change, HERE)
