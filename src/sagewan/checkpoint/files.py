"""The files of one component: JSON configs and safetensors weights, checked without torch.

A safetensors file begins with the length of its header (8 bytes, little endian) and the header,
JSON that gives each tensor's place; so a download that stopped early is told from its size.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sagewan.errors import CheckpointError

# The format's own limit on its header, in bytes.
_MAX_HEADER = 100_000_000
_LFS_POINTER = b"version https://git-lfs"


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


def check_weights(folder: Path, stem: str) -> int:
    """Bytes of the weights of a component, ``stem.safetensors`` or the shards its index names.

    Raises CheckpointError if a file is missing, cut short, or lacks a tensor of the index.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if not index.exists():
        if not single.exists():
            raise CheckpointError(_no_weights(folder, stem))
        return _data_bytes(header(single), single)
    shards: dict[str, set[str]] = {}
    for tensor, file in _weight_map(index).items():
        shards.setdefault(file, set()).add(tensor)
    return sum(_check_shard(folder / file, names, index) for file, names in sorted(shards.items()))


def header(path: Path) -> Mapping[str, Any]:
    """The header of a safetensors file: tensor name → dtype, shape and place.

    Raises CheckpointError if the file is missing, is something else, or ends early.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = b"" if length > _MAX_HEADER else file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: fetch this file again") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror})") from None
    if _LFS_POINTER.startswith(start) and start:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a safetensors file, or is cut short: fetch it again")
    expected = 8 + length + _data_bytes(found, path)
    actual = path.stat().st_size
    if actual != expected:
        raise CheckpointError(
            f"{path} has {actual} of {expected} bytes: its download is not complete; fetch it again"
        )
    return found


def _weight_map(index: Path) -> Mapping[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} names no weights: fetch this file again")
    if not all(isinstance(file, str) and Path(file).name == file for file in found.values()):
        raise CheckpointError(f"{index} names files outside its folder")
    return found


def _check_shard(path: Path, names: set[str], index: Path) -> int:
    found = header(path)
    lacking = sorted(names - found.keys())
    if lacking:
        raise CheckpointError(
            f"{path} lacks {lacking[0]}, which {index.name} places in it: fetch both again"
        )
    return _data_bytes(found, path)


def _data_bytes(found: Mapping[str, Any], path: Path) -> int:
    """The end of the last tensor, counted from the end of the header."""
    try:
        return max(
            (int(place["data_offsets"][1]) for name, place in found.items() if name[:2] != "__"),
            default=0,
        )
    except (KeyError, IndexError, TypeError, ValueError):
        raise CheckpointError(f"{path} has a broken header: fetch it again") from None


def _no_weights(folder: Path, stem: str) -> str:
    others = sorted(
        file.name
        for pattern in ("*.bin", "*.pth", "*.safetensors")
        for file in folder.glob(pattern)
    )
    if others:
        return f"{folder} holds {others[0]} and no {stem}.safetensors, the file that is read"
    return f"{folder} holds no weights ({stem}.safetensors): fetch the model again"
