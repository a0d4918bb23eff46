"""Independent writers of the other parts: Wan's own names of a VAE's, UMT5's and CLIP's weights."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]

_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def _residual(rest: str) -> str:
    module, _, parameter = rest.rpartition(".")
    return f"{_RESIDUAL[module]}.{parameter}"


def vae_original(state: State, res_blocks: int) -> dict[str, Tensor]:
    """A VAE's weights by the names of Wan 2.1's code, or of Wan 2.2's if it is of that kind."""
    residual = any(name.startswith("encoder.down_blocks.0.resnets") for name in state)
    name_of = _vae_2_2 if residual else lambda name: _vae_2_1(name, res_blocks)
    return {name_of(name): weight for name, weight in state.items()}


def _vae_common(name: str) -> str | None:
    half, _, rest = name.partition(".")
    if half in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if half == 'quant_conv' else 'conv2'}.{rest}"
    for old, new in (("conv_in", "conv1"), ("norm_out", "head.0"), ("conv_out", "head.2")):
        if rest.startswith(old + "."):
            return f"{half}.{new}.{rest.removeprefix(old + '.')}"
    if rest.startswith("mid_block.attentions.0."):
        return f"{half}.middle.1.{rest.removeprefix('mid_block.attentions.0.')}"
    if found := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", rest):
        return f"{half}.middle.{2 * int(found[1])}.{_residual(found[2])}"
    return None


def _vae_2_1(name: str, res_blocks: int) -> str:
    if common := _vae_common(name):
        return common
    if found := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.+)", name):
        plain = found[2].startswith(("resample", "time_conv"))
        return f"encoder.downsamples.{found[1]}.{found[2] if plain else _residual(found[2])}"
    found = re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", name)
    assert found, name
    # Each block of the decoder has one residual block more than the encoder's, and a resampling.
    first = int(found[1]) * (res_blocks + 2)
    if found[2] == "upsamplers":
        return f"decoder.upsamples.{first + res_blocks + 1}.{found[4]}"
    return f"decoder.upsamples.{first + int(found[3])}.{_residual(found[4])}"


def _vae_2_2(name: str) -> str:
    if common := _vae_common(name):
        return common
    found = re.fullmatch(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(.+)", name)
    assert found, name
    half, block, rest = found.groups()
    inner = "downsamples" if half.startswith("enc") else "upsamples"
    if resnet := re.fullmatch(r"resnets\.(\d+)\.(.+)", rest):
        return f"{half}samples.{block}.{inner}.{resnet[1]}.{_residual(resnet[2])}"
    # The resampling follows the block's residual blocks: two in the published encoder, three in
    # the decoder; shrunken ones have one fewer of each.
    last = vae_last[half]
    return f"{half}samples.{block}.{inner}.{last}.{rest.partition('.')[2]}"


vae_last = {"encoder.down": 2, "decoder.up": 3}

_UMT5 = [
    ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding", "attn_rel_b"),
    ("layer.0.SelfAttention.q", "attn.q", "attn_q"),
    ("layer.0.SelfAttention.k", "attn.k", "attn_k"),
    ("layer.0.SelfAttention.v", "attn.v", "attn_v"),
    ("layer.0.SelfAttention.o", "attn.o", "attn_o"),
    ("layer.0.layer_norm", "norm1", "attn_norm"),
    ("layer.1.layer_norm", "norm2", "ffn_norm"),
    ("layer.1.DenseReluDense.wi_0", "ffn.gate.0", "ffn_gate"),
    ("layer.1.DenseReluDense.wi_1", "ffn.fc1", "ffn_up"),
    ("layer.1.DenseReluDense.wo", "ffn.fc2", "ffn_down"),
]


def umt5_original(state: State, *, llama: bool = False) -> dict[str, Tensor]:
    """UMT5's encoder by the names of Wan's code, or by llama.cpp's."""
    found = {}
    for name, weight in state.items():
        if name == "encoder.embed_tokens.weight":
            continue
        new = name.replace("encoder.block.", "enc.blk." if llama else "blocks.")
        for old, wan, cpp in _UMT5:
            new = new.replace(old, cpp if llama else wan)
        new = new.replace("shared", "token_embd" if llama else "token_embedding")
        new = new.replace("encoder.final_layer_norm", "enc.output_norm" if llama else "norm")
        found[new] = weight
    return found


_CLIP = [
    ("embeddings.class_embedding", "cls_embedding"),
    ("embeddings.position_embedding.weight", "pos_embedding"),
    ("embeddings.patch_embedding", "patch_embedding"),
    ("pre_layrnorm", "pre_norm"),
    ("post_layernorm", "post_norm"),
    ("encoder.layers", "transformer"),
    ("self_attn.out_proj", "attn.proj"),
    ("layer_norm", "norm"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
]


def clip_original(state: State) -> dict[str, Tensor]:
    """CLIP's vision tower by the names of Wan's code, which joins queries, keys and values, beside
    weights of the text tower."""
    found: dict[str, Tensor] = {
        "textual.token_embedding.weight": torch.zeros(3, 4),
        "log_scale": torch.zeros(()),
    }
    for name, weight in state.items():
        plain = name.removeprefix("vision_model.")
        if match := re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(.+)", plain):
            if match[2] != "q":
                continue
            joined = [name.replace("q_proj", f"{one}_proj") for one in "qkv"]
            weight = torch.cat([state[one] for one in joined])
            plain = f"{match[1]}.attn.to_qkv.{match[3]}"
        for old, new in _CLIP:
            plain = plain.replace(old, new)
        if plain in ("cls_embedding", "pos_embedding"):
            weight = weight[None, None] if weight.ndim == 1 else weight[None]
        found[f"visual.{plain}"] = weight
    return found
