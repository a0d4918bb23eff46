"""The files of one part: its JSON config, and the files of its weights, checked without torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sagewan.checkpoint.containers import open_file
from sagewan.checkpoint.tensors import TensorFile
from sagewan.errors import CheckpointError

_INDEX = ".safetensors.index.json"
# Where a folder holds the same weights in several ways, the one that diffusers reads.
_STEMS = ("diffusion_pytorch_model", "model")
_BLOCK = re.compile(r"block_(\d+)")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError if it is missing or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the model folder is not whole") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror})") from None
    except ValueError:
        raise CheckpointError(f"{path} is not valid JSON: fetch this file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: fetch this file again")
    return value


def tensor_files(path: Path) -> list[TensorFile]:
    """The open files of a part: the one that ``path`` is, or those of a folder, which are the
    shards that its index names, or else all of its weights together.

    Raises CheckpointError if a file is missing, cut short, or lacks a tensor of the index.
    """
    if not path.is_dir():
        return [open_file(path)]
    indexes = sorted(path.glob(f"*{_INDEX}"))
    indexes = [index for stem in _STEMS if (index := path / (stem + _INDEX)).exists()] or indexes
    if len(indexes) > 1:
        raise CheckpointError(
            f"{path} holds {indexes[0].name} and {indexes[1].name}, two models: keep each in a "
            "folder of its own"
        )
    if indexes:
        return _shards(indexes[0])
    found = [file for stem in _STEMS if (file := path / f"{stem}.safetensors").exists()]
    found = found[:1] or sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
    if not found:
        raise CheckpointError(_no_weights(path))
    return [_open_block(file) for file in found]


def _shards(index: Path) -> list[TensorFile]:
    shards: dict[str, set[str]] = {}
    for tensor, file in _weight_map(index).items():
        shards.setdefault(file, set()).add(tensor)
    return [_shard(index.parent / file, names, index) for file, names in sorted(shards.items())]


def _shard(path: Path, names: set[str], index: Path) -> TensorFile:
    file = open_file(path)
    lacking = sorted(names - file.tensors.keys())
    if lacking:
        raise CheckpointError(
            f"{path} lacks {lacking[0]}, which {index.name} places in it: fetch both again"
        )
    return file


def _open_block(path: Path) -> TensorFile:
    """A file of a folder; one that holds a single block, as LightX2V writes them, may leave the
    block's number to its name."""
    file = open_file(path)
    block = _BLOCK.fullmatch(path.stem)
    prefix = f"blocks.{block[1]}." if block else ""
    if block and not any(name.startswith("blocks.") for name in file.tensors):
        named = {prefix + name: stored for name, stored in file.tensors.items()}
        file.tensors = {name: replace(stored, name=name) for name, stored in named.items()}
    return file


def _weight_map(index: Path) -> Mapping[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} names no weights: fetch this file again")
    if not all(isinstance(file, str) and Path(file).name == file for file in found.values()):
        raise CheckpointError(f"{index} names files outside its folder")
    return found


def _no_weights(folder: Path) -> str:
    others = sorted(file.name for pattern in ("*.bin", "*.pth") for file in folder.glob(pattern))
    if others:
        return f"{folder} holds {others[0]} and no safetensors, the files that are read"
    return f"{folder} holds no weights: fetch the model again"
