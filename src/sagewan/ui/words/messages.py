"""The English sentences that errors, notes and warnings are made of, as templates.

They are written where they are raised; here they are found in the sources, so that a translation
can be held against them, and recognised in a finished sentence, so that it can be translated.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_ERRORS = re.compile(r"[A-Z]\w*(Error|Cancelled)|Cancelled")
_HOLE = "{}"


def templates(package: Path) -> Iterator[str]:
    """Every sentence with ``{}`` for its values that is raised as an error of the user's, or
    yielded as a note, in the modules below a folder."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield from filter(None, map(_template, _sentences(node)))


def _sentences(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Call) and node.args:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if _ERRORS.fullmatch(name):
            yield node.args[0]
    elif isinstance(node, ast.Yield) and isinstance(node.value, ast.JoinedStr | ast.Constant):
        yield node.value


def _template(node: ast.expr) -> str | None:
    """``f"steps={n}: no"`` → ``steps={}: no``; None if it is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) and " " in node.value else None
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = [str(part.value) if isinstance(part, ast.Constant) else _HOLE for part in node.values]
    text = "".join(parts)
    return text if " " in text else None


@cache
def pattern(template: str) -> re.Pattern[str]:
    """What recognises a sentence made from a template, with a group for each value."""
    parts = (re.escape(part) for part in template.split(_HOLE))
    return re.compile("(.*?)".join(parts), re.DOTALL)


def filled(template: str, values: tuple[str, ...]) -> str:
    """A template with its values in their order; ``{1}`` names the second."""
    counted = iter(range(len(values)))
    return re.sub(r"\{(\d*)\}", lambda m: values[int(m[1]) if m[1] else next(counted)], template)
