"""Files that are broken, or are something else: one sentence, exit 2, at once, nothing written."""

import io
import json
import math
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sagewan.checkpoint.find import find_model
from sagewan.checkpoint.source import open_source
from sagewan.cli import main
from sagewan.errors import CheckpointError
from tests import shrunken
from tests.checkpoint import writers
from tests.checkpoint.trees import wan_ai

NAME = "wan2.1-t2v-14b"
MATRIX = "blocks.1.ffn.0.weight"
SCALE = "blocks.1.ffn.0.scale_weight"
Spoil = Callable[[Path], object]


def state() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = shrunken.transformer(NAME, 3).state_dict()
    return found


# -- the header, byte by byte ----------------------------------------------------------------------


def opened(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def closed(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(path: Path) -> None:
        found, data = opened(path)
        change(found)
        closed(path, found, data)

    return spoil


def overlapping(found: dict[str, Any]) -> None:
    one, other = [name for name in found if found[name].get("shape") == [256, 256]][:2]
    found[one]["data_offsets"] = found[other]["data_offsets"]


def shifted(found: dict[str, Any]) -> None:
    begin, end = found[MATRIX]["data_offsets"]
    found[MATRIX]["data_offsets"] = [begin + 10**9, end + 10**9]


def doubled_key(path: Path) -> None:
    found, data = opened(path)
    text = json.dumps(found)
    again = f'"{MATRIX}": {json.dumps(found[MATRIX])}, '
    closed(path, "{" + again + text[1:], data)


# -- the tensors -----------------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(path: Path) -> None:
        found = load_file(path)
        change(found)
        save_file(found, path)

    return spoil


def put(name: str, value: torch.Tensor) -> Spoil:
    return tensors(lambda found: found.__setitem__(name, value))


def without(*endings: str) -> Spoil:
    return tensors(
        lambda found: [found.pop(name) for name in list(found) if name.endswith(endings)]
    )


def lora(path: Path) -> None:
    name = "diffusion_model.blocks.0.self_attn.q.lora_A.weight"
    save_file({name: torch.zeros(4, 5120)}, path)


def flux(path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}, path)


class Evil:
    """What a pickle can do: touch a file when it is opened."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.system, (f"touch {self.mark}",)


def evil_archive(path: Path) -> None:
    torch.save({"patch_embedding.weight": Evil(str(path.parent / "touched"))}, path)


def evil_archive_of_a_new_protocol(path: Path) -> None:
    torch.save({"a": Evil(str(path.parent / "touched"))}, path, pickle_protocol=4)


def evil_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(str(path.parent / "touched"))))


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")


def cut_archive(path: Path) -> None:
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-1000])


KIJAI: dict[str, tuple[Spoil, str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "download is not complete"),
    "cut in its header": (lambda p: p.write_bytes(p.read_bytes()[:500]), "longer than the file"),
    "too long": (lambda p: p.write_bytes(p.read_bytes() + b"more"), "its tensors take"),
    "header longer than the file": (
        lambda p: p.write_bytes((10**7).to_bytes(8, "little") + p.read_bytes()[8:]),
        "longer than the file",
    ),
    "header of absurd length": (
        lambda p: p.write_bytes(b"\xff" * 7 + b"\x7f" + p.read_bytes()[8:]),
        "not a safetensors file",
    ),
    "header deeply nested": (lambda p: closed(p, "{" + '"a":[' * 9999, b""), "not a safetensors"),
    "header no object": (lambda p: closed(p, "[]", b""), "not a safetensors file"),
    "overlapping offsets": (header(overlapping), "overlaps"),
    "offsets out of range": (header(shifted), "download is not complete"),
    "offsets of another size": (
        header(lambda h: h[MATRIX].update(data_offsets=[0, 7])),
        "by its shape and 7 by its place",
    ),
    "offsets reversed": (
        header(lambda h: h[MATRIX]["data_offsets"].reverse()),
        "broken header",
    ),
    "offsets negative": (header(lambda h: h[MATRIX].update(data_offsets=[-1, 3])), "broken header"),
    "shape of no numbers": (header(lambda h: h[MATRIX].update(shape=["192", 256])), "broken"),
    "shape too large to count": (
        header(lambda h: h[MATRIX].update(shape=[2**62, 2**62])),
        "broken header",
    ),
    "duplicate key": (doubled_key, "stands twice in the header"),
    "unknown dtype": (header(lambda h: h[MATRIX].update(dtype="F9_E9M9")), "F9_E9M9"),
    "dtype of no text": (header(lambda h: h[MATRIX].update(dtype=[1])), "number format"),
    "wrong shape": (
        header(lambda h: h[MATRIX].update(shape=[256, 192])),
        r"ffn\.net\.0\.proj|shape",
    ),
    "a scale missing": (without(SCALE), "its scale is missing"),
    "a scale of zero": (put(SCALE, torch.zeros(())), "is 0, which is no scale"),
    "a scale of NaN": (put(SCALE, torch.tensor(math.nan)), "is nan, which is no scale"),
    "a scale infinite": (put(SCALE, torch.tensor(math.inf)), "is inf, which is no scale"),
    "a scale negative": (put(SCALE, torch.tensor(-1.0)), "is -1, which is no scale"),
    "a scale implausible": (put(SCALE, torch.tensor(1e6)), "would make weights of up to"),
    "a scale doubled": (
        put("blocks.1.ffn.0.weight_scale", torch.ones(())),
        "two scales for blocks.1.ffn.0.weight",
    ),
    "a scale of a wrong shape": (put(SCALE, torch.ones(7)), "fit none of its 192 rows"),
    "a scale in integers": (put(SCALE, torch.ones(1, dtype=torch.int32)), "are no scales"),
    "a scale of nothing": (put("blocks.9.ffn.0.scale_weight", torch.ones(())), "and no weight"),
    "a scale beside 16 bit": (put(MATRIX, torch.ones(192, 256)), "has a scale and is not quant"),
    "a marker without scales": (without("scale_weight"), "marked as quantised and holds no scales"),
    "scales and marker gone": (without("scale_weight", "scaled_fp8"), "its scale is missing"),
    "a weight missing": (without("blocks.0.cross_attn.v.bias"), "lacks 1 of its weights"),
    "a block missing": (
        tensors(lambda f: [f.pop(n) for n in list(f) if "blocks.0." in n and ".q." not in n]),
        "lacks",
    ),
    "weights of a control model": (
        put("vace_blocks.0.proj.weight", torch.zeros(4, 4)),
        "no place for, such as vace_blocks",
    ),
    "an HTML page": (lambda p: p.write_text("<!DOCTYPE html><html>Sign in"), "is a web page"),
    "an LFS pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        "run git lfs pull",
    ),
    "nothing": (lambda p: p.write_bytes(b""), "is empty"),
    "text": (lambda p: p.write_text("hello, these are my weights"), "not a safetensors file"),
    "a LoRA": (lora, "is a LoRA"),
    "another model": (flux, "of another model"),
    "an archive that runs code": (evil_archive, r"would run code when opened \((posix|nt)\.sys"),
    "an archive that hides its code": (evil_archive_of_a_new_protocol, "would run code"),
    "a pickle": (evil_pickle, "could run any code"),
    "a zip of something": (other_zip, "none of PyTorch's"),
    "an archive cut short": (cut_archive, "cut short"),
}  # fmt: skip


def refused(path: Path, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By generate, plan and inspect alike, in a sentence, at once, with nothing written."""
    before = sorted(path.parent.rglob("*"))
    capsys.readouterr()
    found = ["generate", "a cat", "--model", str(path), "-o", str(path.parent / "a.mp4")]
    for words in (found, ["inspect", str(path)]):
        began = time.process_time()
        code = main(words)
        took = time.process_time() - began
        said = capsys.readouterr()
        if words[0] == "inspect" and not said.err:
            # What can be opened is described, and its faults are rows of the table.
            assert ("problem" in said.out and code == 2) or "LoRA" in sentence
        else:
            assert code == 2, said.err
            assert len(said.err.splitlines()) == 1, said.err
            line = said.err
            assert line.startswith("sagewan: ")
            with pytest.raises(CheckpointError, match=sentence):
                find_model(str(path))
        assert took < 2, f"{took:.1f} s"
    assert sorted(path.parent.rglob("*")) == before
    assert not (path.parent / "touched").exists()


@pytest.mark.parametrize("case", KIJAI)
def test_a_bad_file(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, sentence = KIJAI[case]
    path = tmp_path / "model.safetensors"
    writers.kijai(state(), path)
    open_source(path, "transformer")
    spoil(path)
    refused(path, sentence, capsys)


def test_a_shard_missing(
    tmp_path: Path, shrunken_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = wan_ai(shrunken_folder(NAME), tmp_path / "wan")
    next(folder.glob("*-00002-of-00002.safetensors")).unlink()
    refused(folder, "00002-of-00002.safetensors is missing", capsys)


def test_a_half_missing(
    tmp_path: Path, shrunken_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = wan_ai(shrunken_folder("wan2.2-t2v-a14b"), tmp_path / "wan")
    (folder / "low_noise_model").rename(tmp_path / "elsewhere")
    refused(folder, "lacks the folder low_noise_model", capsys)


# -- ComfyUI's and LightX2V's ----------------------------------------------------------------------

MARKED = "model.diffusion_model.blocks.0.self_attn.q.comfy_quant"
NVFP4 = "blocks.0.self_attn.q."
OTHERS: dict[str, tuple[writers.Writer, Spoil, str]] = {
    "a marker that is no JSON": (
        writers.comfy_quant_fp8,
        put(MARKED, torch.zeros(5, dtype=torch.uint8)),
        "not the JSON it should be",
    ),
    "a format of the future": (
        writers.comfy_quant_fp8,
        put(MARKED, writers.spelled(format="int2_magic")),
        "quantised as int2_magic, and this version reads float8_e4m3fn",
    ),
    "a rotation that is not undone": (
        writers.comfy_quant_fp8,
        put(MARKED, writers.spelled(format="float8_e4m3fn", convrot=True)),
        "float8_e4m3fn with convrot",
    ),
    "a marker that contradicts the numbers": (
        writers.comfy_quant_fp8,
        put(MARKED, writers.spelled(format="nvfp4")),
        "called nvfp4 and is stored as float8_e4m3fn",
    ),
    "markers in the header without scales": (
        writers.comfy_metadata_int8,
        lambda p: save_file(
            {k: v for k, v in load_file(p).items() if "scale" not in k},
            p,
            {"_quantization_metadata": '{"layers": {"blocks.0.ffn.0": {"format": "nvfp4"}}}'},
        ),
        "marked as quantised and holds no scales",
    ),
    "int8 without its scale": (
        writers.lightx2v_int8,
        without("blocks.0.ffn.0.weight_scale"),
        "its scale is missing",
    ),
    "bytes that mean nothing": (
        writers.comfy_nvfp4,
        without("weight_scale", "weight_scale_2", "comfy_quant"),
        "holds bytes whose meaning nothing says",
    ),
    "FP4 without the tensor's scale": (
        writers.comfy_nvfp4,
        without("self_attn.q.weight_scale_2"),
        "scale of the whole tensor is missing",
    ),
    "FP4 with block scales of another size": (
        writers.comfy_nvfp4,
        put(NVFP4 + "weight_scale", torch.ones(8, 8).to(torch.float8_e4m3fn)),
        "has scales of shape",
    ),
    "FP4 with alpha alone": (
        writers.lightx2v_nvfp4,
        without("self_attn.q.input_global_scale"),
        "has alpha without input_global_scale",
    ),
    "FP4 with a tensor scale of zero": (
        writers.comfy_nvfp4,
        put(NVFP4 + "weight_scale_2", torch.zeros(())),
        "is 0, which is no scale",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_bad_quantised_file(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, spoil, sentence = OTHERS[case]
    path = tmp_path / "model.safetensors"
    write(state(), path)
    spoil(path)
    refused(path, sentence, capsys)


@pytest.mark.parametrize("value", [0x7F, 0xFF, 0x81])
def test_block_scales_are_checked_when_they_are_read(value: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    writers.comfy_nvfp4(state(), path)
    found = load_file(path)
    found[NVFP4 + "weight_scale"].view(torch.uint8)[3, 3] = value
    save_file(found, path)
    source = open_source(path, "transformer")
    source.read("blocks.0.attn1.to_k.weight")
    with pytest.raises(CheckpointError, match="NaN or negative"):
        source.read("blocks.0.attn1.to_q.weight")


# -- GGUF ------------------------------------------------------------------------------------------


def of_architecture(path: Path) -> None:
    writers.gguf_writer("Q8_0", "llama")(state(), path)


def with_bad_type(path: Path) -> None:
    data = bytearray(path.read_bytes())
    name = b"blocks.0.ffn.0.weight"
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", 16)  # IQ2_XXS
    path.write_bytes(data)


def with_far_offset(path: Path) -> None:
    data = bytearray(path.read_bytes())
    name = b"blocks.0.ffn.0.weight"
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 2 * 8 + 4
    data[at : at + 8] = struct.pack("<Q", 2**60)
    path.write_bytes(data)


def with_wrong_shape(path: Path) -> None:
    writer = gguf.GGUFWriter(None, "wan")
    writer.add_array("comfy.gguf.orig_shape.blocks.0.self_attn.q.weight", [3, 3])
    writer.add_tensor("blocks.0.self_attn.q.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF: dict[str, tuple[Spoil, str]] = {
    "another architecture": (of_architecture, "architecture llama, not of Wan"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "download is not complete"),
    "cut in its header": (lambda p: p.write_bytes(p.read_bytes()[:900]), "cut short"),
    "counts beyond belief": (
        lambda p: p.write_bytes(p.read_bytes()[:8] + b"\xff" * 16 + p.read_bytes()[24:]),
        "damaged GGUF",
    ),
    "an old version": (
        lambda p: p.write_bytes(b"GGUF" + struct.pack("<I", 1) + p.read_bytes()[8:]),
        "version 1",
    ),
    "a version of the future": (
        lambda p: p.write_bytes(b"GGUF" + struct.pack("<I", 9) + p.read_bytes()[8:]),
        "a version that is not read",
    ),
    "a type that is not read": (with_bad_type, "GGUF's type 16"),
    "an offset out of range": (with_far_offset, "download is not complete"),
    "a shape that contradicts itself": (with_wrong_shape, "is said to be"),
}


@pytest.mark.parametrize("case", GGUF)
def test_a_bad_gguf(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, sentence = GGUF[case]
    path = tmp_path / "model.gguf"
    writers.gguf_writer("Q8_0")(state(), path)
    open_source(path, "transformer")
    spoil(path)
    refused(path, sentence, capsys)


def test_the_evil_file_is_evil(tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    pickle.load(io.BytesIO(pickle.dumps(Evil(str(tmp_path / "touched")))))
    assert (tmp_path / "touched").exists()
