"""What a file or a folder is, from headers and configs: for people, and as values for scripts."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sagewan.checkpoint.architecture import Architecture
from sagewan.checkpoint.assemble import assemble
from sagewan.checkpoint.experts import noise_in_name
from sagewan.checkpoint.files import tensor_files
from sagewan.checkpoint.folder import WITH_WEIGHTS, read_model
from sagewan.checkpoint.infer import config_of, formats, main_format
from sagewan.checkpoint.roles import ROLES, TRANSFORMER
from sagewan.checkpoint.source import Entry, Source, open_source, source_of
from sagewan.checkpoint.tensors import Stored, all_tensors
from sagewan.checkpoint.tokenizer import has_tokenizer
from sagewan.checkpoint.whole import problems
from sagewan.errors import CheckpointError
from sagewan.plan.models import PUBLISHED, Model

# Bytes below which a size is told in MB.
_SMALL = 1e8
_LORA_ENDINGS = (".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a model. ``layout`` is whose names its weights have, ``container`` the kind of
    file; ``format`` what most of its matrices are stored in, ``bytes`` by format; ``quantized`` of
    ``matrices`` are packed, with ``scales`` per tensor, per row, per block or none."""

    role: str
    path: str
    layout: str
    container: str
    files: int
    description: str
    parameters: int
    bytes: int
    format: str
    formats: dict[str, int]
    matrices: int
    quantized: int
    scales: str
    full_precision: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """``kind`` is model, transformer, vae, text_encoder, image_encoder, lora, or several of them;
    ``parts`` those that were found, ``missing`` what the model needs and nothing has; ``problems``
    are sentences."""

    path: str
    kind: str
    name: str | None = None
    family: str | None = None
    tasks: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    missing: str | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One line: ``wan2.1-t2v-14b, t2v, float8_e4m3fn, 14.5 GB``."""
        return ", ".join(self.facts())

    def facts(self) -> tuple[str, ...]:
        """What the line tells, one by one."""
        told = [self.name or self.kind.replace("_", " ")]
        if self.tasks:
            told.append("/".join(self.tasks))
        main = next((part for part in self.parts if part.role.startswith(TRANSFORMER)), None)
        main = main or (self.parts[0] if self.parts else None)
        if main:
            told.append(main.format)
        size = sum(part.bytes for part in self.parts)
        told.append(f"{size / 1e9:.1f} GB" if size >= _SMALL else f"{size / 1e6:.0f} MB")
        return (*told, "with problems") if self.problems else tuple(told)


def inspect(path: Path) -> Inspection:
    """Look inside. Raises CheckpointError, one sentence, for what can't be read at all."""
    if (path / "model_index.json").is_file():
        return _of_model(path, read_model(path, path.resolve().name))
    if path.is_dir():
        return _of_folder(path)
    return _of_file(path)


def _of_model(path: Path, model: Model) -> Inspection:
    parts, found = [], []
    for name in model.parts:
        if name in WITH_WEIGHTS:
            role = TRANSFORMER if name.startswith(TRANSFORMER) else name
            source = open_source(model.parts[name], role)
            parts.append(_part(source, name))
            found += _problems(source)
    return Inspection(
        path=str(path),
        kind="model",
        name=_published_name(model) or model.name,
        family=model.family,
        tasks=list(model.tasks),
        parts=parts,
        notes=list(model.notes),
        problems=found,
    )


def _of_folder(path: Path) -> Inspection:
    """A folder in another layout: what is whole in it is a model."""
    config = path / "config.json"
    try:
        return _of_model(path, assemble(path, path.resolve().name))
    except CheckpointError as error:
        if config.is_file() and not any(path.glob("*_noise_model")):
            return _of_file(path)
        partial = assemble(path, path.resolve().name, need_files=False)
        return Inspection(
            path=str(path),
            kind="model",
            name=_published_name(partial) or partial.name,
            family=partial.family,
            tasks=list(partial.tasks),
            missing=str(error),
            notes=list(partial.notes),
        )


def _of_file(path: Path) -> Inspection:
    files = tensor_files(path)
    tensors = all_tensors(files)
    roles = [role for role in ROLES.values() if role.found_in(tensors.keys())]
    if not roles:
        return _of_lora(path, tensors)
    sources = [source_of(files, path, role.name) for role in roles]
    if path.is_dir():
        sources = [open_source(path, role.name) for role in roles]
    found = Inspection(
        path=str(path),
        kind=" + ".join(role.name for role in roles),
        parts=[_part(source, source.role) for source in sources],
        problems=[problem for source in sources for problem in _problems(source)],
    )
    if found.problems or roles[0].name != TRANSFORMER:
        return found
    return _with_model(found, path)


def _with_model(found: Inspection, path: Path) -> Inspection:
    """A transformer, and the model that it makes with what lies around it."""
    missing = None
    try:
        model = assemble(path, path.name)
    except CheckpointError as error:
        missing = str(error)
        try:
            model = assemble(path, path.name, need_files=False)
        except CheckpointError:
            return Inspection(**{**vars(found), "missing": missing})
    told = {"name": _published_name(model), "family": model.family, "tasks": list(model.tasks)}
    parts = [f"{name}: {where}" for name, where in model.parts.items() if where != path]
    notes = [*found.notes, *model.notes, *parts]
    return Inspection(**{**vars(found), **told, "missing": missing, "notes": notes})


def _of_lora(path: Path, tensors: dict[str, Stored]) -> Inspection:
    downs = [x for name, x in tensors.items() if name.endswith(_LORA_ENDINGS) and len(x.shape) == 2]
    if not downs:
        raise CheckpointError(
            f"{path} holds no part of a Wan model and no LoRA ({len(tensors)} tensors, such as "
            f"{next(iter(tensors), 'none')}): it is of another model"
        )
    ranks = Counter(stored.shape[0] for stored in downs)
    widths = Counter(stored.shape[1] for stored in downs)
    rank, width = ranks.most_common(1)[0][0], widths.most_common(1)[0][0]
    names = [name for name, model in PUBLISHED.items() if model.heads * model.head_dim == width]
    fits = f", of {', '.join(names)}" if names else ""
    part = Part(
        role="lora",
        path=str(path),
        layout="lora",
        container=downs[0].file.container,
        files=1,
        description=f"{len(downs)} layers of rank {rank}, for models {width} wide{fits}",
        parameters=sum(math.prod(stored.shape) for stored in tensors.values()),
        bytes=sum(stored.nbytes for stored in tensors.values()),
        format=downs[0].dtype,
        formats=dict(Counter(stored.dtype for stored in tensors.values())),
        matrices=len(downs),
        quantized=0,
        scales="none",
        full_precision=0,
    )
    return Inspection(path=str(path), kind="lora", parts=[part])


def _part(source: Source, role: str) -> Part:
    matrices = [one for one in source.entries.values() if len(one.shape) == 2]
    packed = [one for one in matrices if one.weight.is_packed]
    return Part(
        role=role,
        path=str(source.path),
        layout=source.layout,
        container=source.files[0].container,
        files=len(source.files),
        description=_description(source),
        parameters=sum(math.prod(entry.shape) for entry in source.entries.values()),
        bytes=source.bytes,
        format=main_format(source),
        formats=formats(source.entries.values()),
        matrices=len(matrices),
        quantized=len(packed),
        scales=_scales(packed),
        full_precision=sum(one.weight.full_precision for one in packed),
        notes=list(_notes(source)),
    )


def _description(source: Source) -> str:
    config = config_of(source)
    if source.role == TRANSFORMER:
        shape = Architecture.of(config, source.path)
        pictures = ", with CLIP's view of a picture" if shape.image_dim else ""
        return (
            f"{shape.num_layers} blocks, {shape.width} wide, {shape.in_channels} channels in"
            f"{pictures}"
        )
    if source.role == "vae":
        kind = "Wan 2.2's kind" if config.get("is_residual") else "Wan 2.1's kind"
        return f"{config['z_dim']} channels, {kind}"
    if source.role == "text_encoder":
        return f"UMT5, {config['num_layers']} blocks, {config['d_model']} wide"
    return f"CLIP, {config['num_hidden_layers']} blocks, {config['hidden_size']} wide"


def _notes(source: Source) -> Iterable[str]:
    if source.role == TRANSFORMER and (noise := noise_in_name(source.path)):
        yield f"by its name, the {noise}-noise expert: nothing inside tells"
    if source.role == "text_encoder" and has_tokenizer(source):
        yield "carries its tokenizer"


def _problems(source: Source) -> list[str]:
    if source.role != TRANSFORMER:
        return []
    shape = Architecture.of(config_of(source), source.path)
    return list(problems(source, shape.shapes()))


def _scales(packed: list[Entry]) -> str:
    kinds = Counter(_scale_kind(entry) for entry in packed)
    return kinds.most_common(1)[0][0] if kinds else "none"


def _scale_kind(entry: Entry) -> str:
    if entry.format.startswith("gguf:") or entry.format in ("nvfp4", "mxfp8"):
        return "per block"
    scale = entry.weight.scale
    if scale is None:
        return "none"
    return "per tensor" if math.prod(scale.shape) == 1 else "per row"


def _published_name(model: Model) -> str | None:
    """The published model of this very size and task, if there is one."""
    for name, published in PUBLISHED.items():
        traits = ("tasks", "experts", "parameters", "layers")
        if all(getattr(model, trait) == getattr(published, trait) for trait in traits):
            return name
    return None
