"""LoRA files: which layers of a model they change, and their tensors.

Read are the key styles of peft and diffusers (``transformer.blocks.0.attn1.to_q.lora_A.weight``),
of ComfyUI's programs and LightX2V (``diffusion_model.blocks.0.self_attn.q.lora_down.weight``, with
``.diff`` and ``.diff_b``), and of kohya and musubi (``lora_unet_blocks_0_self_attn_q…``, with
``.alpha``). A LoRA adds strength · alpha / rank · B·(A·x) to a layer; without an alpha, B·(A·x).
peft's rank-stabilised ones divide by the root of the rank.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagewan.checkpoint.containers import open_file
from sagewan.checkpoint.names import transformer_name
from sagewan.checkpoint.places import LORAS, models_folder
from sagewan.checkpoint.tensors import Stored, TensorFile
from sagewan.errors import CheckpointError, RequestError
from sagewan.plan.layers import weight_shapes
from sagewan.plan.lora import (
    EXPERTS,
    Lora,
    LoraFile,
    Schedule,
    expert_in_name,
    schedule_in_name,
)
from sagewan.plan.models import Model
from sagewan.plan.request import SCHEDULERS

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = re.compile(r"(?:base_model\.model\.|model\.)?(?:diffusion_model\.|transformer\.|unet\.)?")
_KOHYA = re.compile(r"(?:lora_unet|lycoris|lora_transformer)_+(.+)")
# What a name ends in, for each part of a change to a layer; peft may put an adapter's name in.
_PARTS = {
    "a": re.compile(r"(.+)\.(?:lora_A(?:\.\w+)?|lora_down)\.weight"),
    "b": re.compile(r"(.+)\.(?:lora_B(?:\.\w+)?|lora_up)\.weight"),
    "alpha": re.compile(r"(.+)\.alpha"),
    "diff": re.compile(r"(.+)\.diff"),
    "diff_b": re.compile(r"(.+)\.(?:diff_b|lora_B(?:\.\w+)?\.bias)"),
}
_OTHER_KINDS = {
    "hada_w": "a LoHa",
    "lokr_w": "a LoKr",
    "oft_": "an OFT",
    "dora_scale": "a DoRA",
    "lora_magnitude": "a DoRA",
}
# The sizes of a text encoder and of a picture's, which a model's values do not tell; the model is
# asked itself when the LoRA is put on it.
_UNKNOWN_SHAPES = frozenset(
    {
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.text_embedder.linear_1",
        "condition_embedder.image_embedder.norm1",
        "condition_embedder.image_embedder.norm2",
        "condition_embedder.image_embedder.ff.net.0.proj",
        "condition_embedder.image_embedder.ff.net.2",
    }
)
_SCHEDULE: Mapping[str, Any] = {
    "steps": int,
    "cfg": (int, float),
    "shift": (int, float),
    "scheduler": str,
}


@dataclass
class _Change:
    """The names of the tensors in a file that change one layer, by part."""

    parts: dict[str, str] = field(default_factory=dict)

    def shape(self, found: Mapping[str, Stored]) -> tuple[int, ...] | None:
        """The shape [N, K] of the weight that its pair a, b adds to; None if it is no such pair."""
        a, b = (found[self.parts[part]].shape if part in self.parts else () for part in "ab")
        return (b[0], a[1]) if len(a) == len(b) == 2 and a[0] == b[1] else None

    def fits(self, found: Mapping[str, Stored], shape: tuple[int, ...] | None) -> bool:
        """Whether it is whole and, where the layer's shape is known, of that shape."""
        weights = []
        if "a" in self.parts or "b" in self.parts:
            weights.append(self.shape(found))
        if "diff" in self.parts:
            weights.append(found[self.parts["diff"]].shape)
        biases = [found[self.parts["diff_b"]].shape] if "diff_b" in self.parts else []
        if None in weights or not (weights or biases):
            return False
        if shape is None:
            return True
        return all(x == shape for x in weights) and all(x == shape[:1] for x in biases)


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA adds to one layer, float32 on the host: a [r, K] and b [N, r], the strength and
    alpha multiplied into b; ``diff`` a whole weight's difference, ``diff_b`` a bias's."""

    a: "Tensor | None" = None
    b: "Tensor | None" = None
    diff: "Tensor | None" = None
    diff_b: "Tensor | None" = None


def find_loras(loras: tuple[Lora, ...], model: Model) -> tuple[LoraFile, ...]:
    """What each file holds for the model, from its header alone. Raises CheckpointError if a file
    is missing, broken, of another kind, or made for another model: if none of its layers fits."""
    return tuple(_find(lora, model) for lora in loras)


def _find(lora: Lora, model: Model) -> LoraFile:
    path = _place(lora, model)
    experts, guessed = _experts(lora, model)
    if path.is_dir() or path.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin"):
        raise CheckpointError(f"lora={lora.path}: give a LoRA's .safetensors file")
    opened = open_file(path)
    found = opened.tensors
    changes, unknown = _changes(found, path)
    shapes = weight_shapes(model)
    fitting = {
        name: change
        for name, change in changes.items()
        if (name in shapes or name in _UNKNOWN_SHAPES) and change.fits(found, shapes.get(name))
    }
    if not fitting:
        raise CheckpointError(_nothing_fits(lora, model, changes, found))
    unfit = [
        name for key in changes.keys() - fitting.keys() for name in changes[key].parts.values()
    ]
    tensors = [found[name] for change in fitting.values() for name in change.parts.values()]
    ranks = [found[c.parts["a"]].shape[0] for c in fitting.values() if "a" in c.parts]
    return LoraFile(
        lora=Lora(path=path, strength=lora.strength, expert=lora.expert),
        layers=tuple(sorted(fitting)),
        unmatched=tuple(sorted([*unknown, *unfit])),
        experts=experts,
        guessed=guessed,
        rank=max(ranks, default=0),
        nbytes=sum(stored.nbytes for stored in tensors),
        modified=path.stat().st_mtime_ns,
        schedule=_own_schedule(opened) or schedule_in_name(path.stem),
    )


def _place(lora: Lora, model: Model) -> Path:
    """The file as it is given; a bare name that is no file here may leave out ``.safetensors``, and
    is looked for among the model's own LoRAs and then among all models'."""
    path = Path(os.path.expanduser(lora.path))  # noqa: PTH111 Path's raises for ~nobody
    if len(path.parts) > 1 or path.is_file():
        return path
    homes = [model.location] if model.location and model.location.is_dir() else []
    for home in (*homes, models_folder()):
        for name in (path.name, f"{path.name}.safetensors"):
            if (home / LORAS / name).is_file():
                return home / LORAS / name
    return path


def _experts(lora: Lora, model: Model) -> tuple[tuple[int, ...], bool]:
    """The transformers a LoRA is for, and whether that is a guess from its name."""
    if model.experts == 1:
        if lora.expert:
            raise RequestError(
                f"lora={lora}: the model {model.name} has one transformer; leave {lora.expert}= out"
            )
        return (0,), False
    if lora.expert:
        return (EXPERTS.index(lora.expert),), False
    told = expert_in_name(lora.path.name)
    return ((0, 1), False) if told is None else ((told,), True)


def _changes(found: Mapping[str, Stored], path: Path) -> tuple[dict[str, _Change], list[str]]:
    """The tensors of a file by the layer they change, and the names that no Wan layer has."""
    changes: dict[str, _Change] = {}
    unknown = []
    for name in found:
        other = next((kind for mark, kind in _OTHER_KINDS.items() if mark in name), None)
        if other:
            raise CheckpointError(f"{path} is {other} file; this version reads LoRA")
        part, layer = _part_and_layer(name)
        if layer is None:
            unknown.append(name)
            continue
        twice = changes.setdefault(layer, _Change()).parts.setdefault(part, name)
        if twice != name:
            raise CheckpointError(
                f"lora={path}: {twice} and {name} are the same part of {layer}; choose a file that "
                "has it once"
            )
    if not changes and not any(".lora" in name or ".diff" in name for name in unknown):
        raise CheckpointError(f"{path} holds no LoRA: none of its tensors is named as one's are")
    return changes, unknown


def _part_and_layer(name: str) -> tuple[str, str | None]:
    """Which part of a change a tensor is, and the layer's name as diffusers has it."""
    for part, pattern in _PARTS.items():
        if ends := pattern.fullmatch(name):
            return part, _layer(ends[1])
    return "", None


def _layer(module: str) -> str | None:
    if flat := _KOHYA.fullmatch(module):
        block = re.fullmatch(r"blocks_(\d+)_(.+)", flat[1])
        if block:
            inner = _dotted().get(block[2])
            return inner and _named(f"blocks.{block[1]}.{inner}")
        dotted = _dotted().get(flat[1])
        return dotted and _named(dotted)
    prefix = _PREFIX.match(module)
    return _named(module[prefix.end() :] if prefix else module)


def _named(module: str) -> str | None:
    """diffusers' name of a module that Wan's code or diffusers names."""
    if _OF_DIFFUSERS.fullmatch(module):
        return module
    weight = transformer_name(f"{module}.weight") or transformer_name(module)
    return weight and weight.removesuffix(".weight")


_OF_DIFFUSERS = re.compile(
    r"(?:blocks\.\d+\.(?:attn[12]\.(?:to_[qkv]|to_out\.0|add_[kv]_proj|norm_(?:q|k|added_k))"
    r"|ffn\.net\.(?:0\.proj|2)|norm2|scale_shift_table)"
    r"|condition_embedder\.(?:time_embedder\.linear_[12]|text_embedder\.linear_[12]|time_proj"
    r"|image_embedder\.(?:norm[12]|ff\.net\.(?:0\.proj|2)))"
    r"|patch_embedding|proj_out|scale_shift_table)"
)


@cache
def _dotted() -> Mapping[str, str]:
    """Names with underscores for dots → names with dots: kohya's can't be split without a list."""
    attention = [
        f"{which}.{part}"
        for which in ("self_attn", "cross_attn")
        for part in ("q", "k", "v", "o", "k_img", "v_img", "norm_q", "norm_k", "norm_k_img")
    ]
    attention += [
        f"{which}.{part}"
        for which in ("attn1", "attn2")
        for part in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
    ]
    outside = (
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        "head.head",
        "patch_embedding",
        "img_emb.proj.1",
        "img_emb.proj.3",
    )
    ffn = ("ffn.0", "ffn.2", "ffn.net.0.proj", "ffn.net.2")
    return {name.replace(".", "_"): name for name in (*attention, *ffn, *outside)}


def _nothing_fits(
    lora: Lora, model: Model, changes: Mapping[str, _Change], found: Mapping[str, Stored]
) -> str:
    why, shapes = "", weight_shapes(model)
    for name, change in changes.items():
        has = change.shape(found)
        if has and name in shapes:
            why = f" ({name} is {list(has)} there, and {list(shapes[name])} in the model)"
            break
    return (
        f"lora={lora.path}: none of its {len(changes)} layers fits {model.name}{why}; "
        "choose one made for this model"
    )


def _own_schedule(file: TensorFile) -> Schedule | None:
    """The schedule that a file names itself, in its notes as ``sagewan.sampling``: an object with
    ``steps`` and, where they are not the usual ones, ``cfg``, ``shift`` and ``scheduler``."""
    path, own = file.path, _metadata(file).get("sagewan.sampling")
    if own is None:
        return None
    if not isinstance(own, Mapping) or "steps" not in own or own.keys() - _SCHEDULE.keys():
        raise CheckpointError(f"{path}: its sagewan.sampling must be an object with steps")
    for key, value in own.items():
        if isinstance(value, bool) or not isinstance(value, _SCHEDULE[key]):
            raise CheckpointError(f"{path}: {key} in its sagewan.sampling is {value!r}")
    if own.get("scheduler", SCHEDULERS[0]) not in SCHEDULERS:
        raise CheckpointError(f"{path}: scheduler is none of {', '.join(SCHEDULERS)}")
    return Schedule(**own)


def _metadata(file: TensorFile) -> dict[str, Any]:
    """The header's notes, those that are JSON read."""
    read: dict[str, Any] = {}
    for key, value in file.metadata.items():
        try:
            read[key] = json.loads(value)
        except (TypeError, ValueError):
            read[key] = value
    return read


def load_lora(file: LoraFile) -> dict[str, LoraLayer]:
    """The layers that a file changes, by name, with strength and alpha multiplied in. Raises
    CheckpointError for numbers that are not finite."""
    opened = open_file(file.lora.path)
    changes, _ = _changes(opened.tensors, file.lora.path)
    metadata = _metadata(opened)
    return {
        name: _read(opened, changes[name].parts, file.lora.strength, _peft_settings(metadata, name))
        for name in file.layers
    }


def _read(
    opened: TensorFile, parts: Mapping[str, str], strength: float, peft: tuple[float | None, bool]
) -> LoraLayer:
    tensors = {part: opened.tensors[name].tensor().float() for part, name in parts.items()}
    for part, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"lora={opened.path}: {parts[part]} holds NaN or infinite values: the file is "
                "damaged; fetch it again"
            )
    for part in ("b", "diff", "diff_b"):
        if part in tensors:
            tensors[part] = tensors[part] * strength
    if "b" in tensors:
        rank = tensors["a"].shape[0]
        alpha, by_root = (float(tensors["alpha"]), False) if "alpha" in tensors else peft
        divisor = math.sqrt(rank) if by_root else rank
        tensors["b"] = tensors["b"] * (1.0 if alpha is None else alpha / divisor)
    return LoraLayer(**{part: x for part, x in tensors.items() if part != "alpha"})


def _peft_settings(metadata: Mapping[str, Any], layer: str) -> tuple[float | None, bool]:
    """peft's alpha for a layer, from the settings that diffusers keeps in the file, and whether it
    is divided by the root of the rank (rank-stabilised LoRA)."""
    settings = metadata.get("lora_adapter_metadata")
    if not isinstance(settings, Mapping):
        return None, False
    plain = {key.removeprefix("transformer."): value for key, value in settings.items()}
    pattern = plain.get("alpha_pattern")
    own = pattern.get(layer) if isinstance(pattern, Mapping) else None
    alpha = plain.get("lora_alpha") if own is None else own
    by_root = bool(plain.get("use_rslora"))
    return float(alpha) if isinstance(alpha, int | float) else None, by_root
