"""Runs of shrunken models, for the tests of this package."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.find import find_model
from sagewan.pipeline.build import build
from sagewan.pipeline.conditions import encode
from sagewan.pipeline.denoise import denoise
from sagewan.pipeline.pictures import load_picture
from sagewan.pipeline.progress import Watch
from sagewan.plan.decoding import EXACT
from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import Hardware
from sagewan.plan.lora import LoraFile
from sagewan.plan.models import Model
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.request import Request
from tests.machines import machine
from tests.shrunken import NEGATIVE, PROMPT


def plan_for(folder: Path, hardware: Hardware | None = None, **changes: Any) -> Plan:
    """A short, small, guided run with exact attention, on the CPU if no hardware is given."""
    settings: dict[str, Any] = {
        "prompt": PROMPT,
        "negative": NEGATIVE,
        "model": str(folder),
        "attention": "sdpa",
        "steps": 3,
        "cfg": 4.0,
        "seed": 7,
        "size": (64, 64),
        "frames": 5,
    }
    request = Request(**settings | changes)
    return make_plan(request, find_model(str(folder)), hardware or machine(), Evidence())


def plain_plan(
    model: Model, dtype: str = "float32", loras: tuple[LoraFile, ...] = ()
) -> SimpleNamespace:
    """As much of a plan as the building of components asks for."""
    weights = SimpleNamespace(format=None, unpacks=False, quantises=lambda name: False, measured={})
    device = SimpleNamespace(torch_name="cpu")
    return SimpleNamespace(
        model=model, dtype=dtype, loras=loras, weights=weights, device=device, decoding=EXACT
    )


def latents_of(plan: Plan, launcher: Launcher | None = None) -> torch.Tensor:
    """Everything up to the latents."""
    components = build(plan, launcher or Launcher())
    conditions = encode(components, plan, pictures_of(plan))
    return denoise(components, plan, conditions, Watch())


def pictures_of(plan: Plan) -> Mapping[str, Image.Image]:
    named = {"image": plan.request.image, "last_image": plan.request.last_image}
    return {name: load_picture(path, plan.grid_size) for name, path in named.items() if path}


def picture(path: Path, seed: int, size: tuple[int, int] = (160, 160)) -> Path:
    """A PNG of soft coloured patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())
