"""Self-tests are remembered for exactly their machine and versions, and never half written."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sagewan.attention.cache import load_evidence, store
from sagewan.plan.catalogue import Problem
from sagewan.plan.evidence import SelfTest
from sagewan.plan.hardware import Hardware
from sagewan.plan.objection import Objection
from tests.machines import machine

ROW = "comfy_kitchen.int8_attention"
HARDWARE = replace(
    machine("H100", torch="2.13.0", triton="3.7.1", comfy_kitchen="0.2.40", sagewan="0.1"),
    driver="580.1",
)
H100 = HARDWARE.devices[0]
PROBLEM = Problem(head_dim=128, dtype="bfloat16")
PASSED = SelfTest(implementation=ROW, error=0.0117, limit=0.035, milliseconds=3.5)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAGEWAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def failed(code: str) -> SelfTest:
    objection = Objection(code, {"error": "it broke", "seconds": "300"})
    return SelfTest(
        implementation=ROW, error=None, limit=0.06, milliseconds=None, objection=objection
    )


def test_what_is_stored_is_found_again() -> None:
    assert load_evidence(H100, HARDWARE, PROBLEM).tests == {}
    store(PASSED, H100, HARDWARE, PROBLEM)
    assert load_evidence(H100, HARDWARE, PROBLEM).tests == {ROW: PASSED}


def test_an_objection_is_stored_with_its_values() -> None:
    store(failed("self-test-crashed"), H100, HARDWARE, PROBLEM)
    objection = load_evidence(H100, HARDWARE, PROBLEM).objection(ROW)
    assert objection is not None
    assert "it broke" in objection.sentence()


@pytest.mark.parametrize(
    "other",
    [
        replace(HARDWARE, driver="590.2"),
        replace(HARDWARE, torch_cuda="12.6"),
        *(
            replace(HARDWARE, packages={**HARDWARE.packages, name: "9"})
            for name in ("torch", "triton", "comfy-kitchen", "sagewan")
        ),
    ],
)
def test_another_version_of_anything_is_tested_again(other: Hardware) -> None:
    store(PASSED, H100, HARDWARE, PROBLEM)
    assert load_evidence(H100, other, PROBLEM).tests == {}


def test_another_gpu_is_tested_again() -> None:
    store(PASSED, H100, HARDWARE, PROBLEM)
    assert load_evidence(replace(H100, name="NVIDIA H200"), HARDWARE, PROBLEM).tests == {}
    # The same card with less memory free, or in another slot, is the same card.
    assert load_evidence(replace(H100, index=3, memory_free=1), HARDWARE, PROBLEM).tests


def test_packages_of_other_rows_do_not_matter() -> None:
    store(PASSED, H100, HARDWARE, PROBLEM)
    other = replace(HARDWARE, packages={**HARDWARE.packages, "sageattention": "2.2.0"})
    assert load_evidence(H100, other, PROBLEM).tests


@pytest.mark.parametrize("other", [{"head_dim": 64}, {"dtype": "float16"}])
def test_another_head_size_or_dtype_is_tested_again(other: dict[str, Any]) -> None:
    store(PASSED, H100, HARDWARE, PROBLEM)
    assert load_evidence(H100, HARDWARE, replace(PROBLEM, **other)).tests == {}
    # The length is not in question: the self-test tries several.
    assert load_evidence(H100, HARDWARE, replace(PROBLEM, keys=32_760)).tests


@pytest.mark.parametrize("code", ["self-test-no-memory", "self-test-timeout"])
def test_what_another_moment_may_answer_otherwise_is_not_remembered(code: str) -> None:
    test = failed(code)
    store(test, H100, HARDWARE, PROBLEM)
    assert load_evidence(H100, HARDWARE, PROBLEM).tests == {}
    assert test.objection is not None
    assert test.objection.sentence().endswith("sagewan doctor tries it again")


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff", '{"a": 1}'])
def test_a_corrupt_file_is_ignored_and_replaced(
    folder: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    store(PASSED, H100, HARDWARE, PROBLEM)
    (path,) = (folder / "self-tests").iterdir()
    path.write_text(content, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert load_evidence(H100, HARDWARE, PROBLEM).tests == {}
    assert caplog.records
    store(PASSED, H100, HARDWARE, PROBLEM)
    assert load_evidence(H100, HARDWARE, PROBLEM).tests


@pytest.mark.parametrize(
    "values", [{}, {"objection": 3}, {"objection": {"code": "no-such-code", "values": {}}}]
)
def test_a_corrupt_entry_is_ignored(
    folder: Path, values: object, caplog: pytest.LogCaptureFixture
) -> None:
    store(PASSED, H100, HARDWARE, PROBLEM)
    (path,) = (folder / "self-tests").iterdir()
    path.write_text(json.dumps(values), encoding="utf-8")
    assert load_evidence(H100, HARDWARE, PROBLEM).tests == {}
    assert ROW in caplog.text


def test_each_is_a_file_that_says_what_it_is_for(folder: Path) -> None:
    store(PASSED, H100, HARDWARE, PROBLEM)
    store(PASSED, replace(H100, name="another"), HARDWARE, PROBLEM)
    files = sorted((folder / "self-tests").iterdir())
    said = [json.loads(path.read_text(encoding="utf-8"))["for"] for path in files]
    assert sorted(f"device {name};" in key for key in said for name in ("another", H100.name)) == [
        *(False, False),
        *(True, True),
    ]


def test_runs_that_store_at_the_same_time_lose_nothing() -> None:
    gpus = [replace(H100, name=f"GPU {i}") for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda gpu: store(PASSED, gpu, HARDWARE, PROBLEM), gpus))
    assert all(load_evidence(gpu, HARDWARE, PROBLEM).tests for gpu in gpus)


def test_a_folder_that_cannot_be_made_is_only_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file is in the way", encoding="utf-8")
    store(PASSED, H100, HARDWARE, PROBLEM)
    assert "was not stored" in caplog.text


def test_what_compiles_at_run_time_is_tested_again_with_another_compiler() -> None:
    packages = {**HARDWARE.packages, "cuda-bindings": "13.0.3"}
    without = replace(HARDWARE, packages=packages)
    row = "sagewan.sageattn_hopper"
    broken = replace(failed("self-test-crashed"), implementation=row)
    store(broken, H100, without, PROBLEM)
    assert load_evidence(H100, without, PROBLEM).tests
    for name in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        installed = replace(HARDWARE, packages={**packages, name: "13.0.88"})
        assert load_evidence(H100, installed, PROBLEM).tests == {}
    assert "sagewan doctor tries it again" in broken.objection.sentence()  # type: ignore[union-attr]
