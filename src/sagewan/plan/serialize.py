"""Requests and plans as JSON, in one place: what a video, a report and a job record hold."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from sagewan.errors import RequestError
from sagewan.plan.attention import Choice
from sagewan.plan.hardware import Device
from sagewan.plan.layers import Role
from sagewan.plan.lora import Lora
from sagewan.plan.memory import MemoryPlan
from sagewan.plan.models import DEMO, PUBLISHED
from sagewan.plan.plan import Plan
from sagewan.plan.request import Ends, Request
from sagewan.plan.sparsity import Sparsity, SparsityPlan
from sagewan.plan.speed import estimated_seconds
from sagewan.plan.step_cache import CachePlan, StepCache
from sagewan.plan.weights import WeightsPlan

# Raised when a field changes its meaning; a field more is only refused, by name.
SCHEMA = 1

# Where a run writes is its own affair: a video made again from its settings goes elsewhere.
_OF_THE_RUN = ("output", "report")


@cache
def field_types() -> Mapping[str, Any]:
    """The type of each field of Request, without the None that stands for "not said"."""
    return {name: _without_none(hint) for name, hint in get_type_hints(Request).items()}


def _without_none(hint: Any) -> Any:
    choices = [choice for choice in get_args(hint) if choice is not NoneType]
    return choices[0] if NoneType in get_args(hint) else hint


def _integers(value: object) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    return None


def _pair(value: object) -> tuple[int, int] | None:
    numbers = _integers(value)
    return (numbers[0], numbers[1]) if numbers is not None and len(numbers) == 2 else None


def _loras(value: object) -> tuple[Lora, ...] | None:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(map(Lora.parse, value))
    return None


def _number(value: object) -> float | None:
    return float(value) if type(value) in (int, float) else None  # type: ignore[arg-type]


# From a JSON value to a field's value, or None where the JSON is of another type.
_READ: Mapping[Any, Callable[[Any], object | None]] = {
    str: lambda value: value if isinstance(value, str) else None,
    int: lambda value: value if type(value) is int else None,
    float: _number,
    bool: lambda value: value if isinstance(value, bool) else None,
    Path: lambda value: Path(value) if isinstance(value, str) else None,
    Ends: lambda value: Ends.parse(value) if isinstance(value, str) else None,
    StepCache: lambda value: StepCache.parse(value) if isinstance(value, str) else None,
    Sparsity: lambda value: Sparsity.parse(value) if isinstance(value, str) else None,
    tuple[int, int]: _pair,
    tuple[int, ...]: _integers,
    tuple[Lora, ...]: _loras,
}


def request_to_json(request: Request) -> dict[str, Any]:
    """Every field by name; paths and ends as text, tuples as lists."""
    return {name: _plain(getattr(request, name)) for name in field_types()}


def request_from_json(data: Mapping[str, Any]) -> Request:
    """The request that :func:`request_to_json` wrote; a field left out takes its default.

    Raises RequestError for a field this version does not know or of another type.
    """
    return Request(**fields_from_json(data))


def fields_from_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """As :func:`request_from_json`, but the fields alone, so that others can override them."""
    types = field_types()
    values = {}
    for name, value in data.items():
        if name not in types:
            raise RequestError(f"the setting {name} is not known to this version; update sagewan")
        if value is not None:
            values[name] = _READ[types[name]](value)
            if values[name] is None:
                raise RequestError(f"the setting {name}={json.dumps(value)} can't be read")
    return values


def settings_from_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that :func:`settings` wrote. Whoever made the video does not choose the files
    that are written here, so ``output`` and ``report`` are left out even where they are given."""
    return fields_from_json({key: x for key, x in data.items() if key not in _OF_THE_RUN})


def settings(request: Request) -> dict[str, Any]:
    """The fields that make a video again anywhere on this machine; paths are made absolute."""
    if request.model not in (DEMO, *PUBLISHED):
        folder = Path(os.path.expanduser(request.model))  # noqa: PTH111 Path's raises for ~nobody
        request = replace(request, model=str(folder.absolute()))
    if request.image:
        request = replace(request, image=request.image.absolute())
    if request.last_image:
        request = replace(request, last_image=request.last_image.absolute())
    loras = tuple(replace(lora, path=lora.path.absolute()) for lora in request.lora)
    fields = request_to_json(replace(request, lora=loras))
    return {name: value for name, value in fields.items() if name not in _OF_THE_RUN}


def settings_of(plan: Plan) -> dict[str, Any]:
    """As :func:`settings`, and what was measured for the run: made again it reuses the same steps,
    though the model may have been measured anew."""
    request = plan.request
    return settings(replace(request, cache=plan.cache.as_made) if plan.cache else request)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """What was decided, for people and scripts; the same plan always gives the same JSON."""
    return {
        "model": {
            "name": plan.model.name,
            "family": plan.model.family,
            "layers": plan.model.layers,
            "heads": plan.model.heads,
            "head_dim": plan.model.head_dim,
            "experts": plan.model.experts,
            "parameters": plan.model.parameters,
        },
        "task": plan.task,
        "device": _device(plan.device),
        "dtype": plan.dtype,
        "size": list(plan.size),
        "grid_size": list(plan.grid_size),
        "frames": plan.frames,
        "fps": plan.fps,
        "tokens": plan.tokens,
        "seed": plan.seed,
        "negative": plan.negative,
        "steps": {
            "count": plan.steps.count,
            "scheduler": plan.steps.scheduler,
            "shift": plan.steps.shift,
            "cfg": plan.steps.cfg,
            "cfg_2": plan.steps.cfg_2,
            "boundary": plan.steps.boundary,
        },
        "sparsity": plan.sparsity and _sparsity(plan.sparsity),
        "cache": plan.cache and _cache(plan.cache),
        "attention": _attention(plan),
        "weight_bytes": plan.weight_bytes,
        "weights": _weights(plan.weights),
        "blocks": {
            "implementation": plan.blocks.row.name,
            "fused": plan.blocks.row.fused,
            "why_not": plan.blocks.why() or None,
            "unproven": [row.name for row in plan.blocks.unproven],
        },
        "memory": _memory(plan.memory),
        "decoding": asdict(plan.decoding),
        "seconds": estimated_seconds(plan),
        "lora": [file.to_json() for file in plan.loras],
        "notes": list(plan.notes),
    }


def _sparsity(plan: SparsityPlan) -> dict[str, Any]:
    return {
        "requested": str(plan.sparsity),
        "grid": list(plan.grid),
        "blocks": plan.blocks,
        "kept": plan.kept,
        "dense_steps": plan.dense_steps,
        "dense_layers": plan.dense_layers,
    }


def _cache(cache: CachePlan) -> dict[str, Any]:
    return {
        "requested": cache.cache.rule,
        "first": cache.first,
        "last": cache.last,
        "forwards": cache.forwards,
        "reusable": cache.reusable,
        "steps": None if cache.reused is None else [step + 1 for step in cache.reused],
    }


def _memory(memory: MemoryPlan) -> dict[str, Any]:
    return {
        "block_swap": memory.block_swap,
        "chunk_tokens": memory.chunks.tokens,
        "heads_at_once": memory.chunks.heads,
        "text_keys_bytes": memory.text_keys,
        "text_encoder_swap": memory.text_swap,
        "encode_tile": memory.encode_tile and list(memory.encode_tile),
        "decode_tile": memory.decode_tile and list(memory.decode_tile),
        "peak_device_bytes": memory.device_peak,
        "peak_host_bytes": memory.host_peak,
        "pinned_bytes": memory.pinned,
        "fits": memory.fits,
        "segments_grow": memory.segments_grow,
        "stages": {
            stage.name: [
                {
                    "name": item.name,
                    "device": item.device,
                    "host": item.host,
                    "pinned": item.pinned,
                    "mapped": item.mapped,
                }
                for item in stage.items
            ]
            for stage in memory.stages
        },
    }


def _device(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "torch_name": device.torch_name,
        "compute_capability": f"{device.sm // 10}.{device.sm % 10}" if device.is_cuda else None,
        "memory_total": device.memory_total,
    }


def _attention(plan: Plan) -> dict[str, Any]:
    attention = plan.attention
    return {
        "requested": attention.requested,
        "from_preset": attention.from_preset,
        "main": _choice(attention.main),
        "ends": attention.ends and _choice(attention.ends),
        "first": attention.first,
        "last": attention.last,
        "keep_layers": sorted(attention.keep_layers),
        "strict": attention.strict,
        "unproven": [row.name for row in attention.unproven],
        "fallbacks": [
            {"from": step.from_mode, "to": step.to_mode, "why": step.why()}
            for step in attention.fallbacks
        ],
    }


def _weights(weights: WeightsPlan) -> dict[str, Any]:
    rows = (
        {role.value: weights.row(weights.format, role) for role in Role} if weights.format else {}
    )
    return {
        "requested": weights.requested,
        "from_preset": weights.from_preset,
        "quantization": weights.quantization,
        "format": weights.format,
        "unpacked": weights.unpacks,
        "measured": {part: str(path) for part, path in weights.measured.items()},
        "multiply": {
            role: {"implementation": row.name, "compute": row.compute, "emulated": row.emulated}
            for role, row in rows.items()
        },
        "unproven": [row.name for row in weights.unproven],
    }


def _choice(choice: Choice) -> dict[str, Any]:
    row = choice.row
    return {
        "mode": row.mode,
        "implementation": row.name,
        "qk": row.qk,
        "pv": row.pv,
        "emulated": row.emulated,
    }


def _plain(value: object) -> object:
    if isinstance(value, Path | Ends | Sparsity | StepCache | Lora):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
