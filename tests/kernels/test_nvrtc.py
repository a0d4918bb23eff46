"""Machine code is kept where the user says, and a cache that is of no use is no failure."""

from pathlib import Path

import pytest

from sagewan.kernels import nvrtc

SOURCE = "hopper_attention.cu"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was compiled, in place of compiling it."""
    pytest.importorskip("cuda.bindings")
    names: list[str] = []

    def compile_source(name: str, *_: object) -> nvrtc.Compiled:
        names.append(name)
        return nvrtc.Compiled(code=b"code", log="")

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    monkeypatch.setattr(nvrtc, "_checked", lambda *_: (13, 0))
    return names


def machine_code() -> bytes:
    return nvrtc._machine_code(SOURCE, "sm_90a", {"STAGES": 3})


def test_it_is_compiled_once_and_kept_in_the_cache_folder(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGEWAN_CACHE", str(tmp_path))
    assert (machine_code(), machine_code()) == (b"code", b"code")
    assert compiled == [SOURCE]
    (kept,) = (tmp_path / "kernels").iterdir()
    assert kept.suffix == ".cubin"


def test_a_cache_that_can_be_neither_read_nor_written_costs_time_alone(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGEWAN_CACHE", str(tmp_path))
    machine_code()
    (kept,) = (tmp_path / "kernels").iterdir()
    kept.unlink()
    kept.mkdir()
    (kept / "in the way").touch()
    assert machine_code() == b"code"
    assert compiled == [SOURCE, SOURCE]
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == [kept.name]
