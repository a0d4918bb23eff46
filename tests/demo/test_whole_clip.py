"""One pass over the whole clip gives what diffusers' chunk loop gives."""

import models
import pytest
import torch
import whole_clip


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = models.build_vae().eval()
    for parameter in vae.parameters():  # fresh norms and biases hide mistakes
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return vae


@pytest.mark.parametrize("frames", [1, 5, 13])
@torch.no_grad()
def test_encode_equals_chunks(vae, frames):
    video = torch.rand(2, 3, frames, 32, 48) * 2 - 1
    wanted = vae.encode(video).latent_dist
    mean, log_variance = whole_clip.encode(vae, video)
    assert torch.allclose(mean, wanted.mean, atol=1e-5)
    assert torch.allclose(log_variance, wanted.logvar, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 4])
@torch.no_grad()
def test_decode_equals_chunks(vae, frames):
    latents = torch.randn(2, models.LATENT_CHANNELS, frames, 2, 3)
    wanted = vae.decode(latents).sample
    video = whole_clip.decode(vae, latents).clamp(-1, 1)
    assert (video - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_first_latent_is_the_first_picture_alone(vae):
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    whole, _ = whole_clip.encode(vae, video)
    alone, _ = whole_clip.encode(vae, video[:, :, :1])
    assert torch.allclose(whole[:, :, :1], alone, atol=1e-5)
