"""The clips of an evaluation on the disk, a JSON line each, so that it can go on after a stop."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sagewan.errors import RequestError

NAME = "clips.jsonl"


class Record:
    """The lines of one evaluation: its settings first, then a line for each clip that is done.

    Raises RequestError where the folder holds another evaluation, or can't be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._path = folder / NAME
        self._settings = json.loads(json.dumps(settings))
        self.clips: dict[int, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._read()
            else:
                self._append([{"settings": self._settings}])
        except OSError as error:
            raise RequestError(
                f"output={folder} can't be written ({error.strerror}); choose another folder"
            ) from error

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Keep some clips; on the disk when it returns."""
        lines = list(lines)
        self._append(lines)
        self.clips |= {line["clip"]: line for line in lines}

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _read(self) -> None:
        text = self._path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        first, *rest = whole.splitlines() or ["{}"]
        if _parsed(first, self._path).get("settings") != self._settings:
            raise RequestError(
                f"{self._path} is of an evaluation with other settings: choose another folder with "
                "-o, or remove it"
            )
        for line in rest:
            clip = _parsed(line, self._path)
            self.clips[clip["clip"]] = clip
        if whole != text:
            # A line that was cut off when the program was stopped.
            self._path.write_text(whole, encoding="utf-8")


def _parsed(line: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"{path} is damaged: remove it, or choose another folder with -o")
    return found
