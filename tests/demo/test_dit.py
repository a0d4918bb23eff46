"""The cheaper forward equals the model's own, with 512 padded tokens and a time per token."""

import dit
import models
import pytest
import sample
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

PROMPTS = ["a red ball rolls to the right", "灰色背景上，一颗蓝色的小星星变大", ""]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tokenizer = models.build_tokenizer()
    transformer = models.build_transformer(layers=2).eval()
    for parameter in transformer.parameters():
        if parameter.ndim == 1:  # fresh norms and biases hide mistakes
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    encoder = models.build_text_encoder(len(tokenizer)).eval()
    return sample.Parts(models.build_vae().eval(), transformer, encoder, tokenizer)


def padded_to_512(parts):
    """As WanPipeline does it: encode with the mask, cut, pad with zeros."""
    found = parts.tokenizer(
        PROMPTS, padding="max_length", max_length=512, return_attention_mask=True
    )
    ids, mask = torch.tensor(found["input_ids"]), torch.tensor(found["attention_mask"])
    return parts.text_encoder(ids, mask).last_hidden_state * mask[..., None]


@torch.no_grad()
def test_forward_equals_the_model(parts):
    latents = torch.randn(3, models.LATENT_CHANNELS, 3, 4, 6)
    times = torch.tensor([[700.0, 700.0], [0.0, 300.0], [0.0, 999.0]])
    tokens = torch.cat([times[:, :1].expand(-1, 6), times[:, 1:].expand(-1, 12)], 1)
    wanted = parts.transformer(latents, tokens, padded_to_512(parts)).sample
    text = dit.embed_text(parts.text_encoder, sample.token_ids(parts.tokenizer, PROMPTS))
    found = dit.forward(parts.transformer, latents, times, text)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def pipeline_parts(parts):
    return {
        "tokenizer": parts.tokenizer,
        "text_encoder": parts.text_encoder,
        "vae": parts.vae,
        "scheduler": models.build_scheduler(),
        "transformer": parts.transformer,
        "expand_timesteps": True,
    }


@pytest.mark.parametrize("with_image", [False, True])
def test_sampler_equals_the_pipeline(parts, with_image):
    side = 32
    noise = torch.randn(1, models.LATENT_CHANNELS, 3, 2, 2)
    image = torch.rand(1, 3, side, side)
    kind = WanImageToVideoPipeline if with_image else WanPipeline
    pipeline = kind(**pipeline_parts(parts))
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        prompt=PROMPTS[0],
        height=side,
        width=side,
        num_frames=9,
        num_inference_steps=models.DEFAULTS["steps"],
        guidance_scale=models.DEFAULTS["cfg"],
        latents=noise.clone(),
        output_type="latent",
        **({"image": image} if with_image else {}),
    ).frames
    first = None
    if with_image:
        with torch.no_grad():
            first = sample.encode(parts, image[:, :, None])
    found = sample.generate(parts, PROMPTS[:1], noise, first)
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()
