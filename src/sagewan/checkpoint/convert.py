"""A transformer's weights → the same quantised, in a file as ComfyUI or diffusers name them.

One matrix after the other is read, quantised, measured and written, so that memory holds one at a
time. What was written is read back by the reader that a run uses, and compared with the source.

Packed matrices are written as ComfyUI's own tools do: ``X.weight``, ``X.weight_scale``, for NVFP4
``X.weight_scale_2``, and ``X.comfy_quant``, JSON in bytes that names the format.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from sagewan.checkpoint.calibration import by_layer
from sagewan.checkpoint.containers import open_file
from sagewan.checkpoint.names import original_transformer_name
from sagewan.checkpoint.packed import Packed
from sagewan.checkpoint.quantize import pack, relative_error
from sagewan.checkpoint.roles import TRANSFORMER
from sagewan.checkpoint.source import Entry, Source, open_source
from sagewan.checkpoint.writer import PARTIAL, Slot, Writer
from sagewan.errors import CheckpointError, RequestError
from sagewan.plan.weights import POLICIES, QUANTIZED_AS

LAYOUTS = ("comfy", "diffusers")
SHARD_BYTES = 5_000_000_000
# What a format loses of a weight that is spread as trained ones are; more is a fault.
_MOST = {"float8_e4m3fn": 0.05, "nvfp4": 0.2}
_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is to become of a transformer: ``to`` a quantization, in a ``layout``; ``device`` does
    the arithmetic; ``family`` chooses the policy that says which layers; ``measured`` is the file
    of their inputs that they are rounded by, if they were measured."""

    to: str
    layout: str
    device: str = "cpu"
    family: str = "wan"
    shard_bytes: int = SHARD_BYTES
    measured: Path | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """What the header of each file says: weights that were rounded otherwise are others."""
        by = self.measured and {
            "rounded_by": hashlib.sha256(self.measured.read_bytes()).hexdigest()
        }
        return {"format": "pt", **(by or {})}

    @cached_property
    def directions(self) -> Callable[[str, int], Tensor | None]:
        """A layer's name and its number of inputs → the directions in which they lie, if known."""
        return by_layer(self.measured)

    @property
    def format(self) -> str:
        return QUANTIZED_AS[self.to]

    def packs(self, entry: Entry) -> bool:
        """Whether this weight is to be quantised."""
        layer, _, last = entry.name.rpartition(".")
        return last == "weight" and len(entry.shape) == 2 and POLICIES[self.family].stores(layer)

    def name(self, name: str) -> str:
        """A weight's name in the layout, by diffusers' name."""
        return original_transformer_name(name) if self.layout == "comfy" else name


@dataclass
class Written:
    """The files of one transformer, and what each of its matrices lost: ‖new − old‖ / ‖old‖."""

    files: list[Path] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    bytes: int = 0

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        return sorted(self.errors.items(), key=lambda item: -item[1])[:count]


Told = Callable[[int, int], None]


def convert(source: Source, target: Path, conversion: Conversion, told: Told) -> Written:
    """Write ``source`` to ``target``: a file, or a folder of shards with an index. ``told`` hears
    how many of all the weights are done, and may raise to stop; another call goes on from there.

    Raises RequestError if other weights are in the place, the source's own among them, and
    CheckpointError if the source is quantised already, or what was written is not right.
    """
    quantised = next((e for e in source.entries.values() if e.weight.is_packed), None)
    if quantised:
        raise CheckpointError(
            f"{source.path} is {quantised.format} already: quantise the 16-bit files, whose "
            "weights lose only once"
        )
    shards = _shards(source, conversion, single=target.suffix == ".safetensors")
    files = _files(target, len(shards))
    _check_place(source, target, dict(zip(files, shards, strict=True)), conversion)
    _check_room(target, shards)
    written = Written(files=files)
    total = len(source.entries)
    done = 0
    for path, entries in zip(files, shards, strict=True):
        if not path.exists():
            _write_shard(
                source, path, entries, conversion, written, partial(_on, told, done, total)
            )
        done += len(entries)
        told(done, total)
    if target.suffix != ".safetensors":
        _write_index(target, files, shards, conversion)
    _verify(source, target, conversion, written)
    written.bytes = sum(path.stat().st_size for path in files)
    return written


def _on(told: Told, before: int, total: int, done: int) -> None:
    told(before + done, total)


def _shards(source: Source, conversion: Conversion, *, single: bool) -> list[list[Entry]]:
    """The weights in the order of their names, as many together as a shard holds."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in source.entries.values():
        nbytes = sum(slot.nbytes for slot in _slots(entry, conversion))
        if not single and shards[-1] and size + nbytes > conversion.shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
    return shards


def _files(target: Path, count: int) -> list[Path]:
    if target.suffix == ".safetensors":
        return [target]
    if count == 1:
        return [target / f"{_STEM}.safetensors"]
    return [target / f"{_STEM}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _slots(entry: Entry, conversion: Conversion) -> list[Slot]:
    """The tensors that a weight becomes."""
    name = conversion.name(entry.name)
    if not conversion.packs(entry):
        return [Slot(name, getattr(torch, entry.format), entry.shape)]
    module = name.removesuffix(".weight")
    # A small one of the same kind tells the shapes; nothing is computed of the weight yet.
    rows, columns = entry.shape
    marker = _marker(conversion)
    if conversion.format == "nvfp4":
        data = Slot(name, torch.uint8, (_up(rows, 16), _up(columns, 16) // 2))
        scale_shape = (_up(rows, 128), _up(-(-columns // 16), 4))
        scales = [
            Slot(f"{module}.weight_scale", torch.float8_e4m3fn, scale_shape),
            Slot(f"{module}.weight_scale_2", torch.float32, ()),
        ]
    else:
        data = Slot(name, torch.float8_e4m3fn, (rows, columns))
        scales = [Slot(f"{module}.weight_scale", torch.float32, ())]
    return [data, *scales, Slot(f"{module}.comfy_quant", torch.uint8, tuple(marker.shape))]


def _tensors(packed: Packed, conversion: Conversion) -> Iterator[Tensor]:
    """The tensors of a packed weight in the order of its slots, on the CPU."""
    for tensor in (packed.data, packed.scale, packed.tensor_scale):
        if tensor is not None:
            yield tensor.cpu()
    yield _marker(conversion)


def _marker(conversion: Conversion) -> Tensor:
    text = json.dumps({"format": conversion.format}).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _check_place(
    source: Source, target: Path, shards: Mapping[Path, Sequence[Entry]], conversion: Conversion
) -> None:
    """Refuse to mix with weights of another conversion: a reader would take either."""
    if source.path.resolve() in {path.resolve() for path in (target, *shards)}:
        raise RequestError(f"{target} is the source itself: name another place")
    if target.suffix == ".safetensors":
        there = [target] if target.exists() else []
    else:
        index = target / f"{_STEM}.safetensors.index.json"
        # That of several shards is written anew.
        there = [*target.glob("*.safetensors"), *([index] if len(shards) == 1 else [])]
    for path in there:
        written = path in shards and _is_written(path, shards[path], conversion)
        if path.exists() and not written:
            raise RequestError(
                f"{path} is there already, and is not what this would write: remove it, or name "
                "another place"
            )


def _is_written(path: Path, entries: Sequence[Entry], conversion: Conversion) -> bool:
    """Whether a file holds the tensors that these weights become, by names, dtypes and shapes, and
    by what they were rounded."""
    wanted = {slot.name: slot for entry in entries for slot in _slots(entry, conversion)}
    try:
        file = open_file(path)
    except CheckpointError:
        return False
    found = file.tensors
    return (
        file.metadata == conversion.metadata
        and found.keys() == wanted.keys()
        and all(
            (found[name].dtype, found[name].shape)
            == (str(slot.dtype).removeprefix("torch."), slot.shape)
            for name, slot in wanted.items()
        )
    )


def _check_room(target: Path, shards: Sequence[Sequence[Entry]]) -> None:
    folder = target.parent if target.suffix == ".safetensors" else target
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    # The source's bytes are more than what is written, and no less will do for certain.
    needed = sum(entry.bytes for shard in shards for entry in shard) * 6 // 10
    there = sum(path.stat().st_size for path in folder.glob(f"*{PARTIAL}"))
    if free + there < needed:
        raise RequestError(
            f"{folder} has {free / 1e9:.1f} GB free, and about {needed / 1e9:.1f} GB are needed: "
            "make room, or choose another place"
        )


def _write_shard(
    source: Source,
    path: Path,
    entries: Sequence[Entry],
    conversion: Conversion,
    written: Written,
    told: Callable[[int], None],
) -> None:
    slots = [slot for entry in entries for slot in _slots(entry, conversion)]
    with Writer(path, slots, conversion.metadata) as writer:
        place = 0
        for number, entry in enumerate(entries, start=1):
            count = len(_slots(entry, conversion))
            place += count
            if writer.done < place:
                # What an earlier attempt broke off within a weight is written again from its start.
                _append(
                    writer, source, entry, conversion, written, skip=writer.done - (place - count)
                )
            told(number)
        writer.finish()


def _append(
    writer: Writer,
    source: Source,
    entry: Entry,
    conversion: Conversion,
    written: Written,
    *,
    skip: int,
) -> None:
    found = source.read(entry.name)
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{source.path}: {entry.name} is quantised already")
    if not conversion.packs(entry):
        writer.append(found)
        return
    weight = found.to(conversion.device)
    directions = conversion.directions(entry.name.removesuffix(".weight"), entry.shape[1])
    packed = pack(weight, conversion.format, per_tensor=True, directions=directions)
    error = relative_error(packed, weight)
    if not error < _MOST[conversion.format]:
        raise CheckpointError(
            f"{source.path}: {entry.name} loses {error:.3g} of itself as {conversion.to}, which no "
            "trained weight does: the file is damaged; fetch it again"
        )
    for tensor in list(_tensors(packed, conversion))[skip:]:
        writer.append(tensor)
    written.errors[entry.name] = error


def _write_index(
    target: Path, files: Sequence[Path], shards: Sequence[Sequence[Entry]], conversion: Conversion
) -> None:
    if len(files) == 1:
        return
    places = {
        slot.name: path.name
        for path, entries in zip(files, shards, strict=True)
        for entry in entries
        for slot in _slots(entry, conversion)
    }
    size = sum(path.stat().st_size for path in files)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    path = target / f"{_STEM}.safetensors.index.json"
    beside = path.with_name(path.name + PARTIAL)
    beside.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def _verify(source: Source, target: Path, conversion: Conversion, written: Written) -> None:
    """Read back every weight as a run will, and compare it with the source's."""
    found = open_source(target, TRANSFORMER)
    if found.entries.keys() != source.entries.keys():
        raise CheckpointError(f"{target} does not hold what was written: remove it, and try again")
    for name, entry in source.entries.items():
        weight, stored = source.read(name), found.read(name)
        if isinstance(weight, Packed):
            raise CheckpointError(f"{source.path}: {name} is quantised already")
        if isinstance(stored, Packed):
            weight = weight.to(conversion.device)
            error = relative_error(stored.to(conversion.device), weight)
        else:
            error = 0.0 if stored.equal(weight) else float("inf")
        most = _MOST[conversion.format] if conversion.packs(entry) else 0.0
        if not error <= written.errors.get(name, most) * (1 + 1e-6) + 1e-9:
            raise CheckpointError(
                f"{target}: {name} was not written as it should be (it differs by {error:.3g}): "
                "remove the file, and try again"
            )
        if conversion.packs(entry):
            written.errors[name] = error
