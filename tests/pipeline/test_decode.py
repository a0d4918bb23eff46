from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sagewan.attention.launch import Launcher
from sagewan.model.vae import decode_pieces
from sagewan.pipeline.build import build
from sagewan.pipeline.conditions import denormalized
from sagewan.pipeline.decode import decode
from sagewan.pipeline.guard import FrameGuard
from sagewan.plan.plan import Plan
from tests.pipeline.runs import plan_for

Folder = Callable[[str], Path]
BOTH = pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"])


def noise(plan: Plan) -> torch.Tensor:
    width, height = plan.grid_size
    model = plan.model
    shape = (1, model.latent_channels, (plan.frames - 1) // 4 + 1)
    cells = (height // model.spatial, width // model.spatial)
    return torch.randn(*shape, *cells, generator=torch.Generator().manual_seed(0))


@BOTH
@torch.inference_mode()
def test_pieces_together_are_what_the_vae_decodes_at_once(
    name: str, shrunken_folder: Folder
) -> None:
    plan = plan_for(shrunken_folder(name), frames=13)
    latents = noise(plan)
    with build(plan, Launcher()).vae.on("cpu") as vae:
        whole = vae.decode(denormalized(latents, vae)).sample
        pieces = list(decode_pieces(denormalized(latents, vae), vae))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(pieces, 2).clamp(-1, 1), whole)


@BOTH
def test_frames_are_cut_from_the_middle_of_the_grid(name: str, shrunken_folder: Folder) -> None:
    plan = plan_for(shrunken_folder(name), size=(66, 70))
    across, down = plan.grid_size
    assert across > 66
    assert down > 70
    components = build(plan, Launcher())
    latents = noise(plan)
    whole = np.stack(
        list(decode(components, replace(plan, size=plan.grid_size), latents, FrameGuard()))
    )
    cut = np.stack(list(decode(components, plan, latents, FrameGuard())))
    assert whole.shape == (5, down, across, 3)
    assert cut.shape == (5, 70, 66, 3)
    assert cut.dtype == np.uint8
    top, left = (down - 70) // 2, (across - 66) // 2
    assert np.array_equal(cut, whole[:, top : top + 70, left : left + 66])


def test_1080_rows_are_cut_from_1088() -> None:
    from sagewan.pipeline.decode import _cropped

    rows = torch.arange(1088, dtype=torch.int32).view(1, -1, 1, 1).expand(1, 1088, 8, 3)
    cut = _cropped(rows, (8, 1080))
    assert cut.shape[1] == 1080
    assert (int(cut[0, 0, 0, 0]), int(cut[0, -1, 0, 0])) == (4, 1083)


def test_a_frame_is_decoded_when_it_is_asked_for(
    shrunken_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(shrunken_folder("wan2.1-t2v-1.3b"), frames=13)
    frames = decode(build(plan, Launcher()), plan, noise(plan), FrameGuard())
    calls: list[int] = []
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d

    forward = WanDecoder3d.forward
    monkeypatch.setattr(
        WanDecoder3d, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    for asked, decoded in ((1, 1), (1, 2), (3, 2), (1, 3)):
        for _ in range(asked):
            next(frames)
        assert len(calls) == decoded
    frames.close()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_value_that_is_not_finite_is_black_or_white_and_told(
    shrunken_folder: Folder, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d

    plan = plan_for(shrunken_folder("wan2.1-t2v-1.3b"))
    forward = WanDecoder3d.forward

    def spoilt(self: WanDecoder3d, x: torch.Tensor, **options: object) -> torch.Tensor:
        piece = forward(self, x, **options)
        if not options["first_chunk"]:
            piece[0, 0, 2, 5, 7] = value
        return piece

    monkeypatch.setattr(WanDecoder3d, "forward", spoilt)
    guard = FrameGuard()
    frames = list(decode(build(plan, Launcher()), plan, noise(plan), guard))
    assert frames[3][5, 7, 0] == (0 if value != value else 255)
    assert "not finite" in (guard.objection() or "")
