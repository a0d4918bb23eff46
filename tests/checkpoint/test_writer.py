"""Files written tensor by tensor are safetensors, and go on where they were broken off."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sagewan.checkpoint.safetensors_header import read_safetensors
from sagewan.checkpoint.writer import Slot, Writer

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(5, dtype=torch.uint8),
    "c": torch.tensor(2.5),
    "d": torch.randn(3, 4).to(torch.float8_e4m3fn),
    "e": torch.randn(2, 2).bfloat16(),
}
SLOTS = [Slot(name, x.dtype, tuple(x.shape)) for name, x in TENSORS.items()]


def write(path: Path, count: int = len(TENSORS)) -> Writer:
    with Writer(path, SLOTS, {"format": "pt"}) as writer:
        while writer.done < count:
            writer.append(TENSORS[SLOTS[writer.done].name])
        if count == len(TENSORS):
            writer.finish()
    return writer


def test_others_read_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].float().equal(tensor.float())
    assert read_safetensors(path).metadata == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("cut", [0, 1])
def test_it_goes_on(count: int, cut: int, tmp_path: Path) -> None:
    path, whole = tmp_path / "x.safetensors", tmp_path / "whole.safetensors"
    write(whole)
    writer = write(path, count)
    assert not path.exists()
    with writer.partial.open("r+b") as file:
        file.truncate(writer.partial.stat().st_size - cut * (count > 0))
    with Writer(path, SLOTS, {"format": "pt"}) as again:
        assert again.done == max(count - cut, 0)
    write(path)
    assert path.read_bytes() == whole.read_bytes()


def test_another_files_beginning_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, 3)
    with Writer(path, SLOTS[:2], {}) as other:
        assert other.done == 0


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    with (
        Writer(tmp_path / "x.safetensors", SLOTS, {}) as writer,
        pytest.raises(ValueError, match="a is"),
    ):
        writer.append(torch.zeros(3, 2))


def test_the_header_is_padded_so_that_numbers_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0
    assert json.loads(path.read_bytes()[8 : 8 + length])["a"]["data_offsets"] == [0, 24]
