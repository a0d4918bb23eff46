import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sagewan.attention.launch import Launcher
from sagewan.memory.meter import Meter
from sagewan.model.attention import Attention, Turn
from sagewan.model.block import chunks
from sagewan.model.times import Modulation, Times
from sagewan.model.transformer import install
from tests.model.test_attention import PLAN, inputs
from tests.shrunken import transformer


def predict(name: str, given_inputs: dict[str, torch.Tensor], **turn: int) -> torch.Tensor:
    model = transformer(name, 0)
    attention = Attention(Launcher())
    install(model, attention)
    with torch.inference_mode(), attention.during(Turn(PLAN, 1, lambda: None, **turn)):  # type: ignore[arg-type]
        prediction: torch.Tensor = model(**given_inputs)[0]
    return prediction


def ti2v_inputs(first: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    times = torch.full((1, 45), 700.0)
    times[:, :first] = 0
    return {
        "hidden_states": torch.randn(1, 48, 3, 6, 10, generator=generator),
        "timestep": times,
        "encoder_hidden_states": torch.randn(1, 512, 32, generator=generator),
    }


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.1-i2v-14b"])
@pytest.mark.parametrize("turn", [{"chunk": 7}, {"heads": 1}, {"chunk": 16, "heads": 1}])
def test_chunks_of_tokens_and_groups_of_heads_change_nothing(
    name: str, turn: dict[str, int]
) -> None:
    given_inputs = inputs(name, torch.float32)
    whole = predict(name, given_inputs)
    assert (predict(name, given_inputs, **turn) - whole).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("first", [0, 15, 20, 45])
@pytest.mark.parametrize("chunk", [None, 8])
def test_two_times_are_what_a_time_for_each_token_is(first: int, chunk: int | None) -> None:
    given_inputs = ti2v_inputs(first)
    model = transformer("wan2.2-ti2v-5b", 0)
    with torch.inference_mode():
        expected = model(**given_inputs, return_dict=False)[0]
    found = predict("wan2.2-ti2v-5b", given_inputs, **({"chunk": chunk} if chunk else {}))
    assert (found - expected).norm() / expected.norm() < 1e-5
    other = predict("wan2.2-ti2v-5b", ti2v_inputs(30))
    assert (found - other).norm() / other.norm() > 1e-3


@given(st.integers(1, 5000), st.integers(1, 700))
def test_chunks_cover_every_token_once_and_are_even(tokens: int, size: int) -> None:
    found = chunks(tokens, size)
    assert [i for start, stop in found for i in range(start, stop)] == list(range(tokens))
    sizes = {stop - start for start, stop in found}
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.sampled_from([0.0, 500.0]), min_size=1, max_size=30), st.data())
def test_each_token_gets_the_vectors_of_its_time(times: list[float], data: st.DataObject) -> None:
    timestep = torch.tensor([times])
    found = Times.of(timestep, len(times))
    vectors = found.values[:, :, None, None].expand(1, -1, 2, 3)
    start = data.draw(st.integers(0, len(times) - 1))
    stop = data.draw(st.integers(start + 1, len(times)))
    for vector in Modulation(vectors, found.bounds).at(start, stop):
        each = vector.expand(1, stop - start, 3)
        assert torch.equal(each[0, :, 0], timestep[0, start:stop])


def test_in_chunks_little_more_than_the_hidden_state_and_q_k_v_is_alive() -> None:
    """At a length where nothing else counts, on the meta device."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=8, ffn_dim=4096, num_layers=2, text_dim=64, cross_attn_norm=True
        ).half()

    class NoAttention(Attention):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int
        ) -> torch.Tensor:
            return torch.empty_like(q)

    attention = NoAttention(Launcher())
    install(model, attention)
    given_inputs = {
        "hidden_states": torch.empty(1, 16, 21, 60, 104, device="meta", dtype=torch.half),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, 512, 64, device="meta", dtype=torch.half),
    }
    turn = Turn(PLAN, 1, lambda: None, chunk=512, heads=1)
    with torch.no_grad(), attention.during(turn), Meter() as meter:
        model(**given_inputs)
    hidden = 21 * 30 * 52 * 8 * 128 * 2
    assert 4 * hidden < meter.peak < 4.8 * hidden
