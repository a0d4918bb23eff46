import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sagewan.checkpoint.containers import open_file
from sagewan.checkpoint.files import read_json, tensor_files
from sagewan.errors import CheckpointError
from tests.published import empty_weights


def bytes_in(folder: Path) -> int:
    return sum(x.nbytes for file in tensor_files(folder) for x in file.tensors.values())


def sharded(folder: Path) -> None:
    empty_weights(folder / "part-1.safetensors", a=3)
    empty_weights(folder / "part-2.safetensors", b=5, c=2)
    places = {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-2.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_bytes_of_weights_are_those_of_the_tensors(tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert bytes_in(tmp_path) == 3 * 5 * 4 + 7 * 2


def test_bytes_of_shards_are_summed(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert bytes_in(tmp_path) == 4 * (3 + 5 + 2)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "part-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part-2\.safetensors is missing"):
        tensor_files(tmp_path)


def test_a_shard_without_a_tensor_of_the_index_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    empty_weights(tmp_path / "part-2.safetensors", b=5)
    with pytest.raises(CheckpointError, match=r"part-2\.safetensors lacks c"):
        tensor_files(tmp_path)


@given(cut=st.integers(1, 200))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    empty_weights(path, weight=20, bias=10)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    with pytest.raises(CheckpointError, match=r"not complete|cut short"):
        open_file(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\x02\0\0\0\0\0\0\0[]", "not a safetensors file"),
        (b"\xff" * 100, "not a safetensors file"),
        (b'\x11\0\0\0\0\0\0\0{"weight":"what"}', "broken header"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        open_file(path)


def test_weights_in_another_format_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin and no safetensors"):
        tensor_files(tmp_path)


def test_an_index_may_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        tensor_files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff"])
def test_broken_json_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(path)
