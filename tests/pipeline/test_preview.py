"""The map from latents to colours is the VAE's own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sagewan.checkpoint.find import find_model
from sagewan.pipeline.build import load_vae
from sagewan.pipeline.conditions import normalized
from sagewan.pipeline.preview import Preview, _pictures, _stored, fit_colours
from sagewan.pipeline.progress import Watch

Folder = Callable[[str], Path]


def test_colours_of_pictures_it_never_saw_come_back() -> None:
    location = find_model("demo").location
    assert location is not None
    vae = load_vae(location / "vae")
    colours = fit_colours(vae, 16)
    ramp = torch.linspace(0, 1, 128)
    unseen = torch.stack(
        [ramp.expand(128, 128), ramp[:, None].expand(128, 128), 1 - ramp.expand(128, 128)]
    )
    with torch.inference_mode():
        mode = vae.encode((unseen * 2 - 1)[None, :, None]).latent_dist.mode()
    frames = colours.frames(normalized(mode, vae)).float() / 255
    means = torch.nn.functional.avg_pool2d(unseen, 16).permute(1, 2, 0)
    assert (frames[0] - means).abs().mean() < 0.1
    # A grey picture would be farther off.
    assert (means - means.mean((0, 1))).abs().mean() > 0.2


def test_the_pictures_are_the_same_every_time() -> None:
    first, second = list(_pictures(8)), list(_pictures(8))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert len({picture.mean().item() for picture in first}) == len(first)


def test_a_preview_is_a_moving_webp_even_of_nan() -> None:
    import io

    from PIL import Image

    from sagewan.pipeline.preview import LatentColours

    preview = Preview(LatentColours(torch.rand(5, 3)), 250)
    latents = torch.rand(1, 4, 3, 6, 8)
    latents[0, :, 1] = torch.nan
    with Image.open(io.BytesIO(preview(latents))) as image:
        assert (image.format, image.size, getattr(image, "n_frames", 1)) == ("WEBP", (8, 6), 3)


def test_nobody_looks_nothing_is_drawn() -> None:
    watch = Watch()
    watch.draw_with(lambda latents: pytest.fail("drawn"))
    watch.show(1, lambda: pytest.fail("computed"))
    seen: list[tuple[int, bytes]] = []
    watch.show_to(lambda step, image: seen.append((step, image)))
    watch.draw_with(lambda latents: latents)
    watch.show(2, lambda: b"x")
    assert seen == [(2, b"x")]


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    damaged = tmp_path / "a.json"
    damaged.write_text("[[1, ")
    assert _stored(damaged) is None
    assert _stored(tmp_path / "none.json") is None
