"""Prompts of a model that knows few words: any other word is refused, naming those it knows."""

import re
from collections.abc import Iterator

from sagewan.errors import RequestError
from sagewan.plan.models import Model

# Single Chinese characters (Chinese has no spaces), runs of any other letters and digits, and
# single signs that are neither white space nor punctuation, such as emoji.
_PIECE = re.compile(
    r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+|[^\w\s!-/:-@\[-`{-~，。、！？；：“”‘’（）]"
)


def check_words(name: str, text: str, model: Model) -> None:
    """RequestError if the model was taught a fixed vocabulary and the text, which is the field of
    that name, leaves it."""
    if not model.words:
        return
    taught = {piece for words in model.words.values() for word in words for piece in _pieces(word)}
    unknown = [piece for piece in _pieces(text) if piece not in taught]
    if unknown:
        raise RequestError(
            f"{name}: the model {model.name} was never taught "
            f"{', '.join(repr(word) for word in dict.fromkeys(unknown))}; "
            f"it knows {'; '.join(_listed(model, chinese=_is_chinese(text)))}"
        )


def _listed(model: Model, *, chinese: bool) -> Iterator[str]:
    """The words of the text's own language by kind, without "other", the small words that join
    the rest: naming them all would hide the answer."""
    for kind, words in model.words.items():
        own = [word for word in words if _is_chinese(word) is chinese]
        if kind != "other" and own:
            yield f"{kind}: {', '.join(own)}"


def _is_chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def _pieces(text: str) -> list[str]:
    return _PIECE.findall(text.lower())
