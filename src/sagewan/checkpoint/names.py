"""Names of weights: from those of Wan's own code, of ComfyUI and of llama.cpp to those of diffusers
and transformers. Each table is written once, as pieces of a name; a test compares them with
diffusers' own conversion."""

import re
from collections.abc import Iterable, Mapping

# What stands before every name of a part, in files of one part or of several.
TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.")
VAE_PREFIXES = ("first_stage_model.", "vae.", "model.")
TEXT_ENCODER_PREFIXES = (
    "text_encoders.umt5xxl.transformer.",
    "cond_stage_model.umt5xxl.transformer.",
    "umt5xxl.transformer.",
    "text_encoder.",
)
IMAGE_ENCODER_PREFIXES = ("clip_vision.", "image_encoder.")

_TRANSFORMER: Mapping[str, str] = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "patch_embedding": "patch_embedding",
}
_BLOCK: Mapping[str, str] = {
    "modulation": "scale_shift_table",
    # Wan counts the norms in the order of its code, diffusers in that of its forward pass.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_ATTENTION: Mapping[str, str] = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}

_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


def transformer_name(name: str) -> str | None:
    """diffusers' name of a weight that Wan's own code names; None for one that Wan has not."""
    block = _LAYER.fullmatch(name)
    if block:
        inner = _in_block(block[2])
        return inner and f"blocks.{block[1]}.{inner}"
    return _renamed(name, _TRANSFORMER)


def _in_block(name: str) -> str | None:
    attention, _, rest = name.partition(".")
    if attention in _ATTENTIONS:
        inner = _renamed(rest, _ATTENTION)
        return inner and f"{_ATTENTIONS[attention]}.{inner}"
    return _renamed(name, _BLOCK)


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    """``ffn.0.weight`` by the table's ``ffn.0``; a parameter with no module stands for itself."""
    if name in table:
        return table[name]
    module, _, parameter = name.rpartition(".")
    return f"{table[module]}.{parameter}" if module in table else None


def original_transformer_name(name: str) -> str:
    """The name in Wan's own code of a weight that diffusers names so."""
    block = _LAYER.fullmatch(name)
    if block is None:
        return _renamed(name, _inverse(_TRANSFORMER)) or name
    attention, _, rest = block[2].partition(".")
    for own, theirs in _ATTENTIONS.items():
        if attention == theirs:
            inner = _renamed(rest, _inverse(_ATTENTION))
            return f"blocks.{block[1]}.{own}.{inner}"
    return f"blocks.{block[1]}.{_renamed(block[2], _inverse(_BLOCK)) or block[2]}"


def _inverse(table: Mapping[str, str]) -> Mapping[str, str]:
    return {new: old for old, new in table.items()}


# -- the VAE ---------------------------------------------------------------------------------------

_RESIDUAL: Mapping[str, str] = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_VAE: Mapping[str, str] = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{half}.{old}": f"{half}.{new}"
        for half in ("encoder", "decoder")
        for old, new in {
            "conv1": "conv_in",
            "head.0": "norm_out",
            "head.2": "conv_out",
            "middle.1.norm": "mid_block.attentions.0.norm",
            "middle.1.to_qkv": "mid_block.attentions.0.to_qkv",
            "middle.1.proj": "mid_block.attentions.0.proj",
            **{
                f"middle.{index}.{part}": f"mid_block.resnets.{index // 2}.{name}"
                for index in (0, 2)
                for part, name in _RESIDUAL.items()
            },
        }.items()
    },
}
_VAE_STAGE = re.compile(r"(encoder\.down|decoder\.up)samples\.(\d+)\.(.+)")
_VAE_STAGE_OF_2_2 = re.compile(
    r"(encoder\.down|decoder\.up)samples\.(\d+)\.\w+samples\.(\d+)\.(.+)"
)


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """Wan's names of a VAE's weights → diffusers'; a name that a Wan VAE has not is left out."""
    names = list(names)
    stages = _decoder_stages(names)
    renamed = {name: _vae_name(name, stages) for name in names}
    return {name: new for name, new in renamed.items() if new}


def _vae_name(name: str, stages: Mapping[int, tuple[int, int | None]]) -> str | None:
    if of_2_2 := _VAE_STAGE_OF_2_2.fullmatch(name):
        half, block, index, rest = of_2_2.groups()
        if rest.startswith(("resample.", "time_conv.")):
            return f"{half}_blocks.{block}.{half[8:]}sampler.{rest}"
        inner = _renamed(rest, _RESIDUAL)
        return inner and f"{half}_blocks.{block}.resnets.{index}.{inner}"
    if stage := _VAE_STAGE.fullmatch(name):
        half, number, rest = stage.groups()
        inner = rest if rest.startswith(("resample.", "time_conv.")) else _renamed(rest, _RESIDUAL)
        if half == "encoder.down" or inner is None:
            return inner and f"encoder.down_blocks.{number}.{inner}"
        block, place = stages[int(number)]
        where = "upsamplers.0" if place is None else f"resnets.{place}"
        return f"decoder.up_blocks.{block}.{where}.{inner}"
    return _renamed(name, _VAE)


def _decoder_stages(names: Iterable[str]) -> dict[int, tuple[int, int | None]]:
    """Wan 2.1 numbers the decoder's stages through; diffusers counts them by block, and a block
    ends with its resampling. Number → (block, place in the block; None for the resampling)."""
    resampling: dict[int, bool] = {}
    for name in names:
        stage = _VAE_STAGE.fullmatch(name)
        if stage and stage[1] == "decoder.up":
            number = int(stage[2])
            resamples = stage[3].startswith(("resample.", "time_conv."))
            resampling[number] = resampling.get(number, False) or resamples
    places: dict[int, tuple[int, int | None]] = {}
    block = place = 0
    for number in sorted(resampling):
        if resampling[number]:
            places[number] = block, None
            block, place = block + 1, 0
        else:
            places[number] = block, place
            place += 1
    return places


# -- UMT5 ------------------------------------------------------------------------------------------

_UMT5: Mapping[str, str] = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
}
_UMT5_BLOCK: Mapping[str, str] = {
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    # llama.cpp's
    "attn_norm": "layer.0.layer_norm",
    "ffn_norm": "layer.1.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_UMT5_STAGE = re.compile(r"(?:enc\.blk|blocks)\.(\d+)\.(.+)")


def text_encoder_name(name: str) -> str | None:
    """transformers' name of a UMT5 weight as Wan's code or llama.cpp names it."""
    if stage := _UMT5_STAGE.fullmatch(name):
        inner = _renamed(stage[2], _UMT5_BLOCK)
        return inner and f"encoder.block.{stage[1]}.{inner}"
    return _renamed(name, _UMT5)


# -- CLIP ------------------------------------------------------------------------------------------

_CLIP: Mapping[str, str] = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
}
_CLIP_BLOCK: Mapping[str, str] = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_CLIP_STAGE = re.compile(r"transformer\.(\d+)\.(.+)")


def image_encoder_names(name: str) -> tuple[str, ...]:
    """transformers' names of a weight of CLIP's vision tower as Wan's code names it, less
    ``visual.``; three for the joint projection to queries, keys and values, in this order."""
    stage = _CLIP_STAGE.fullmatch(name)
    if stage is None:
        renamed = _renamed(name, _CLIP)
        return (renamed,) if renamed else ()
    joint, _, parameter = stage[2].rpartition(".")
    if joint == "attn.to_qkv":
        return tuple(f"encoder.layers.{stage[1]}.self_attn.{one}_proj.{parameter}" for one in "qkv")
    renamed = _renamed(stage[2], _CLIP_BLOCK)
    return (f"encoder.layers.{stage[1]}.{renamed}",) if renamed else ()
