"""The measured magnitudes that MagCache goes by, kept between runs for exactly the model, the LoRAs
and the steps that they were measured with, each in a file of its own. Imports no torch."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from sagewan.cache import cache_folder, write_whole
from sagewan.plan.plan import Plan
from sagewan.plan.step_cache import Magnitudes

logger = logging.getLogger(__name__)


def load_magnitudes(plan: Plan) -> Magnitudes | None:
    """Those of the plan's model and steps; None if they were not measured."""
    path = _path(plan)
    stored = _read(path)
    if stored is None:
        return None
    values = stored.get("magnitudes") if isinstance(stored, dict) else None
    if not isinstance(values, list) or stored.get("for") != _key(plan):
        logger.warning("%s is ignored: it holds no magnitudes of this model and these steps", path)
        return None
    if all(value is None or isinstance(value, float) for value in values):
        return tuple(values)
    logger.warning("%s is ignored: it holds no numbers", path)
    return None


def store_magnitudes(plan: Plan, magnitudes: Magnitudes) -> Path:
    """Keep them for later runs; where they are. Raises OSError."""
    path = _path(plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"for": _key(plan), "magnitudes": list(magnitudes)}
    write_whole(path, json.dumps(stored, indent=1).encode())
    return path


def _path(plan: Plan) -> Path:
    """One for each key, so that two measurements at once don't write over one another."""
    name = hashlib.sha256(_key(plan).encode()).hexdigest()[:16]
    return cache_folder() / "magnitudes" / f"{name}.json"


def _key(plan: Plan) -> str:
    model, steps = plan.model, plan.steps
    parts = {
        "model": model.name,
        "in": model.location,
        "parameters": model.parameters,
        "LoRAs": ", ".join(str(file.lora) for file in plan.loras),
        "steps": steps.count,
        "shift": steps.shift,
        "scheduler": steps.scheduler,
        "boundary": steps.boundary,
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items() if value)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return None
