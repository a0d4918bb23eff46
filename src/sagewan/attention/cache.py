"""Remembers self-tests between runs, for exactly the machine, the versions, the head size and the
dtype that they were made with. Each is a file of its own, so that two runs never undo each other's.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sagewan.attention.worker import self_test_from
from sagewan.cache import cache_folder, write_whole
from sagewan.plan.blocks import block_rows
from sagewan.plan.catalogue import (
    CUDA_BINDINGS,
    NVRTC,
    Problem,
    row_named,
    rows_of,
)
from sagewan.plan.evidence import Evidence, SelfTest
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.modes import MODES
from sagewan.plan.row import Row

logger = logging.getLogger(__name__)

# What another moment may answer otherwise is not remembered.
_PASSING = ("self-test-no-memory", "self-test-timeout")


def load_evidence(device: Device, hardware: Hardware, problem: Problem) -> Evidence:
    """The self-tests that were stored for this problem on this device with these versions."""
    evidence = Evidence()
    for row in (*(row for mode in MODES for row in rows_of(mode)), *block_rows()):
        values = _read(_path(row, _key(row, device, hardware, problem)))
        if values is not None:
            evidence = _with(evidence, row, values)
    return evidence


def store(test: SelfTest, device: Device, hardware: Hardware, problem: Problem) -> None:
    """Remember a self-test. A folder that can't be written only costs the time to test again."""
    if test.objection and test.objection.code in _PASSING:
        return
    blocks = {row.name: row for row in block_rows()}
    row = blocks.get(test.implementation) or row_named(test.implementation)
    key = _key(row, device, hardware, problem)
    path = _path(row, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"for": key, **asdict(test)}, indent=1).encode())
    except OSError as error:
        logger.warning("the self-test of %s was not stored: %s", test.implementation, error)


def _path(row: Row, key: str) -> Path:
    name = f"{row.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    return cache_folder() / "self-tests" / name


def _key(row: Row, device: Device, hardware: Hardware, problem: Problem) -> str:
    """Everything that a result may depend on."""
    triton = hardware.packages.get("triton") or hardware.packages.get("triton-windows")
    package = hardware.packages.get(row.package) if row.package else None
    # What compiles at run time depends on its compiler too.
    compilers = {
        name: hardware.packages.get(name) for name in NVRTC if row.package == CUDA_BINDINGS
    }
    parts = {
        "row": row.name,
        "head size": problem.head_dim,
        "dtype": problem.dtype,
        "device": device.name,
        "driver": hardware.driver if device.is_cuda else None,
        "torch": hardware.packages.get("torch"),
        "cuda": hardware.torch_cuda,
        "triton": triton,
        row.package or "package": package,
        **compilers,
        "sagewan": hardware.packages.get("sagewan"),
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items() if value)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return None
    if isinstance(stored, dict):
        stored.pop("for", None)
        return stored
    logger.warning("%s is ignored: it holds no self-test", path)
    return None


def _with(evidence: Evidence, row: Row, values: Mapping[str, Any]) -> Evidence:
    try:
        test = self_test_from(values)
        if test.objection:
            test.objection.sentence()
    except (TypeError, KeyError, AttributeError) as error:
        logger.warning("the stored self-test of %s is ignored: %r", row.name, error)
        return evidence
    return evidence.with_test(test)
