"""What is kept of an evaluation that is stopped."""

from pathlib import Path

import pytest

from sagewan.errors import RequestError
from sagewan.evaluate.record import NAME, Record

SETTINGS = {"steps": 3, "size": (1, 2)}


def test_clips_are_there_again(tmp_path: Path) -> None:
    record = Record(tmp_path / "a" / "b", SETTINGS)
    record.add([{"clip": 0, "x": "一"}, {"clip": 1, "x": 0.1}])
    again = Record(tmp_path / "a" / "b", SETTINGS)
    assert again.clips == record.clips == {0: {"clip": 0, "x": "一"}, 1: {"clip": 1, "x": 0.1}}


def test_a_line_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    Record(tmp_path, SETTINGS).add([{"clip": 0}, {"clip": 1}])
    path = tmp_path / NAME
    path.write_text(path.read_text()[:-4])
    record = Record(tmp_path, SETTINGS)
    assert set(record.clips) == {0}
    record.add([{"clip": 1}])
    assert set(Record(tmp_path, SETTINGS).clips) == {0, 1}


def test_other_settings_and_damage_are_refused(tmp_path: Path) -> None:
    Record(tmp_path, SETTINGS)
    with pytest.raises(RequestError, match="other settings"):
        Record(tmp_path, SETTINGS | {"steps": 4})
    (tmp_path / NAME).write_text("no json\n")
    with pytest.raises(RequestError, match="damaged"):
        Record(tmp_path, SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="can't be written"):
        Record(tmp_path / "file" / "folder", SETTINGS)
