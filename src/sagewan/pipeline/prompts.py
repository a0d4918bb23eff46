"""Prompts from a text file, one a line."""

from pathlib import Path

from sagewan.errors import RequestError
from sagewan.plan.models import Model
from sagewan.plan.words import check_words


def read_prompts(path: Path, model: Model, count: int | None = None) -> list[str]:
    """The first ``count`` prompts of a UTF-8 file, or all; empty lines are none. Raises
    RequestError if there is none, or for words that the model was not taught."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8" if isinstance(error, ValueError) else error.strerror
        raise RequestError(f"prompts={path} can't be read ({why}); give a text file") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()][:count]
    if not prompts:
        raise RequestError(f"prompts={path} holds no prompt: write one a line")
    for number, prompt in enumerate(prompts, start=1):
        check_words(f"prompts, number {number}", prompt, model)
    return prompts
