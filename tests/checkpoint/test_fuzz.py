"""Whatever bytes a file has: it is read as what it is, or refused in a sentence; never a traceback,
never other numbers than the file's."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sagewan.checkpoint.containers import open_file
from sagewan.checkpoint.experts import find_experts
from sagewan.checkpoint.inspection import inspect
from sagewan.checkpoint.packed import Packed, unpack
from sagewan.checkpoint.source import open_source
from sagewan.errors import CheckpointError
from tests import shrunken
from tests.checkpoint import writers

EXAMPLES = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FILES = ("kijai.safetensors", "comfy_nvfp4.safetensors", "lightx2v_int8.safetensors", "q8_0.gguf",
         "original.pth")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


class Whole(NamedTuple):
    """A file's bytes, and what it means."""

    data: bytes
    means: dict[str, Tensor]

    def __repr__(self) -> str:
        return "Whole(…)"


@pytest.fixture(scope="module")
def wholes(folder: Path) -> dict[str, Whole]:
    state = shrunken.transformer("wan2.1-t2v-1.3b", 3).state_dict()
    found = {}
    for name in FILES:
        means = writers.WRITERS[name][1](state, folder / name)
        found[name] = Whole((folder / name).read_bytes(), means)
    return found


def read_all(path: Path) -> dict[str, Tensor] | None:
    """What a file means, or None if it is refused, in one sentence."""
    try:
        inspect(path)
        (source,) = find_experts(path).sources
        return {name: numbers(source.read(name)) for name in source.entries}
    except CheckpointError as error:
        check_sentence(str(error))
        return None


def check_sentence(text: str) -> None:
    """One line that a terminal can show."""
    assert text.isprintable()
    assert len(text) < 1000


def numbers(found: Any) -> Tensor:
    return unpack(found, torch.float32) if isinstance(found, Packed) else found.float()


@EXAMPLES
@given(
    data=st.binary(max_size=300), start=st.sampled_from([b"", b"GGUF", b"PK\x03\x04", b"\x80\x02"])
)
def test_any_bytes(data: bytes, start: bytes, folder: Path) -> None:
    path = folder / "any"
    path.write_bytes(start + data)
    assert read_all(path) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
PLACE = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F8_E4M3", "BOOL"]) | JSON,
        "shape": st.lists(st.integers(-2, 9), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-2, 99), min_size=2, max_size=2) | JSON,
    },
)
NAMES = st.sampled_from(
    ["blocks.0.self_attn.q.weight", "patch_embedding.weight", "scaled_fp8", "__metadata__",
     "blocks.0.self_attn.q.scale_weight", "blocks.0.self_attn.q.comfy_quant"]
)  # fmt: skip


@EXAMPLES
@given(header=st.dictionaries(NAMES | st.text(max_size=9), PLACE | JSON, max_size=5),
       data=st.binary(max_size=64))  # fmt: skip
def test_any_header(header: dict[str, Any], data: bytes, folder: Path) -> None:
    path = folder / "header.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert read_all(path) is None


@EXAMPLES
@given(
    name=st.sampled_from(FILES), at=st.integers(0, 10**6), bytes_=st.binary(min_size=1, max_size=4)
)
def test_damage_to_the_header_is_refused_or_changes_nothing(
    name: str,
    at: int,
    bytes_: bytes,
    folder: Path,
    wholes: dict[str, Whole],
) -> None:
    whole, means = wholes[name]
    length = int.from_bytes(whole[:8], "little") + 8 if name.endswith("safetensors") else 4000
    at %= length
    path = folder / f"damaged_{name}"
    path.write_bytes(whole[:at] + bytes_ + whole[at + len(bytes_) :])
    found = read_all(path)
    if found is not None and name.endswith("safetensors"):
        assert found.keys() == means.keys()
        # A header says what the data mean: a changed one may swap equal tensors' places, and then
        # others overlap. What is left is damage to white space or to what nobody reads.
        assert all(torch.equal(found[key], means[key]) for key in means)


@EXAMPLES
@given(name=st.sampled_from(FILES), cut=st.integers(1, 10**6))
def test_a_file_cut_anywhere_is_refused(
    name: str, cut: int, folder: Path, wholes: dict[str, Whole]
) -> None:
    whole, _ = wholes[name]
    path = folder / f"cut_{name}"
    path.write_bytes(whole[: len(whole) - 1 - cut % (len(whole) - 1)])
    assert read_all(path) is None


DTYPES = st.sampled_from(
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.bool,
    ]
)
SIDES = st.sampled_from(
    [(), (1,), (2,), (192,), (256,), (192, 1), (192, 256), (256, 192), (0,), (0, 3)]
)
QUANTISED = ("kijai.safetensors", "comfy_nvfp4.safetensors", "lightx2v_int8.safetensors")
ENDINGS = (
    "weight",
    "scale_weight",
    "weight_scale",
    "weight_scale_2",
    "alpha",
    "comfy_quant",
    "weight_global_scale",
    "pre_quant_scale",
    "input_scale",
)


@EXAMPLES
@given(
    name=st.sampled_from(QUANTISED),
    ending=st.sampled_from(ENDINGS),
    dtype=DTYPES,
    shape=SIDES,
    fill=st.sampled_from([0.0, 1.0, -1.0, 3e-5, 7.0, 400.0, 1e30, math.nan, math.inf]),
)
def test_a_tensor_put_among_the_others_is_refused_or_harmless(
    name: str,
    ending: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    fill: float,
    folder: Path,
    wholes: dict[str, Whole],
) -> None:
    means = wholes[name][1]
    found = load_file(folder / name)
    integer = not dtype.is_floating_point and not math.isfinite(fill)
    value = torch.full(shape, 0.0 if integer else fill, dtype=torch.float64).to(dtype)
    found[f"blocks.1.ffn.0.{ending}"] = value
    path = folder / f"put_{name}"
    save_file(found, path)
    read = read_all(path)
    if read is None:
        return
    changed = {key for key in means if not torch.equal(read[key], means[key])}
    # A plain weight of the right shape may stand in for a quantised one, and a scale for another;
    # no other layer may change, and this one is what the file now says.
    assert changed <= {"blocks.1.ffn.net.0.proj.weight"}
    if changed:
        weight = read["blocks.1.ffn.net.0.proj.weight"]
        assert ending in ("weight", "scale_weight", "weight_scale", "weight_scale_2",
                          "pre_quant_scale")  # fmt: skip
        assert weight.shape == (192, 256)


@EXAMPLES
@given(data=st.binary(max_size=400))
def test_gguf_with_any_rest(data: bytes, folder: Path) -> None:
    path = folder / "rest.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\x01" + bytes(7) + b"\x01" + bytes(7) + data)
    try:
        open_file(path)
    except CheckpointError as error:
        check_sentence(str(error))
    assert read_all(path) is None


def test_a_source_of_the_untouched_files_is_read(folder: Path, wholes: dict[str, Whole]) -> None:
    for name in FILES:
        found = read_all(folder / name)
        assert found is not None
        assert open_source(folder / name, "transformer").entries.keys() == found.keys()
