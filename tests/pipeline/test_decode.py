from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sagewan.attention.launch import Launcher
from sagewan.model.vae import decode_pieces
from sagewan.pipeline.build import build
from sagewan.pipeline.conditions import denormalized
from sagewan.pipeline.decode import _ahead, decode
from sagewan.pipeline.guard import FrameGuard
from sagewan.plan.decoding import Decoding
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


@BOTH
@torch.inference_mode()
def test_several_latent_frames_at_once_give_the_same(name: str, shrunken_folder: Folder) -> None:
    plan = plan_for(shrunken_folder(name), frames=17)
    latents = noise(plan)
    with build(plan, Launcher()).vae.on("cpu") as vae:
        singly = torch.cat(list(decode_pieces(latents, vae)), 2)
        for at_once, wanted in ((2, [1, 8, 8]), (3, [1, 12, 4])):
            pieces = list(decode_pieces(latents, vae, at_once))
            assert [piece.shape[2] for piece in pieces] == wanted
            assert torch.allclose(torch.cat(pieces, 2), singly, atol=1e-5)


@BOTH
def test_a_decoder_in_bfloat16_differs_by_its_rounding(name: str, shrunken_folder: Folder) -> None:
    plan = plan_for(shrunken_folder(name), frames=13)
    assert not plan.decoding.rounds, "on a CPU"
    rounded = replace(plan, decoding=Decoding(dtype="bfloat16", channels_last=True))
    parts = build(rounded, Launcher())
    with parts.decoder.on("cpu") as vae:
        assert {x.dtype for x in vae.parameters()} == {torch.bfloat16}
        convolution = next(x for x in vae.decoder.parameters() if x.ndim == 5 and x.shape[1] > 1)
        assert convolution.is_contiguous(memory_format=torch.channels_last_3d)
    with parts.vae.on("cpu") as vae:
        assert {x.dtype for x in vae.parameters()} == {torch.float32}, "pictures are encoded so"
    latents = noise(plan)
    exact = np.stack(list(decode(build(plan, Launcher()), plan, latents, FrameGuard()))).astype(int)
    found = np.stack(list(decode(parts, rounded, latents, FrameGuard()))).astype(int)
    assert 0 < np.abs(found - exact).max() <= 0.1 * np.ptp(exact)
    assert np.square(found - exact).mean() ** 0.5 < 0.04 * exact.std()


def test_one_is_one_part_where_nothing_is_rounded(shrunken_folder: Folder) -> None:
    from sagewan.pipeline.session import Session

    plan = plan_for(shrunken_folder("wan2.1-t2v-1.3b"))
    with Session() as session:
        parts = build(plan, Launcher(), session)
        assert parts.decoder is parts.vae


def test_the_one_before_is_written_while_the_next_is_decoded() -> None:
    log: list[str] = []

    def decoded(count: int) -> Iterator[int]:
        for index in range(count):
            log.append(f"decode {index}")
            yield index

    log.extend(f"write {piece}" for piece in _ahead(decoded(3), 1))  # type: ignore[arg-type]
    assert log == ["decode 0", "decode 1", "write 0", "decode 2", "write 1", "write 2"]
    assert list(_ahead(decoded(2), 0)) == [0, 1]  # type: ignore[arg-type,comparison-overlap]
