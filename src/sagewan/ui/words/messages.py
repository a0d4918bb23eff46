"""The English sentences that errors, notes and warnings are made of, as templates.

They are written where they are raised; here they are found in the sources, so that a translation
can be held against them, and recognised in a finished sentence, so that it can be translated.
"""

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_HOLE = "{}"
# Raised to who calls a function with wrong tensors, or at rows that are then refused by a sentence
# of their own: no visitor reads these.
_NOT_SHOWN = {"ShapeError", "ImplementationError", "CudaError", "CublasError"}
_ERROR = re.compile(r"[A-Z]\w*Error|Cancelled")
# What sentences are called that are kept for later.
_KEPT = {"note", "notes", "wrong", "refusal"}


def templates(package: Path) -> Iterator[str]:
    """Every sentence with ``{}`` for its values that is raised as an error of the user's, yielded
    or kept as a note, in the modules below a folder."""
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for expression in (*_raised(tree), *_noted(tree)):
            yield from filter(None, map(_template, _texts(expression)))


def unread(package: Path) -> Iterator[str]:
    """Errors of the user's whose sentence :func:`templates` does not find, as code."""
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        local = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for message in _messages(tree):
            helper = isinstance(message, ast.Call) and _name(message.func) in local
            if not (helper or list(_texts(message))):
                yield f"{path.name}: {ast.unparse(message)}"


def _messages(tree: ast.AST) -> Iterator[ast.expr]:
    """The first argument of every error that carries a sentence for the user."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = _name(node.func)
            known = name in _NOT_SHOWN or hasattr(builtins, name)
            if _ERROR.fullmatch(name) and not known:
                yield node.args[0]


def _raised(tree: ast.AST) -> Iterator[ast.expr]:
    """The sentences of errors, and what the functions that make them return."""
    helpers = set()
    for message in _messages(tree):
        yield message
        if isinstance(message, ast.Call):
            helpers.add(_name(message.func))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name in helpers:
            yield from (
                node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Return) and node.value
            )


def _noted(tree: ast.AST) -> Iterator[ast.expr]:
    """What is yielded, or kept under the name of a note."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Yield) and node.value:
            yield node.value
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
            name = target.attr if isinstance(target, ast.Attribute) else _name(target)
            if name in _KEPT:
                yield node.value


def _texts(expression: ast.expr) -> Iterator[ast.expr]:
    """The texts that an expression may be."""
    if isinstance(expression, ast.Constant | ast.JoinedStr):
        yield expression
    elif isinstance(expression, ast.IfExp):
        yield from (*_texts(expression.body), *_texts(expression.orelse))
    elif isinstance(expression, ast.Tuple):
        for one in expression.elts:
            yield from _texts(one)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _template(node: ast.expr) -> str | None:
    """``f"steps={n}: no"`` → ``steps={}: no``; None if it is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) and " " in node.value else None
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = [str(part.value) if isinstance(part, ast.Constant) else _HOLE for part in node.values]
    text = "".join(parts)
    return text if " " in text else None


def fits(template: str, text: str) -> bool:
    """Whether a sentence may be made from a template. Most are ruled out without a pattern, whose
    making takes longer than all the rest of a translation."""
    own = template.split(_HOLE)
    if not (text.startswith(own[0]) and text.endswith(own[-1]) and all(p in text for p in own)):
        return False
    return pattern(template).fullmatch(text) is not None


@cache
def pattern(template: str) -> re.Pattern[str]:
    """What recognises a sentence made from a template, with a group for each value."""
    parts = (re.escape(part) for part in template.split(_HOLE))
    return re.compile("(.*?)".join(parts), re.DOTALL)


def filled(template: str, values: tuple[str, ...]) -> str:
    """A template with its values in their order; ``{1}`` names the second."""
    counted = iter(range(len(values)))
    return re.sub(r"\{(\d*)\}", lambda m: values[int(m[1]) if m[1] else next(counted)], template)
