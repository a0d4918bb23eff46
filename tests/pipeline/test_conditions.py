from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sagewan.attention.launch import Launcher
from sagewan.pipeline.build import build
from sagewan.pipeline.conditions import (
    Conditions,
    clean,
    denormalized,
    encode,
    encode_text,
    normalized,
)
from sagewan.plan.plan import Plan
from tests.pipeline.runs import picture, pictures_of, plan_for
from tests.shrunken import CLIP_DIM, TEXT_DIM

Folder = Callable[[str], Path]


def conditions_of(plan: Plan) -> Conditions:
    return encode(build(plan, Launcher()), plan, pictures_of(plan))


@given(st.text(max_size=60))
def test_prompts_are_cleaned_as_diffusers_cleans_them(text: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean(text) == prompt_clean(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("  a \n b\u3000c ", "a b c"), ("&amp;amp; &lt;b&gt;", "& <b>"), ("donâ€™t", "don't")],
)
def test_cleaning(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_text_is_512_tokens_and_zero_behind_its_end(shrunken_folder: Folder) -> None:
    components = build(plan_for(shrunken_folder("wan2.1-t2v-1.3b")), Launcher())
    with torch.inference_mode(), components.text_encoder.on("cpu") as encoder:
        for text, tokens in (("", 1), ("a small cat", 4), ("cat " * 600, 512)):
            features = encode_text([text], components.tokenizer, encoder)
            assert features.shape == (1, 512, TEXT_DIM)
            assert not features[:, tokens:].any()
            assert features[0, :tokens].abs().sum(-1).min() > 0


@pytest.mark.parametrize(
    ("cfg", "cfg_2", "guided"),
    [(4.0, None, True), (1.0, 1.0, False), (1.0, 3.0, True), (3.0, 1.0, True), (0.0, 0.0, False)],
)
def test_the_negative_prompt_is_encoded_where_a_step_is_guided(
    cfg: float, cfg_2: float | None, guided: bool, shrunken_folder: Folder
) -> None:
    name = "wan2.1-t2v-1.3b" if cfg_2 is None else "wan2.2-t2v-a14b"
    experts = {} if cfg_2 is None else {"cfg_2": cfg_2}
    found = conditions_of(plan_for(shrunken_folder(name), cfg=cfg, **experts))
    assert (found.negative is not None) == guided
    assert found.picture is None
    assert found.latents is None


def test_guidance_of_an_expert_that_has_no_step_wants_no_negative_prompt(
    shrunken_folder: Folder,
) -> None:
    folder = shrunken_folder("wan2.2-t2v-a14b")
    found = conditions_of(plan_for(folder, cfg=3.0, cfg_2=1.0, boundary=1.0))
    assert found.negative is None


def test_shapes_and_mask_of_a_first_picture(shrunken_folder: Folder, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 1)
    found = conditions_of(plan_for(shrunken_folder("wan2.1-i2v-14b"), image=path, frames=9))
    assert found.picture is not None
    assert found.picture.shape == (1, 257, CLIP_DIM)
    assert found.latents is not None
    assert found.latents.shape == (1, 20, 3, 8, 8)
    mask = found.latents[:, :4]
    assert (mask[:, :, 0] == 1).all()
    assert (mask[:, :, 1:] == 0).all()


def test_mask_of_two_pictures(shrunken_folder: Folder, tmp_path: Path) -> None:
    paths = {
        "image": picture(tmp_path / "a.png", 1),
        "last_image": picture(tmp_path / "b.png", 2),
    }
    found = conditions_of(plan_for(shrunken_folder("wan2.1-flf2v-14b"), frames=9, **paths))
    assert found.picture is not None
    assert found.picture.shape == (2, 257, CLIP_DIM)
    assert not torch.allclose(found.picture[0], found.picture[1])
    assert found.latents is not None
    mask = found.latents[0, :4, :, 0, 0]
    # Rows: the four frames of a latent frame. The last of the last one is given.
    assert mask.tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]]


def test_ti2v_knows_the_first_frame_alone(shrunken_folder: Folder, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 1)
    found = conditions_of(plan_for(shrunken_folder("wan2.2-ti2v-5b"), image=path, frames=9))
    assert found.picture is None
    assert found.latents is not None
    assert found.latents.shape == (1, 48, 1, 4, 4)


def test_normalizing_is_undone_by_denormalizing(shrunken_folder: Folder) -> None:
    latents = torch.randn(1, 16, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    with build(plan_for(shrunken_folder("wan2.1-t2v-1.3b")), Launcher()).vae.on("cpu") as vae:
        there = normalized(latents, vae)
        assert not torch.allclose(there, latents, atol=0.1)
        assert torch.allclose(denormalized(there, vae), latents, atol=1e-6)
