"""``sagewan quantize``, as people call it, and what it writes, inspected and run."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sagewan.checkpoint.find import demo_folder, find_model
from sagewan.cli import main
from sagewan.pipeline import generate
from sagewan.plan.request import Request
from tests.pipeline.test_run import frames_of

# The background is named, so that no rounding chooses another.
PROMPT = "a red ball rolls to the right on a white background"


def small(model: Path | str, output: Path, **fields: object) -> Request:
    values: dict[str, object] = {
        "prompt": PROMPT,
        "model": str(model),
        "output": output,
        "size": (128, 128),
        "frames": 5,
        "steps": 4,
        "seed": 4,
        "device": "cpu",
        "dtype": "float32",
    }
    return Request(**values | fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("to", ["fp8_scaled", "fp4_scaled"])
def test_quantise_inspect_generate(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = shutil.copytree(demo_folder(), tmp_path / "home")
    file = home / "quantised.safetensors"
    report = tmp_path / "errors.json"
    assert main(["quantize", str(home), str(file), "--to", to, "--report", str(report)]) == 0
    told = capsys.readouterr().err
    assert "60 layers read back and compared" in told
    assert len(json.loads(report.read_text())[str(file)]) == 60
    assert main(["inspect", str(file), "--json"]) == 0
    (part,) = [
        p for p in json.loads(capsys.readouterr().out)["parts"] if p["role"] == "transformer"
    ]
    format_ = {"fp8_scaled": "float8_e4m3fn", "fp4_scaled": "nvfp4"}[to]
    assert (part["format"], part["quantized"]) == (format_, 60)
    assert find_model(str(file)).quantized == format_
    result = generate(small(file, tmp_path / "a.mp4"))
    assert result.report["weights"]["format"] == format_
    assert result.report["weights"]["layers"][format_] == 60
    # The model quantised while it is loaded is as near to the original.
    plain = frames_of(generate(small("demo", tmp_path / "b.mp4")).path).astype(float)
    loaded = frames_of(generate(small("demo", tmp_path / "c.mp4", quantization=to)).path)
    distances = [float(np.abs(x - plain).mean()) for x in (frames_of(result.path), loaded)]
    assert max(distances) < 8
    unpacked = generate(small(file, tmp_path / "d.mp4", quantization="none"))
    assert unpacked.report["weights"]["format"] == "float32"
    assert np.array_equal(frames_of(unpacked.path), frames_of(result.path))


def test_a_diffusers_folder_is_a_model_by_itself(tmp_path: Path) -> None:
    target = tmp_path / "model"
    words = ["quantize", "demo", str(target), "--to", "fp8_scaled", "--layout", "diffusers"]
    assert main(words) == 0
    result = generate(small(target, tmp_path / "a.mp4"))
    assert result.report["weights"]["format"] == "float8_e4m3fn"
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*.safetensors")}
    assert main(words) == 0  # whole already: looked at, not written again
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["demo", "a.safetensors"], "--to"),
        (["demo", "a", "--to", "fp8_scaled"], "ending in .safetensors"),
        (["demo", "a.safetensors", "--to", "fp8_scaled", "--layout", "diffusers"], "is a folder"),
        (["nowhere", "a.safetensors", "--to", "fp8_scaled"], "neither a file nor a folder"),
        (["demo", "a.safetensors", "--to", "int3"], "invalid choice"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", *words]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert not list(tmp_path.iterdir())


def test_what_can_not_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, report = tmp_path / "a.safetensors", tmp_path / "absent" / "errors.json"
    quantize = ["quantize", "demo", str(file), "--to", "fp8_scaled"]
    assert main([*quantize, "--report", str(report)]) == 2
    assert "does not exist; create it" in capsys.readouterr().err
    assert not file.exists()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sagewan.checkpoint.writer.Writer.append", full)
    assert main(quantize) == 2
    assert "could not be written (No space left on device)" in capsys.readouterr().err
    assert not file.exists()
