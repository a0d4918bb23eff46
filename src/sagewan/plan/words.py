"""Prompts of a model that knows few words: any other word is refused, naming those it knows."""

import re

from sagewan.errors import RequestError
from sagewan.plan.models import Model

# Runs of Chinese, runs of any other letters and digits, and single signs that are neither
# white space nor punctuation, such as emoji.
_WORD = re.compile(
    r"[\u4e00-\u9fff]+|[^\W\u4e00-\u9fff]+|[^\w\s!-/:-@\[-`{-~，。、！？；：“”‘’（）]"
)
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def check_words(prompt: str, model: Model) -> None:
    """RequestError if the model was taught a fixed vocabulary and the prompt leaves it."""
    if not model.words:
        return
    known = {word for words in model.words.values() for word in words}
    unknown = [piece for piece in _pieces(prompt, known) if piece not in known]
    if unknown:
        # "other" holds the small words that join the rest; naming them would hide the answer.
        listed = (
            f"{kind}: {', '.join(words)}" for kind, words in model.words.items() if kind != "other"
        )
        raise RequestError(
            f"prompt: the model {model.name} was never taught "
            f"{', '.join(repr(word) for word in dict.fromkeys(unknown))}; "
            f"it knows {'; '.join(listed)}"
        )


def _pieces(prompt: str, known: set[str]) -> list[str]:
    """The words of a prompt; Chinese, which has no spaces, is cut at the longest known word."""
    pieces: list[str] = []
    for run in _WORD.findall(prompt.lower()):
        pieces += _cut(run, known) if _CHINESE.match(run) else [run]
    return pieces


def _cut(run: str, known: set[str]) -> list[str]:
    pieces = []
    while run:
        length = next((n for n in range(len(run), 1, -1) if run[:n] in known), 1)
        pieces.append(run[:length])
        run = run[length:]
    return pieces
