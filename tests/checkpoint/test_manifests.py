"""Every reader over the names and shapes of the published checkpoints, at full size: files of many
gigabytes whose data are holes, so that they take no disk and no time."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from sagewan.checkpoint.architecture import Architecture
from sagewan.checkpoint.experts import find_experts
from sagewan.checkpoint.infer import config_of, main_format
from sagewan.checkpoint.inspection import inspect
from sagewan.checkpoint.packed import Packed
from sagewan.checkpoint.source import Source, open_source
from sagewan.plan.models import PUBLISHED
from tests.checkpoint import part_writers
from tests.checkpoint.manifests import CLIP_H, UMT5_XXL, Shapes, load, names
from tests.checkpoint.writers import original_name
from tests.published import TRANSFORMERS, VAES

BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1, "U8": 1}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def sparse(tensors: Tensors, path: Path, ones: Mapping[str, float]) -> None:
    """A safetensors file of this size whose data are all holes, but for these float32 scales."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        for name, value in ones.items():
            file.seek(begin + header[name]["data_offsets"][0])
            count = math.prod(tensors[name][1])
            file.write(torch.full((count,), value).numpy().tobytes())
        file.truncate(begin + end)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("blocks.") and len(shape) == 2


def plain(shapes: Shapes, path: Path) -> None:
    sparse({original_name(n): ("BF16", shape) for n, shape in shapes.items()}, path, {})


def kijai(shapes: Shapes, path: Path) -> None:
    found: Tensors = {"scaled_fp8": ("F8_E4M3", (0,))}
    for name, shape in shapes.items():
        wan = original_name(name)
        found[wan] = ("F8_E4M3" if is_matrix(name, shape) else "F32", shape)
        if is_matrix(name, shape):
            found[wan.replace(".weight", ".scale_weight")] = ("F32", ())
    sparse(found, path, {name: 1e-3 for name in found if name.endswith("scale_weight")})


def lightx2v(shapes: Shapes, path: Path) -> None:
    found: Tensors = {}
    for name, shape in shapes.items():
        wan = original_name(name)
        found[wan] = ("I8" if is_matrix(name, shape) else "BF16", shape)
        if is_matrix(name, shape):
            found[wan + "_scale"] = ("F32", (shape[0], 1))
    sparse(found, path, {name: 1e-3 for name in found if name.endswith("_scale")})


def comfy_nvfp4(shapes: Shapes, path: Path) -> None:
    found: Tensors = {}
    for name, shape in shapes.items():
        wan = "model.diffusion_model." + original_name(name)
        if is_matrix(name, shape):
            blocks = (-(-shape[0] // 128) * 128, -(-(shape[1] // 16) // 4) * 4)
            found[wan] = ("U8", (shape[0], shape[1] // 2))
            found[wan + "_scale"] = ("F8_E4M3", blocks)
            found[wan + "_scale_2"] = ("F32", ())
        else:
            found[wan] = ("BF16", shape)
    sparse(found, path, {name: 1e-4 for name in found if name.endswith("_scale_2")})


def q4_k(shapes: Shapes, path: Path) -> None:
    writer = gguf.GGUFWriter(None, "wan")
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.F32
        if is_matrix(name, shape):
            kind = gguf.GGMLQuantizationType.Q4_K
        wan, stored = original_name(name), shape
        if len(shape) > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{wan}", list(shape))
            stored = (shape[0], math.prod(shape[1:]))
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = math.prod(stored) // block * size
        bytes_shape = (*stored[:-1], stored[-1] // block * size) if block > 1 else stored
        dtype = torch.uint8 if block > 1 else torch.float32
        writer.add_tensor_info(wan, bytes_shape, torch.empty(0, dtype=dtype).numpy().dtype, nbytes,
                               raw_dtype=kind)  # fmt: skip
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    ends = [
        gguf.GGUFWriter.ggml_pad(info.nbytes, 32)
        for group in writer.tensors
        for info in group.values()
    ]
    writer.close()
    begin = -(-path.stat().st_size // 32) * 32
    with path.open("r+b") as file:
        file.truncate(begin + sum(ends))


WRITERS: dict[str, tuple[str, Callable[[Shapes, Path], None]]] = {
    "plain.safetensors": ("bfloat16", plain),
    "kijai.safetensors": ("float8_e4m3fn", kijai),
    "lightx2v.safetensors": ("int8", lightx2v),
    "comfy_nvfp4.safetensors": ("nvfp4", comfy_nvfp4),
    "q4_k.gguf": ("gguf:Q4_K", q4_k),
}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *((name, "plain.safetensors") for name in PUBLISHED),
        *((name, file) for name in ("wan2.1-i2v-14b", "wan2.2-t2v-a14b") for file in WRITERS),
        ("wan2.1-t2v-14b", "kijai.safetensors"),
        ("wan2.2-ti2v-5b", "q4_k.gguf"),
    ],
)
def test_a_transformer_of_full_size(name: str, file: str, tmp_path: Path) -> None:
    kind, write = WRITERS[file]
    path = tmp_path / file
    if PUBLISHED[name].experts == 2:
        path = tmp_path / f"high_noise_{file}"
        write(load(name), tmp_path / f"low_noise_{file}")
    write(load(name), path)
    source = open_source(path, "transformer")
    assert {key: entry.shape for key, entry in source.entries.items()} == load(name)
    assert main_format(source) == kind
    config = config_of(source)
    wanted = TRANSFORMERS[name]
    assert {key: config[key] for key in wanted} == wanted
    assert find_experts(path).architecture.parameters == PUBLISHED[name].parameters
    assert Architecture.of(config, path).shapes() == load(name)
    found = inspect(path)
    assert found.problems == []
    assert found.name == name
    # Of one file nothing tells whether it is Wan 2.1's or an expert of Wan 2.2's; that is said.
    assert any("is taken for wan2.1-t2v-14b" in note for note in found.notes) == (
        name == "wan2.1-t2v-14b"
    )
    matrix = source.read("blocks.7.ffn.net.0.proj.weight")
    shape = load(name)["blocks.7.ffn.net.0.proj.weight"]
    assert matrix.shape == shape
    assert isinstance(matrix, Packed) == (kind != "bfloat16")


def part(name: str, tensors: Shapes, path: Path) -> Source:
    sparse({key: ("BF16", shape) for key, shape in tensors.items()}, path, {})
    return open_source(path, name)


@pytest.mark.parametrize(
    ("kind", "of"), [("vae-2.1", "wan2.1-t2v-14b"), ("vae-2.2", "wan2.2-ti2v-5b")]
)
def test_the_vaes(kind: str, of: str, tmp_path: Path) -> None:
    shapes = load(kind)
    # The writer takes tensors; their shapes are all it looks at.
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    originals = part_writers.vae_original(empty, res_blocks=2)
    source = part(
        "vae", {n: tuple(x.shape) for n, x in originals.items()}, tmp_path / "a.safetensors"
    )
    assert {key: entry.shape for key, entry in source.entries.items()} == shapes
    config = config_of(source)
    assert {key: config[key] for key in VAES[of]} == VAES[of]


@pytest.mark.parametrize("llama", [False, True])
def test_the_text_encoder(llama: bool, tmp_path: Path) -> None:
    shapes = load("umt5-xxl")
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    originals = part_writers.umt5_original(empty, llama=llama)
    tensors = {name: tuple(x.shape) for name, x in originals.items()}
    source = part("text_encoder", tensors, tmp_path / "a.safetensors")
    assert {key: entry.shape for key, entry in source.entries.items()} == shapes
    config = config_of(source)
    assert {key: config[key] for key in UMT5_XXL} == UMT5_XXL


def test_the_image_encoder(tmp_path: Path) -> None:
    source = part("image_encoder", load("clip-h"), tmp_path / "a.safetensors")
    assert {key: entry.shape for key, entry in source.entries.items()} == load("clip-h")
    config: dict[str, Any] = config_of(source)
    assert {key: config[key] for key in CLIP_H} == CLIP_H


def test_the_manifests_hold_every_published_model() -> None:
    assert set(PUBLISHED) <= set(names())
    for name, model in PUBLISHED.items():
        assert sum(math.prod(shape) for shape in load(name).values()) == model.parameters
    # 5.68 thousand million of UMT5-XXL's encoder, as its authors count them with the embedding.
    assert sum(math.prod(shape) for shape in load("umt5-xxl").values()) == 5_680_910_336
