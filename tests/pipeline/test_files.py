"""Outputs: refused early, whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from sagewan.errors import RequestError
from sagewan.pipeline import files
from sagewan.pipeline.files import check_outputs, check_space, written_whole
from sagewan.plan.request import Request


def asked(**fields: object) -> Request:
    return Request(prompt="x", **fields)  # type: ignore[arg-type]


def test_a_good_output_is_not_written_by_the_check(tmp_path: Path) -> None:
    check_outputs(asked(output=tmp_path / "a.mp4", report=tmp_path / "r.json"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_will_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.MP4").write_text("old")
    check_outputs(asked(output=tmp_path / "a.MP4"))
    assert (tmp_path / "a.MP4").read_text() == "old"


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("ball.avi", r"use .*ball\.mp4"),
        ("ball", r"use .*ball\.mp4"),
        (".", r"\.mp4"),
        ("missing/ball.mp4", "does not exist; create it"),
        ("file/ball.mp4", "can't be written|does not exist"),
        ("folder.mp4", "is a folder: name a file in it"),
        ("n" * 300 + ".mp4", "can't be written"),
    ],
)
def test_a_wrong_output_is_one_sentence(tmp_path: Path, output: str, sentence: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=sentence):
        check_outputs(asked(output=tmp_path / output))


def test_a_report_is_checked_as_well(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"report=.*does not exist"):
        check_outputs(asked(output=tmp_path / "a.mp4", report=tmp_path / "no" / "r.json"))


def test_a_report_never_replaces_the_picture(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    with pytest.raises(RequestError, match="is the input picture"):
        check_outputs(asked(output=tmp_path / "a.mp4", image=picture, report=picture))


def test_one_file_under_two_names_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="name two files"):
        check_outputs(asked(output=Path("a.mp4"), report=tmp_path / "a.mp4"))
    with pytest.raises(RequestError, match="is the input picture"):
        check_outputs(
            asked(output=Path("a.mp4"), image=Path("p.png"), report=tmp_path / "." / "p.png")
        )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_folder_where_no_file_can_be_made_is_refused() -> None:
    with pytest.raises(RequestError, match="can't be written"):
        check_outputs(asked(output=Path("/proc/ball.mp4")))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RequestError, match="can't be written"):
        check_outputs(asked(output=tmp_path / "a.mp4"))


@pytest.mark.skipif(os.name == "nt", reason="no /dev/null")
def test_a_device_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to("/dev/null")
    with pytest.raises(RequestError, match="not an ordinary file"):
        check_outputs(asked(output=tmp_path / "a.mp4"))


def test_a_disk_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "a.mp4"
    check_space(output, (256, 256), 17)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RequestError, match=r"free some space"):
        check_space(output, (256, 256), 17)


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    with written_whole(target) as partial:
        partial.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def fail_half_way(target: Path, error: BaseException) -> None:
    with written_whole(target) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "a.mp4"
    target.write_text("old")
    with pytest.raises(error):
        fail_half_way(target, error())
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    with pytest.raises(RequestError, match="the disk is full"):
        fail_half_way(target, OSError(errno.ENOSPC, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="no umask")
def test_the_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    target, other = tmp_path / "a.json", tmp_path / "b.json"
    other.write_text("")
    with written_whole(target) as partial:
        partial.write_text("x")
    assert target.stat().st_mode == other.stat().st_mode
