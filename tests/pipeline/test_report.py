"""report.json beside what the end-to-end runs show of it."""

import hashlib
import json
from pathlib import Path

import pytest

from sagewan.errors import RequestError
from sagewan.pipeline.export import Video
from sagewan.pipeline.progress import Timings
from sagewan.pipeline.report import (
    Measured,
    make_report,
    output_facts,
    planned_changes,
    software,
    write_report,
)
from sagewan.plan.evidence import Evidence
from sagewan.plan.plan import make_plan
from sagewan.plan.request import Request
from tests.machines import WAN_14B, machine

RAN = {"mode": "sdpa", "implementation": "torch.sdpa", "torch_backend": "flash", "calls": 4}


def test_a_report_on_a_gpu() -> None:
    hardware = machine("H100", torch="2.13.0")
    request = Request(prompt="a cat", attention="sageattn_3_fp4", seed=1)
    plan = make_plan(request, WAN_14B, hardware, Evidence())
    measured = Measured(
        ran=(RAN,),
        formats={"bfloat16": 400, "float32": 3},
        multiplied=(),
        blocks=(),
        weight_bytes=28,
        peak_device_bytes=99,
    )
    timings = Timings({"load": 1.0, "denoise": 3.0}, {"denoise": (1.0, 2.0), "decode": (9.0,)})
    report = json.loads(
        json.dumps(make_report(plan, hardware, planned_changes(plan), measured, timings))
    )
    assert report["attention"]["ran"] == [RAN]
    assert report["attention"]["requested"] == "sageattn_3_fp4"
    assert report["attention"]["fallbacks"][0]["from"] == "sageattn_3_fp4"
    assert report["weights"] == {
        "requested": "auto",
        "format": "bfloat16",
        "bytes": 28,
        "compute": "bfloat16",
        "layers": {"bfloat16": 400, "float32": 3},
        "measured": {},
        "fallbacks": [],
        "lora": [],
    }
    assert report["memory"] == {
        "peak_device_bytes": 99,
        "planned_device_bytes": plan.memory.device_peak,
        "peak_host_bytes": None,
        "planned_host_bytes": plan.memory.host_peak,
        "resident_blocks": 40,
        "swapped_blocks": 0,
        "pinned_bytes": 0,
        "unpinned_blocks": 0,
        "notes": [],
    }
    assert report["timings"] == {
        "stages": {"load": 1.0, "denoise": 3.0},
        "steps": [1.0, 2.0],
        "total": 4.0,
    }
    assert report["software"]["torch"] == "2.13.0"


@pytest.mark.parametrize(
    ("implementation", "emulated"),
    [("torch.sdpa", False), ("emulated.sageattn_3", True), ("someone.else", False)],
)
def test_emulation_is_labelled_by_what_ran(implementation: str, emulated: bool) -> None:
    plan = make_plan(Request(prompt="a cat"), WAN_14B, machine("H100"), Evidence())
    ran = {**RAN, "implementation": implementation}
    measured = Measured(
        ran=(ran,), formats={}, multiplied=(), blocks=(), weight_bytes=0, peak_device_bytes=None
    )
    report = make_report(plan, machine("H100"), (), measured, Timings({}, {}))
    assert report["attention"]["emulated"] is emulated


def test_software_names_the_driver_where_there_is_one() -> None:
    assert "driver" not in software(machine())
    assert software(machine("H100"))["cuda"] == "13.0"


def test_the_output_is_described_as_it_lies_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"video")
    facts = output_facts(path, Video(size=(64, 48), frames=9, fps=12), rejected=False)
    assert facts == {
        "path": str(path),
        "rejected": False,
        "frames": 9,
        "size": [64, 48],
        "fps": 12,
        "sha256": hashlib.sha256(b"video").hexdigest(),
    }


def test_a_report_that_can_not_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="could not be written"):
        write_report(tmp_path / "none" / "r.json", {})
