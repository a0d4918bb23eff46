"""Prompts of a model that knows few words: any other word is refused, naming those it knows."""

import re

from sagewan.errors import RequestError
from sagewan.plan.models import Model

# Single Chinese characters (Chinese has no spaces), runs of any other letters and digits, and
# single signs that are neither white space nor punctuation, such as emoji.
_PIECE = re.compile(
    r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+|[^\w\s!-/:-@\[-`{-~，。、！？；：“”‘’（）]"
)


def check_words(prompt: str, model: Model) -> None:
    """RequestError if the model was taught a fixed vocabulary and the prompt leaves it."""
    if not model.words:
        return
    taught = {piece for words in model.words.values() for word in words for piece in _pieces(word)}
    unknown = [piece for piece in _pieces(prompt) if piece not in taught]
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


def _pieces(text: str) -> list[str]:
    return _PIECE.findall(text.lower())
