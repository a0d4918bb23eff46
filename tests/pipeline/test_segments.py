"""Growing segments are asked for in time, where there are any, and nobody is overruled."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sagewan.pipeline.segments import let_segments_grow

NEW, OLD = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


def torch_that(*, begun: bool) -> Any:
    return SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: begun))


@pytest.fixture(autouse=True)
def linux_before_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-45-generic")
    # Set and deleted again, so that what is set in a test is undone after it.
    for name in (NEW, OLD):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "torch", torch_that(begun=False))


@pytest.mark.parametrize("imported", [False, True])
def test_they_are_asked_for_once_and_stay(imported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not imported:
        monkeypatch.delitem(sys.modules, "torch")
    assert let_segments_grow()
    assert os.environ[NEW] == "expandable_segments:True"
    assert let_segments_grow()


@pytest.mark.parametrize(
    ("system", "release"), [("Windows", "10"), ("Linux", "6.18.33.2-microsoft-standard-WSL2")]
)
def test_not_where_torch_or_the_driver_has_none(
    system: str, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert not let_segments_grow()
    assert NEW not in os.environ


def test_on_windows_asking_is_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setenv(NEW, "expandable_segments:True")
    assert not let_segments_grow()


@pytest.mark.parametrize("name", [NEW, OLD])
@pytest.mark.parametrize(
    ("said", "grow"),
    [
        ("max_split_size_mb:128", False),
        ("expandable_segments:False", False),
        ("max_split_size_mb:128, expandable_segments: True", True),
    ],
)
def test_what_the_user_set_stays(
    name: str, said: str, grow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, said)
    assert let_segments_grow() == grow
    assert [os.environ.get(key) for key in (NEW, OLD) if key in os.environ] == [said]


def test_too_late_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch_that(begun=True))
    assert not let_segments_grow()
    assert NEW not in os.environ


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch has none elsewhere")
@pytest.mark.parametrize(
    "first",
    [
        "from sagewan.cli import main; main(['models'])",
        "import sagewan; sagewan.Session",
        "import torch; torch.zeros(1)",
    ],
)
def test_whoever_comes_first_asks(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if "microsoft" in platform.release().lower():
        pytest.skip("under WSL they are not asked for")
    clean = {key: value for key, value in os.environ.items() if key not in (NEW, OLD)}
    code = f"{first}; import torch; from sagewan.pipeline.probe import probe; "
    code += "assert probe().segments_grow"
    subprocess.run([sys.executable, "-c", code], env=clean, check=True)
