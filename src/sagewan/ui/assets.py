"""gradio's own scripts and styles, by name: known, and served, before gradio is imported."""

import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# What stands on the first tab, and in the frame around it.
COMPONENTS = (
    *("accordion", "button", "column", "dropdown", "file", "form", "group", "html", "image"),
    *("radio", "row", "tabitem", "tabs", "textbox", "checkbox"),
)
# A dynamic import in a script that vite has bundled, and the files that it wants beside itself.
_IMPORT = re.compile(
    r"(?:(?P<kind>\w+):\(\)=>\w+\(\(\)=>)?import\(`\./(?P<file>[\w.-]+)`\)"
    r".{0,40}?__vite__mapDeps\(\[(?P<wanted>[\d,]*)\]\)"
)
_TABLE = re.compile(r"m\.f=\[(.*?)\]")
_COMPONENT = re.compile(r"(\w+):\{(?=\w+:\(\)=>\w+\(\(\)=>import\()")


def folder() -> Path:
    """Where they lie."""
    spec = importlib.util.find_spec("gradio")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent / "templates" / "frontend" / "assets"


@cache
def names() -> frozenset[str]:
    """Every file there."""
    return frozenset(path.name for path in folder().glob("*"))


@cache
def wanted_first() -> tuple[str, ...]:
    """The files that the first tab will want, as far as the scripts tell: a browser that hears of
    them early fetches them while the server still starts. None, if a gradio's scripts are of
    another make."""
    page = folder().parent / "index.html"
    if not page.is_file():
        return ()
    entries = re.findall(r"assets/(index-[\w-]+\.(?:js|css))", _text(page))
    found = dict.fromkeys(entries)
    for entry in entries:
        if entry.endswith(".js") and entry in names():
            found |= dict.fromkeys(_table(_text(folder() / entry)))
    for script in [name for name in found if name.startswith(("Index-", "core-"))]:
        if script.endswith(".js") and script in names():
            found |= dict.fromkeys(_imported(_text(folder() / script)))
    return tuple(name for name in found if name in names())


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _table(script: str) -> list[str]:
    """Every file that a script may import."""
    match = _TABLE.search(script)
    return re.findall(r'"\./([\w.-]+)"', match[1]) if match else []


def _imported(script: str) -> Iterator[str]:
    """The files of the frame and of :data:`COMPONENTS` that a script names."""
    table = _table(script)
    starts = [(match.start(), match[1]) for match in _COMPONENT.finditer(script)]
    for match in _IMPORT.finditer(script):
        if match["kind"] is None:
            needed = match["file"].startswith("Blocks-")
        else:
            component = next((name for at, name in reversed(starts) if at < match.start()), "")
            needed = component in COMPONENTS
        if needed:
            yield match["file"]
            yield from (table[int(place)] for place in match["wanted"].split(",") if place)
