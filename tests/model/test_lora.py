"""LoRAs on a transformer: their sum is added, and taking them off leaves nothing behind."""

from typing import Any

import pytest
import torch

from sagewan.checkpoint.lora import LoraLayer
from sagewan.errors import CheckpointError
from sagewan.model.lora import Adapters
from tests.loras import pairs
from tests.shrunken import transformer

NAME = "wan2.1-t2v-1.3b"


@pytest.fixture
def model() -> Any:
    return transformer(NAME, 3).requires_grad_(False)


def layers_of(model: Any, seed: int) -> dict[str, LoraLayer]:
    return {name: LoraLayer(a=a, b=b) for name, (a, b) in pairs(model, seed).items()}


def run(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return model(
            hidden_states=torch.randn(1, 16, 2, 8, 8, generator=generator),
            timestep=torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, 8, 32, generator=generator),
            return_dict=False,
        )[0]


def merged(seeds: tuple[int, ...]) -> Any:
    """The same LoRAs added into the weights."""
    result = transformer(NAME, 3).requires_grad_(False)
    for seed in seeds:
        for name, (a, b) in pairs(result, seed).items():
            result.get_submodule(name).weight += b @ a
    return result


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_it_is_what_merging_would_be(model: Any, seeds: tuple[int, ...]) -> None:
    plain = run(model)
    assert Adapters(model).put([layers_of(model, seed) for seed in seeds]) == 16
    expected = run(merged(seeds))
    assert (run(model) - expected).norm() / expected.norm() < 1e-5
    assert (run(model) - plain).norm() / plain.norm() > 0.05


def test_taking_off_and_putting_another_on_leaves_nothing_of_the_first(model: Any) -> None:
    plain, state = run(model), {name: x.clone() for name, x in model.state_dict().items()}
    adapters = Adapters(model)
    differences = {
        "blocks.0.attn1.norm_q": LoraLayer(diff=torch.full((256,), 0.3)),
        "blocks.1.scale_shift_table": LoraLayer(diff=torch.full((1, 6, 256), 0.3)),
        "blocks.1.ffn.net.2": LoraLayer(diff=torch.full((256, 192), 0.1), diff_b=torch.ones(256)),
    }
    adapters.put([layers_of(model, 0), differences])
    both = run(model)
    assert not both.equal(plain)
    adapters.put([layers_of(model, 1)])
    second = run(model)
    adapters.take_off()
    assert run(model).equal(plain)
    assert model.state_dict().keys() == state.keys()
    assert all(model.state_dict()[name].equal(x) for name, x in state.items())
    adapters.put([layers_of(model, 1)])
    assert run(model).equal(second)


def test_a_whole_difference_is_added(model: Any) -> None:
    difference, bias = torch.full((256, 192), 0.01), torch.full((256,), 0.5)
    Adapters(model).put([{"blocks.1.ffn.net.2": LoraLayer(diff=difference, diff_b=bias)}])
    other = transformer(NAME, 3).requires_grad_(False)
    other.blocks[1].ffn.net[2].weight += difference
    other.blocks[1].ffn.net[2].bias += bias
    assert (run(model) - run(other)).norm() / run(other).norm() < 1e-5


def test_all_its_tensors_move_with_the_block(model: Any) -> None:
    Adapters(model).put([layers_of(model, 0)])
    names = {name for name, _ in model.blocks[0].named_buffers()}
    assert {"attn1.to_q.lora.a", "attn1.to_q.lora.b"} <= names
    model.to("meta")
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"meta"}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("condition_embedder.text_embedder.linear_1", LoraLayer(diff=torch.ones(3, 3))),
        ("condition_embedder.image_embedder.norm1", LoraLayer(diff=torch.ones(32))),
        ("blocks.0.attn1.norm_q", LoraLayer(diff=torch.ones(8))),
    ],
)
def test_what_the_model_has_not_is_refused(model: Any, name: str, layer: LoraLayer) -> None:
    with pytest.raises(CheckpointError, match="LoRA"):
        Adapters(model).put([{name: layer}])
