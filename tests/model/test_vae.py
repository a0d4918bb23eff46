from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sagewan
from sagewan.model import vae as module
from sagewan.model.vae import decode_pieces, decode_tiles, encode, tiles
from tests.shrunken import filled, vae_config

VAES = ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b", "demo"]
# Convolutions of other sizes sum in another order; everything beyond that would be a seam.
ROUNDING = 2e-5


@pytest.fixture(scope="module", params=VAES)
def vae(request: pytest.FixtureRequest) -> Any:
    from diffusers import AutoencoderKLWan

    if request.param == "demo":
        folder = Path(sagewan.__file__).parent / "assets" / "demo" / "vae"
        return AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)
    return filled(AutoencoderKLWan(**vae_config(request.param)), 2)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tiled(latents: torch.Tensor, vae: Any, size: tuple[int, int]) -> torch.Tensor:
    scale = vae.config.scale_factor_spatial
    frames = 1 + 4 * (latents.shape[2] - 1)
    out = torch.full((1, 3, frames, latents.shape[3] * scale, latents.shape[4] * scale), torch.nan)
    for (rows, columns), start, piece in decode_tiles(latents, vae, size):
        out[:, :, start : start + piece.shape[2], rows, columns] = piece
    return out


# Long in one direction, so that a tile does not reach all of it.
@pytest.mark.parametrize(("sides", "size"), [((6, 34), (6, 9)), ((34, 5), (9, 100))])
@torch.inference_mode()
def test_tiles_decode_to_what_the_whole_does(
    vae: Any, sides: tuple[int, int], size: tuple[int, int]
) -> None:
    latents = noise(1, vae.config.z_dim, 2, *sides)
    whole = torch.cat(list(decode_pieces(latents, vae)), 2)
    assert (tiled(latents, vae, size) - whole).abs().max() < ROUNDING * whole.abs().max()


@torch.inference_mode()
def test_one_cell_less_of_the_neighbours_shows(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = noise(1, vae.config.z_dim, 2, 6, 36)
    whole = torch.cat(list(decode_pieces(latents, vae)), 2)
    reaches = module._reaches(vae.decoder)
    for level in range(len(reaches)):
        fewer = [reach - (2 if i == level else 0) for i, reach in enumerate(reaches)]
        monkeypatch.setattr(module, "_reaches", lambda _, fewer=fewer: fewer)
        error = (tiled(latents, vae, (6, 18)) - whole).abs().max() / whole.abs().max()
        assert error > 1e-7, level


@pytest.mark.parametrize("size", [None, (5, 20), (20, 12)])
@torch.inference_mode()
def test_tiles_encode_to_what_the_whole_does(vae: Any, size: tuple[int, int] | None) -> None:
    scale = vae.config.scale_factor_spatial
    video = noise(1, 3, 5, 6 * scale, 36 * scale).clamp(-1, 1)
    expected = vae.encode(video).latent_dist.mode()
    found = encode(lambda start, stop: video[:, :, start:stop], 5, vae, size)
    if size is None:
        assert torch.equal(found, expected)
    assert (found - expected).abs().max() < ROUNDING * expected.abs().max()


@settings(max_examples=50)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 90), st.integers(1, 90))
def test_tiles_cover_every_cell_once(rows: int, columns: int, high: int, wide: int) -> None:
    seen = torch.zeros(rows, columns)
    for tile in tiles(rows, columns, (high, wide)):
        part = seen[tile.slices]
        assert part.shape[0] <= high
        assert part.shape[1] <= wide
        part += 1
    assert bool((seen == 1).all())
