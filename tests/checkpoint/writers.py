"""Independent writers of the formats that people have: none uses a table or a function of ours.

Each takes a transformer's weights by diffusers' names, writes them in its format, and returns what
the file means: float32 by diffusers' names.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

State = Mapping[str, Tensor]
Writer = Callable[[State, Path], dict[str, Tensor]]
COMFY_PREFIX = "model.diffusion_model."

# Longest first: what diffusers calls a piece of a name, and what Wan's own code does.
_PIECES = [
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    (".norm_added_k.", ".norm_k_img."),
    (".add_k_proj.", ".k_img."),
    (".add_v_proj.", ".v_img."),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2.", ".norm3."),
    ("proj_out", "head.head"),
]


def original_name(name: str) -> str:
    """Wan's own name of a transformer's weight."""
    if name == "scale_shift_table":
        return "head.modulation"
    for diffusers, wan in _PIECES:
        name = name.replace(diffusers, wan)
    return name.replace("scale_shift_table", "modulation")


def is_quantised(name: str, weight: Tensor) -> bool:
    """The matrices of the blocks."""
    return name.startswith("blocks.") and weight.ndim == 2


def half(state: State) -> dict[str, Tensor]:
    return {name: weight.bfloat16() for name, weight in state.items()}


def meaning(state: State) -> dict[str, Tensor]:
    return {name: weight.float() for name, weight in state.items()}


# -- 16 bit ----------------------------------------------------------------------------------------


def original(state: State, path: Path) -> dict[str, Tensor]:
    plain = half(state)
    save_file({original_name(name): weight for name, weight in plain.items()}, path)
    return meaning(plain)


def comfy_16(state: State, path: Path) -> dict[str, Tensor]:
    plain = {name: weight.half() for name, weight in state.items()}
    save_file({COMFY_PREFIX + original_name(name): w for name, w in plain.items()}, path)
    return meaning(plain)


def archive(state: State, path: Path) -> dict[str, Tensor]:
    plain = half(state)
    torch.save({original_name(name): weight for name, weight in plain.items()}, path)
    return meaning(plain)


# -- FP8 and INT8 ----------------------------------------------------------------------------------


def to_fp8(weight: Tensor, dtype: torch.dtype, *, rows: bool) -> tuple[Tensor, Tensor]:
    amax = weight.float().abs().amax(1, keepdim=True) if rows else weight.float().abs().amax()
    scale = amax / torch.finfo(dtype).max
    return (weight.float() / scale).to(dtype), scale


def to_int8(weight: Tensor, *, rows: bool) -> tuple[Tensor, Tensor]:
    amax = weight.float().abs().amax(1, keepdim=True) if rows else weight.float().abs().amax()
    scale = amax / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def _quantised(
    state: State, quantise: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of the file, what they mean); ``quantise`` gives a module's tensors by ending."""
    tensors, means = {}, {}
    for name, weight in half(state).items():
        wan = original_name(name)
        if is_quantised(name, weight):
            parts, means[name] = quantise(wan.removesuffix(".weight"), weight)
            module = wan.removesuffix("weight")
            tensors |= {module + ending: tensor for ending, tensor in parts.items()}
        else:
            tensors[wan], means[name] = weight, weight.float()
    return tensors, means


def _fp8(
    dtype: torch.dtype, scale_name: str, *, rows: bool = False
) -> Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]:
    def quantise(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        data, scale = to_fp8(weight, dtype, rows=rows)
        return {"weight": data, scale_name: scale}, data.float() * scale

    return quantise


def kijai(state: State, path: Path) -> dict[str, Tensor]:
    tensors, means = _quantised(state, _fp8(torch.float8_e4m3fn, "scale_weight"))
    tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(tensors, path)
    return means


def kijai_e5m2(state: State, path: Path) -> dict[str, Tensor]:
    tensors, means = _quantised(state, _fp8(torch.float8_e5m2, "scale_weight"))
    tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e5m2)
    save_file(tensors, path)
    return means


def comfy_scaled(state: State, path: Path) -> dict[str, Tensor]:
    """With scales of the input, which carry nothing, and the marker of two elements."""

    def quantise(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, means = _fp8(torch.float8_e4m3fn, "scale_weight")(module, weight)
        return {**parts, "scale_input": torch.ones(1)}, means

    tensors, means = _quantised(state, quantise)
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file({COMFY_PREFIX + name: tensor for name, tensor in tensors.items()}, path)
    return means


def cast(state: State, path: Path) -> dict[str, Tensor]:
    """Cast to FP8, without scales."""
    plain = half(state)
    stored = {
        name: weight.to(torch.float8_e4m3fn) if is_quantised(name, weight) else weight
        for name, weight in plain.items()
    }
    save_file({original_name(name): weight for name, weight in stored.items()}, path)
    return meaning(stored)


def lightx2v_fp8(state: State, path: Path) -> dict[str, Tensor]:
    tensors, means = _quantised(state, _fp8(torch.float8_e4m3fn, "weight_scale", rows=True))
    save_file(tensors, path)
    return means


def lightx2v_int8(state: State, path: Path) -> dict[str, Tensor]:
    def quantise(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        data, scale = to_int8(weight, rows=True)
        return {"weight": data, "weight_scale": scale}, data.float() * scale

    tensors, means = _quantised(state, quantise)
    save_file(tensors, path)
    return means


def lightx2v_blocks(state: State, path: Path) -> dict[str, Tensor]:
    """A folder with a file for each block, and one for the rest."""
    tensors, means = _quantised(state, _fp8(torch.float8_e4m3fn, "weight_scale", rows=True))
    path.mkdir()
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        block = name.split(".")[1] if name.startswith("blocks.") else None
        stem = "non_block" if block is None else f"block_{block}"
        files.setdefault(stem, {})[name] = tensor
    for stem, found in files.items():
        save_file(found, path / f"{stem}.safetensors")
    return means


# -- ComfyUI's quantised layers --------------------------------------------------------------------


def spelled(**settings: object) -> Tensor:
    """JSON as ComfyUI keeps it in a tensor."""
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def comfy_quant_fp8(state: State, path: Path) -> dict[str, Tensor]:
    def quantise(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        data, scale = to_fp8(weight, torch.float8_e4m3fn, rows=False)
        mark = spelled(format="float8_e4m3fn", full_precision_matrix_mult=True)
        parts = {"weight": data, "weight_scale": scale, "comfy_quant": mark}
        return {**parts, "input_scale": torch.ones(())}, data.float() * scale

    tensors, means = _quantised(state, quantise)
    save_file({COMFY_PREFIX + name: tensor for name, tensor in tensors.items()}, path)
    return means


def comfy_metadata_int8(state: State, path: Path) -> dict[str, Tensor]:
    """The same word for all layers in the header instead."""
    layers = {}

    def quantise(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        data, scale = to_int8(weight, rows=False)
        layers[module] = {"format": "int8_tensorwise"}
        return {"weight": data, "weight_scale": scale}, data.float() * scale

    tensors, means = _quantised(state, quantise)
    text = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(tensors, path, metadata={"_quantization_metadata": text})
    return means


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def to_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ codes 0 to 15 [N, K], block scales e4m3 [N, K/16], the tensor's scale, and the meaning."""
    weight = weight.float()
    # A power of two, so that a file that holds its reciprocal means the same bit for bit.
    tensor_scale = (weight.abs().amax() / 2688).log2().ceil().exp2()
    blocks = weight.unflatten(1, (-1, 16))
    scales = (blocks.abs().amax(-1) / 6 / tensor_scale).to(torch.float8_e4m3fn)
    steps = scales.float() * tensor_scale
    ratio = torch.where(steps[..., None] > 0, blocks / steps[..., None], 0)
    codes = (ratio.abs()[..., None] - _E2M1).abs().argmin(-1)
    values = _E2M1[codes] * ratio.sign()
    codes = (codes + 8 * (ratio < 0)).to(torch.uint8)
    return codes.flatten(1), scales, tensor_scale, (values * steps[..., None]).flatten(1)


def packed_nibbles(codes: Tensor, *, high_first: bool) -> Tensor:
    first, second = codes[:, 0::2], codes[:, 1::2]
    return (first << 4) | second if high_first else first | (second << 4)


def swizzled(scales: Tensor) -> Tensor:
    """cuBLAS's order of block scales: tiles of 128 rows by 4 blocks, in each tile 32 × 4 × 4."""
    rows, blocks = scales.shape
    padded = np.zeros((-(-rows // 128) * 128, -(-blocks // 4) * 4), np.uint8)
    padded[:rows, :blocks] = scales.view(torch.uint8).numpy()
    out = np.zeros(padded.size, np.uint8)
    for row in range(padded.shape[0]):
        for block in range(padded.shape[1]):
            tile = (row // 128) * (padded.shape[1] // 4) + block // 4
            inside = (row % 32) * 16 + (row % 128 // 32) * 4 + block % 4
            out[tile * 512 + inside] = padded[row, block]
    return torch.from_numpy(out.reshape(padded.shape)).view(scales.dtype)


def comfy_nvfp4(state: State, path: Path) -> dict[str, Tensor]:
    def quantise(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales, tensor_scale, means = to_nvfp4(weight)
        return {
            "weight": packed_nibbles(codes, high_first=True),
            "weight_scale": swizzled(scales),
            "weight_scale_2": tensor_scale,
            "comfy_quant": spelled(format="nvfp4"),
        }, means

    tensors, means = _quantised(state, quantise)
    save_file(tensors, path)
    return means


def lightx2v_nvfp4(state: State, path: Path) -> dict[str, Tensor]:
    def quantise(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales, tensor_scale, means = to_nvfp4(weight)
        of_input = torch.tensor(512.0)
        return {
            "weight": packed_nibbles(codes, high_first=False),
            "weight_scale": swizzled(scales),
            "input_global_scale": of_input,
            "alpha": tensor_scale / of_input,
        }, means

    tensors, means = _quantised(state, quantise)
    save_file(tensors, path)
    return means


def lightx2v_nvfp4_calibrated(state: State, path: Path) -> dict[str, Tensor]:
    def quantise(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales, tensor_scale, means = to_nvfp4(weight)
        return {
            "weight": packed_nibbles(codes, high_first=False),
            "weight_scale": swizzled(scales),
            "weight_global_scale": 1 / tensor_scale,
            "input_absmax": torch.tensor(3.0),
        }, means

    tensors, means = _quantised(state, quantise)
    save_file(tensors, path)
    return means


def comfy_mxfp8(state: State, path: Path) -> dict[str, Tensor]:
    def quantise(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        blocks = weight.float().unflatten(1, (-1, 32))
        exponents = (blocks.abs().amax(-1) / 448).log2().ceil().clamp(-127, 127)
        data = (blocks / exponents.exp2()[..., None]).to(torch.float8_e4m3fn)
        return {
            "weight": data.flatten(1),
            "weight_scale": swizzled((exponents + 127).to(torch.uint8)),
            "comfy_quant": spelled(format="mxfp8"),
        }, (data.float() * exponents.exp2()[..., None]).flatten(1)

    tensors, means = _quantised(state, quantise)
    save_file(tensors, path)
    return means


# -- GGUF ------------------------------------------------------------------------------------------

_PLAIN = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}


def to_q6_k(rows: np.ndarray) -> np.ndarray:
    """float32 [N, K] → bytes [N, K / 256 · 210]: 6 bits with a factor of 8 bits for each 16."""
    blocks = rows.reshape(-1, 16, 16)
    amax = np.abs(blocks).max(-1)
    factor = (amax.max(-1) / 31 / 127).astype(np.float16)
    factors = _six_bit_factors(amax, factor)
    steps = factor.astype(np.float32)[:, None] * factors
    numbers = np.where(steps[..., None] > 0, blocks / np.where(steps > 0, steps, 1)[..., None], 0)
    codes = (np.clip(np.rint(numbers), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = codes & 0xF
    quarters = np.concatenate(
        [low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], -1
    )
    high = codes >> 4
    tops = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    parts = [
        quarters.reshape(-1, 128),
        tops.reshape(-1, 64),
        factors.astype(np.int8).view(np.uint8),
        factor.reshape(-1, 1).view(np.uint8),
    ]
    return np.concatenate(parts, -1).reshape(rows.shape[0], -1)


def _six_bit_factors(amax: np.ndarray, factor: np.ndarray) -> np.ndarray:
    whole = np.where(factor > 0, factor, 1).astype(np.float32)[:, None]
    return np.clip(np.rint(amax / 31 / whole), 0, 127)


def gguf_writer(kind: str, architecture: str | None = "wan") -> Writer:
    """The matrices of the blocks in this type, the rest in F32 or F16; five sides as ComfyUI's
    converter writes them."""

    def write(state: State, path: Path) -> dict[str, Tensor]:
        writer = gguf.GGUFWriter(None, architecture or "wan")
        means = {}
        for name, weight in state.items():
            wan, values = original_name(name), weight.float().numpy()
            if values.ndim > 4:
                writer.add_array(f"comfy.gguf.orig_shape.{wan}", list(values.shape))
                values = values.reshape(values.shape[0], -1)
            kept = "F32" if "modulation" in wan or values.ndim == 1 else "F16"
            means[name] = _add(writer, wan, values, kind if is_quantised(name, weight) else kept)
            means[name] = means[name].view(weight.shape)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return means

    return write


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> Tensor:
    number = gguf.GGMLQuantizationType[kind]
    data = to_q6_k(values) if kind == "Q6_K" else gguf.quants.quantize(values, number)
    if kind == "BF16":
        data = np.ascontiguousarray(data)
    writer.add_tensor(name, data, raw_dtype=number)
    return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(data, number))).float()


WRITERS: dict[str, tuple[str, Writer]] = {
    "original.safetensors": ("bfloat16", original),
    "comfy_16.safetensors": ("float16", comfy_16),
    "original.pth": ("bfloat16", archive),
    "kijai.safetensors": ("float8_e4m3fn", kijai),
    "kijai_e5m2.safetensors": ("float8_e5m2", kijai_e5m2),
    "comfy_scaled.safetensors": ("float8_e4m3fn", comfy_scaled),
    "cast.safetensors": ("float8_e4m3fn", cast),
    "lightx2v_fp8.safetensors": ("float8_e4m3fn", lightx2v_fp8),
    "lightx2v_int8.safetensors": ("int8", lightx2v_int8),
    "lightx2v_blocks": ("float8_e4m3fn", lightx2v_blocks),
    "comfy_quant.safetensors": ("float8_e4m3fn", comfy_quant_fp8),
    "comfy_metadata.safetensors": ("int8", comfy_metadata_int8),
    "comfy_nvfp4.safetensors": ("nvfp4", comfy_nvfp4),
    "lightx2v_nvfp4.safetensors": ("nvfp4", lightx2v_nvfp4),
    "lightx2v_nvfp4_2.safetensors": ("nvfp4", lightx2v_nvfp4_calibrated),
    "comfy_mxfp8.safetensors": ("mxfp8", comfy_mxfp8),
    "f16.gguf": ("float16", gguf_writer("F16")),
    "bf16.gguf": ("bfloat16", gguf_writer("BF16")),
    "q8_0.gguf": ("gguf:Q8_0", gguf_writer("Q8_0")),
    "q5_1.gguf": ("gguf:Q5_1", gguf_writer("Q5_1")),
    "q4_0.gguf": ("gguf:Q4_0", gguf_writer("Q4_0")),
    "q6_k.gguf": ("gguf:Q6_K", gguf_writer("Q6_K")),
}
