"""Which part of a model tensors are, by their names, and what diffusers calls them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from sagewan.checkpoint.names import (
    IMAGE_ENCODER_PREFIXES,
    TEXT_ENCODER_PREFIXES,
    TRANSFORMER_PREFIXES,
    VAE_PREFIXES,
    image_encoder_names,
    text_encoder_name,
    transformer_name,
    vae_names,
)

TRANSFORMER = "transformer"
VAE = "vae"
TEXT_ENCODER = "text_encoder"
IMAGE_ENCODER = "image_encoder"

# One name of a file → the weights it holds, by diffusers' names: several where it holds them
# joined, none where the part has no such weight.
Renaming = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Role:
    """A part of a model. ``signs`` are names that only this part has, with the layout they tell;
    ``unused`` the beginnings of names that belong to it and that nothing here reads."""

    name: str
    prefixes: tuple[str, ...]
    signs: Mapping[str, str]
    rename: Callable[[Collection[str], str], Renaming]
    unused: tuple[str, ...] = ()

    def found_in(self, names: Collection[str]) -> tuple[str, str] | None:
        """(prefix, layout) if the names are this part's, or hold this part among others."""
        for prefix in ("", *self.prefixes):
            for sign, layout in self.signs.items():
                if prefix + sign in names:
                    return prefix, layout
        return None


def _transformer(names: Collection[str], layout: str) -> Renaming:
    if layout == "diffusers":
        return {name: (name,) for name in names}
    found = {name: transformer_name(name) for name in names}
    return {name: (new,) if new else () for name, new in found.items()}


def _vae(names: Collection[str], layout: str) -> Renaming:
    if layout == "diffusers":
        return {name: (name,) for name in names}
    found = vae_names(names)
    return {name: (found[name],) if name in found else () for name in names}


def _text_encoder(names: Collection[str], layout: str) -> Renaming:
    if layout == "transformers":
        # The input's embedding is one tensor under two names, or under either.
        doubled, first = "encoder.embed_tokens.weight", "shared.weight"
        own = {doubled: () if first in names else (first,)}
        return {name: own.get(name, (name,)) for name in names}
    found = {name: text_encoder_name(name) for name in names}
    return {name: (new,) if new else () for name, new in found.items()}


def _image_encoder(names: Collection[str], layout: str) -> Renaming:
    if layout == "original":
        return {
            name: image_encoder_names(name.removeprefix("visual."))
            if name.startswith("visual.")
            else ()
            for name in names
        }
    return {name: (name.removeprefix("vision_model."),) for name in names}


ROLES: Mapping[str, Role] = {
    role.name: role
    for role in (
        Role(
            name=TRANSFORMER,
            prefixes=TRANSFORMER_PREFIXES,
            signs={
                "blocks.0.self_attn.q.weight": "original",
                "blocks.0.attn1.to_q.weight": "diffusers",
            },
            rename=_transformer,
        ),
        Role(
            name=VAE,
            prefixes=VAE_PREFIXES,
            signs={
                "decoder.middle.0.residual.0.gamma": "original",
                "decoder.mid_block.resnets.0.norm1.gamma": "diffusers",
            },
            rename=_vae,
        ),
        Role(
            name=TEXT_ENCODER,
            prefixes=TEXT_ENCODER_PREFIXES,
            signs={
                "encoder.block.0.layer.0.SelfAttention.q.weight": "transformers",
                "blocks.0.attn.q.weight": "original",
                "enc.blk.0.attn_q.weight": "llama.cpp",
            },
            rename=_text_encoder,
            unused=("spiece_model", "logit_scale", "decoder.", "lm_head."),
        ),
        Role(
            name=IMAGE_ENCODER,
            prefixes=IMAGE_ENCODER_PREFIXES,
            signs={
                "visual.transformer.0.attn.to_qkv.weight": "original",
                "vision_model.encoder.layers.0.self_attn.q_proj.weight": "transformers",
                "encoder.layers.0.self_attn.q_proj.weight": "transformers",
            },
            rename=_image_encoder,
            unused=("textual.", "text_model.", "visual.head", "visual_projection.",
                    "text_projection.", "log_scale", "logit_scale",
                    "vision_model.embeddings.position_ids", "embeddings.position_ids"),
        ),
    )
}  # fmt: skip
