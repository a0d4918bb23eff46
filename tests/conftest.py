"""What several packages of tests share."""

import contextlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

# Before torch is imported. The tests' tensors are small: a second thread costs more than it
# gives, and many times more where the cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tests of GPUs, which may run alone, do without hypothesis.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    # An example takes as long as the machine lets it: the tests' own limit is pytest's.
    settings.register_profile("shared machine", deadline=None)
    settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def shrunken_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A published model's name → the folder of its shrunken form, made once a session."""
    from tests import shrunken

    @cache
    def folder(name: str) -> Path:
        return shrunken.save(name, tmp_path_factory.mktemp("shrunken") / name)

    return folder


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what the user of this machine has stored."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("SAGEWAN_DATA", "SAGEWAN_CACHE", "SAGEWAN_MODELS"):
        monkeypatch.setenv(name, str(folder / name.lower()))
