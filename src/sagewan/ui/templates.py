"""The files that pages are made of: templates → HTML, with every value escaped; and scripts."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sagewan.ui.words import Words


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, words: Words, /, **values: object) -> str:
    """A template of this package, in the language of ``words``."""
    return _environment().get_template(f"{template}.html").render(w=words, **values)


@cache
def static(name: str) -> str:
    """A file of this package as text."""
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")
