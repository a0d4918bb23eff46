from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sagewan.attention.launch import Launcher
from sagewan.model.attention import Attention, Turn
from sagewan.model.block import rotate
from sagewan.model.transformer import install
from sagewan.plan.attention import AttentionPlan, Choice
from sagewan.plan.catalogue import Problem, row_named
from tests.shrunken import CLIP_DIM, TEXT_DIM, transformer

SDPA = Choice("sdpa", row_named("torch.sdpa"))
PLAN = AttentionPlan(requested="sdpa", problem=Problem(head_dim=128, dtype="float32"), main=SDPA)


@contextmanager
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Choice]]:
    """The choices that reach the launcher, in order."""
    choices: list[Choice] = []
    attend = Launcher.attend

    def noted(self: Launcher, q: Any, k: Any, v: Any, choice: Choice, **more: Any) -> Any:
        choices.append(choice)
        return attend(self, q, k, v, choice, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Launcher, "attend", noted)
        yield choices


def inputs(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    channels = 36 if "i2v" in name or "flf2v" in name else 16
    found = {
        "hidden_states": noise(1, channels, 3, 6, 10),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, 512, TEXT_DIM),
    }
    if "2.1-" in name and channels == 36:
        pictures = 2 if "flf2v" in name else 1
        found["encoder_hidden_states_image"] = noise(pictures, 257, CLIP_DIM)
    return found


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.1-i2v-14b", "wan2.1-flf2v-14b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_sdpa_is_bit_for_bit_what_diffusers_computes(name: str, dtype: torch.dtype) -> None:
    model = transformer(name, 0)
    # As from_pretrained leaves them: the modules that diffusers names stay in float32.
    for key, weight in model.named_parameters():
        kept = any(part in key for part in model._keep_in_fp32_modules)
        weight.data = weight.data if kept else weight.data.to(dtype)
    given_inputs = inputs(name, dtype)
    expected = model(**given_inputs, return_dict=False)[0]
    attention = Attention(Launcher())
    install(model, attention)
    with attention.during(Turn(PLAN, 1, lambda: None)):
        assert torch.equal(model(**given_inputs, return_dict=False)[0], expected)
    assert expected.dtype == dtype
    assert expected.float().std() > 0.1


def test_each_layer_and_step_gets_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Choice("flash_attn", row_named("torch.sdpa"))
    plan = replace(PLAN, ends=ends, first=1, last=1, keep_layers=frozenset({1}))
    model = transformer("wan2.1-t2v-14b", 0)
    attention = Attention(Launcher())
    install(model, attention)
    turn = Turn(plan, 4, lambda: None)
    with seen(monkeypatch) as choices, torch.inference_mode(), attention.during(turn):
        for turn.step in range(4):
            model(**inputs("t2v", torch.float32))
    named = [choice.requested for choice in choices]
    both, inner = ["flash_attn"] * 2, ["sdpa", "flash_attn"]
    assert named == [*both, *inner, *inner, *both]


def test_the_check_comes_once_a_block_and_its_error_passes() -> None:
    class StopError(Exception):
        pass

    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise StopError

    model = transformer("wan2.1-t2v-14b", 0)
    launcher = Launcher()
    attention = Attention(launcher)
    install(model, attention)
    with pytest.raises(StopError), torch.inference_mode(), attention.during(Turn(PLAN, 1, check)):
        model(**inputs("t2v", torch.float32))
    # The second block was entered and not attended.
    assert sum(row["calls"] for row in launcher.ran()) == 1


def test_a_transformer_outside_a_run_is_a_mistake() -> None:
    model = transformer("wan2.1-t2v-14b", 0)
    install(model, Attention(Launcher()))
    with pytest.raises(RuntimeError, match=r"outside Attention\.during"):
        model(**inputs("t2v", torch.float32))


def angles(tokens: int, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    place = torch.arange(tokens, dtype=torch.float64) + shift
    speed = 10000.0 ** -(torch.arange(64, dtype=torch.float64) / 64)
    angle = torch.outer(place, speed).repeat_interleave(2, -1)[None, :, None]
    return angle.cos().float(), angle.sin().float()


@given(shift=st.floats(0, 100), seed=st.integers(0, 1000))
def test_rotation_keeps_lengths_and_sees_only_distances(shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 5, 2, 128, generator=generator)
    scores: Callable[[float], torch.Tensor] = lambda at: torch.einsum(  # noqa: E731
        "bnhd,bmhd->bhnm", rotate(q, *angles(5, at)), rotate(k, *angles(5, at))
    )
    assert torch.allclose(rotate(q, *angles(5)).norm(dim=-1), q.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(scores(0), scores(shift), atol=2e-3)
