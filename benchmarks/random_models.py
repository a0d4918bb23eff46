"""Whole Wan models of random weights: every block of a model is made from one block's."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.watching import DEVICE, HELD
from sagewan.attention.launch import Launcher
from sagewan.checkpoint.quantize import pack
from sagewan.model.attention import Attention
from sagewan.model.blocks import Blocks
from sagewan.model.linear import Multiplier, QuantLinear
from sagewan.model.vae import with_channels_last
from sagewan.pipeline import build as building
from sagewan.pipeline.fill import kept_in_float32
from sagewan.pipeline.loaded import Part
from sagewan.pipeline.session import Session
from sagewan.pipeline.step_cache import Forwards
from sagewan.plan.decoding import EXACT, Decoding
from sagewan.plan.models import Model
from sagewan.plan.plan import Plan
from tests.published import TRANSFORMERS, VAES


@contextmanager
def random_models(made: list[Any]) -> Iterator[None]:
    """Let a run build models of random weights in place of files."""

    def build(
        plan: Plan, launcher: Launcher, _session: Session | None = None, _watch: Any = None
    ) -> Any:
        names = ("transformer", "transformer_2")[: plan.model.experts]
        components = building.Components(
            tokenizer=tokenize,
            text_encoder=Part(
                "text_encoder", _told("encode", _text_encoder), lambda m: m.encoder.block
            ),
            vae=Part("vae", lambda: random_vae(plan.model, EXACT)),
            # It is made anew of its files too, so these are no stand-ins for their pages.
            decoder=Part("vae", lambda: random_vae(plan.model, plan.decoding)),
            transformers=tuple(
                Part(name, _told("denoise", lambda: random_transformer(plan)), lambda m: m.blocks)
                for name in names
            ),
            image_encoder=None,
            image_processor=None,
            attention=Attention(launcher),
            multiplier=Multiplier(),
            forwards=Forwards(),
            blocks=Blocks(),
        )
        made.append(components)
        return components

    with mock.patch.object(building, "build", build):
        yield


def _told(stage: str, make: Callable[[], Any]) -> Callable[[], Any]:
    """The same, and the bytes of what it makes are noted."""

    def made() -> Any:
        began = time.perf_counter()
        module = make()
        print(f"{time.perf_counter() - began:7.1f} s to make it", file=sys.stderr, flush=True)
        tensors = [*module.parameters(), *module.buffers()]
        storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}
        HELD["stand_ins"][stage] = sum(storages.values())
        return module

    return made


def tokenize(_texts: Any, **_: Any) -> Any:
    tokens = mock.Mock()
    tokens.input_ids = torch.arange(512)[None] % 1000
    tokens.attention_mask = (torch.arange(512) < 40)[None].long()
    return tokens


def random_transformer(plan: Plan) -> Any:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    config = {**TRANSFORMERS[plan.model.name], "num_layers": plan.model.layers}
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    dtype: torch.dtype = getattr(torch, plan.dtype)
    kept = kept_in_float32(WanTransformer3DModel)
    first = model.blocks[0]
    _fill(first, dtype, kept)
    if plan.weights.format:
        for name, layer in list(first.named_modules()):
            if isinstance(layer, torch.nn.Linear) and plan.weights.quantises(f"blocks.0.{name}"):
                packed = pack(layer.weight.data.to(DEVICE), plan.weights.format).to("cpu")
                bias = None if layer.bias is None else layer.bias.data
                first.set_submodule(name, QuantLinear(packed, bias, dtype))
    blocks = [first, *(_alike(first, block) for block in list(model.blocks)[1:])]
    model.blocks = torch.nn.ModuleList(blocks)
    _fill(model, dtype, kept)
    # The rotary table is a buffer that is computed.
    fresh = type(model.rope)(config["attention_head_dim"], tuple(config["patch_size"]), 1024)
    model.rope = fresh
    return model


def _alike(first: Any, block: Any) -> Any:
    """A block with the first one's weights: the same storages, tensors of its own."""
    for name, layer in list(first.named_modules()):
        if isinstance(layer, QuantLinear):
            bias = None if layer.bias is None else layer.bias.data
            own = QuantLinear(layer.packed, bias, layer.dtype)
            for key, buffer in list(own.named_buffers()):
                setattr(own, key, buffer.detach())
            block.set_submodule(name, own)
    sources = dict(first.named_parameters())
    for name, _ in list(block.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        parameter = torch.nn.Parameter(sources[name].data, requires_grad=False)
        setattr(block.get_submodule(owner), attribute, parameter)
    return block


def _fill(module: Any, dtype: torch.dtype, kept: tuple[str, ...] = ()) -> None:
    """Random values in place of each parameter that has none; norms are one."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        kind = torch.float32 if any(part in name.split(".") for part in kept) else dtype
        shape = parameter.shape
        if len(shape) < 2 and name.endswith("weight"):
            value = torch.ones(shape, dtype=kind)
        else:
            scale = 0.02 if len(shape) < 3 else 1 / max(1, shape[1:].numel()) ** 0.5
            drawn = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float16)
            value = (drawn * scale).to(kind).cpu()
        owner, _, attribute = name.rpartition(".")
        found = torch.nn.Parameter(value, requires_grad=False)
        setattr(module.get_submodule(owner) if owner else module, attribute, found)
    torch.cuda.empty_cache()


def _text_encoder() -> Any:
    """UMT5-XXL; its blocks share one block's weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_ff=10240,
        d_kv=64,
        num_heads=64,
        num_layers=24,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        encoder = UMT5EncoderModel(config)
    first, *others = encoder.encoder.block
    _fill(first, torch.bfloat16)
    for block in others:
        _alike(first, block)
    _fill(encoder.encoder.final_layer_norm, torch.bfloat16)
    words = torch.nn.Parameter(torch.zeros(256384, 4096, dtype=torch.bfloat16), requires_grad=False)
    encoder.shared.weight = words
    encoder.encoder.embed_tokens.weight = words
    return encoder


def random_vae(model: Model, decoding: Decoding) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    # The means and deviations, of which the published ones have as many, are no matter here.
    channels = model.latent_channels
    plain = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    with torch.device("meta"):
        vae = AutoencoderKLWan(**VAES[model.name], **plain)
    _fill(vae, getattr(torch, decoding.dtype))
    # A quiet picture: noise takes longer to write than to make.
    vae.decoder.conv_out.weight.data *= 0.1
    return with_channels_last(vae) if decoding.channels_last else vae
