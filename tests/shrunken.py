"""Shrunken folders of each published architecture: narrow and shallow, everything else real.

Saved by diffusers' own ``save_pretrained``. The weights are random from a seed, scaled so that
activations neither die nor grow, and no weight is zero: a part that is skipped shows.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.published import PIPELINES, TRANSFORMERS, VAES

TEXT_DIM = 32
CLIP_DIM = 32
HEADS = 2
PROMPT = "a small cat walks on the grass"
NEGATIVE = "blurred static low quality"
_WORDS = sorted({*PROMPT.split(), *NEGATIVE.split()})


def save(name: str, folder: Path) -> Path:
    """Write the shrunken form of a published model and return its folder."""
    pipeline(name).save_pretrained(folder)
    return folder


def pipeline(name: str) -> Any:
    """diffusers' pipeline of a published model, shrunken, with random weights."""
    import diffusers

    index = dict(PIPELINES[name])
    pipeline_class = getattr(diffusers, index.pop("_class_name"))
    parts: dict[str, Any] = {
        "tokenizer": tokenizer(),
        "text_encoder": filled(text_encoder(), 1),
        "vae": filled(diffusers.AutoencoderKLWan(**vae_config(name)), 2),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "transformer": transformer(name, 3),
    }
    if "boundary_ratio" in index:
        parts["transformer_2"] = transformer(name, 4)
    if TRANSFORMERS[name]["image_dim"] is not None:
        parts["image_encoder"] = filled(image_encoder(), 5)
        parts["image_processor"] = image_processor()
    return pipeline_class(**parts, **index)


def transformer(name: str, seed: int) -> Any:
    from diffusers import WanTransformer3DModel

    return filled(WanTransformer3DModel(**transformer_config(name)), seed)


def transformer_config(name: str) -> dict[str, Any]:
    """The published config, made 2 heads wide and 2 layers deep."""
    config = {
        **TRANSFORMERS[name],
        "num_attention_heads": HEADS,
        "num_layers": 2,
        "ffn_dim": 192,
        "text_dim": TEXT_DIM,
    }
    if config["image_dim"] is not None:
        config |= {"image_dim": CLIP_DIM, "added_kv_proj_dim": HEADS * 128}
    return config


def vae_config(name: str) -> dict[str, Any]:
    """The published config, narrow, with latents that are neither centred nor of unit size."""
    config = {**VAES[name], "base_dim": 8, "num_res_blocks": 1}
    channels = config["z_dim"]
    config["latents_mean"] = [0.1 * (channel % 5 - 2) for channel in range(channels)]
    config["latents_std"] = [0.5 + 0.1 * (channel % 7) for channel in range(channels)]
    if "decoder_base_dim" in config:
        config["decoder_base_dim"] = 8
    return config


def text_encoder() -> Any:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(_WORDS) + 3,
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def image_encoder() -> Any:
    """257 tokens, as the real one: their number is written into the first-last-frame model."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=CLIP_DIM,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=224,
            patch_size=14,
        )
    )


def image_processor() -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil()


def tokenizer() -> Any:
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {word: index + 3 for index, word in enumerate(_WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    words.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@torch.no_grad()
def filled(module: Any, seed: int) -> Any:
    """Every parameter drawn anew: matrices keep the variance of what passes through them."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(module.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if "embed_tokens" in name or "shared" in name or "position_embedding" in name:
            weight.copy_(noise)
        elif weight.ndim > 1 and "table" not in name:
            weight.copy_(noise / weight[0].numel() ** 0.5)
        elif "gamma" in name or (weight.ndim == 1 and name.endswith("weight")):
            weight.copy_(1 + 0.1 * noise)
        else:
            weight.copy_(0.1 * noise)
    return module.eval()


def load_pipeline(folder: Path, *, with_picture: bool) -> Any:
    """diffusers' own pipeline for a task, read back from a folder in float32."""
    import diffusers

    pipeline_class = diffusers.WanImageToVideoPipeline if with_picture else diffusers.WanPipeline
    loaded = pipeline_class.from_pretrained(folder, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded
