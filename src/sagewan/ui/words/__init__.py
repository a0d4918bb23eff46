"""Every word of the app, one table a language; nothing that a visitor reads stands elsewhere."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType

from sagewan.plan.objection import SENTENCES
from sagewan.ui.words.en import EN
from sagewan.ui.words.messages import filled, fits, pattern
from sagewan.ui.words.zh import ZH
from sagewan.ui.words.zh_sentences import ZH_SENTENCES

TABLES: Mapping[str, Mapping[str, str]] = MappingProxyType({"en": EN, "zh": ZH})
LANGUAGES = tuple(TABLES)
# Between what a sentence is about and what it says of it, as in ``job=7: there is none``.
_SUBJECT = ": "
_MINUTE, _HOUR = 60, 3600


def _objections(language: str) -> dict[str, str]:
    """The sentences of objections, as templates: they lie in reports in English."""
    return {
        _NAMED.sub("{}", english): _in_order(SENTENCES[language][code], _NAMED.findall(english))
        for code, english in SENTENCES["en"].items()
    }


def _in_order(text: str, names: list[str]) -> str:
    """``{found} … {needed}`` → ``{1} … {0}``, if the names come in the other order."""
    return _NAMED.sub(lambda match: f"{{{names.index(match[1])}}}", text)


_NAMED = re.compile(r"\{(\w+)\}")
_TRANSLATIONS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"en": {}, "zh": {**_objections("zh"), **ZH_SENTENCES}}
)


class Words:
    """One language. ``words("job.seed", seed=3)`` is a text of its table, with the values in it;
    where a ``count`` is one, that of the key's ``.one``, if there is such."""

    def __init__(self, language: str) -> None:
        self.language = language
        self._table = TABLES[language]

    def __call__(self, key: str, **values: object) -> str:
        one = f"{key}.one"
        if values.get("count") == 1 and one in self._table:
            key = one
        return self._table[key].format(**values)

    def sentence(self, text: str) -> str:
        """An error, a note or a reason, which is written in English where it arises."""
        return _translated(self.language, text)

    def format(self, text: str) -> str:
        """A number format such as ``int8 per block``."""
        return self.sentence(text)

    def stage(self, name: str) -> str:
        """A stage of a run."""
        known = f"stage.{name}"
        if known in self._table:
            return self._table[known]
        return self("stage.self-test", name=name.removeprefix("self-test of "))

    def seconds(self, seconds: float) -> str:
        """``9.8 s``, ``2 min 05 s``, ``1 h 02 min``."""
        if seconds < _MINUTE:
            return self("time.seconds", seconds=f"{seconds:.1f}")
        minutes, rest = divmod(round(seconds), _MINUTE)
        if seconds < _HOUR:
            return self("time.minutes", minutes=minutes, seconds=f"{rest:02d}")
        hours, minutes = divmod(minutes, _MINUTE)
        return self("time.hours", hours=hours, minutes=f"{minutes:02d}")

    def joined(self, texts: Iterable[str]) -> str:
        return self("list.joint").join(texts)


@cache
def _translated(language: str, text: str) -> str:
    """By the template that the text was made from; its values are translated as well. Of several
    that fit, the one with the most words of its own; as it is, if none does."""
    table = _TRANSLATIONS[language]
    if text in table or not table:
        return table.get(text, text)
    fitting = [template for template in table if fits(template, text)]
    if not fitting and "; " in text:
        parts = [_translated(language, part) for part in text.split("; ")]
        return TABLES[language]["list.joint"].join(parts)
    if not fitting and _SUBJECT not in text:
        return text
    best = max(fitting, key=len, default=_SUBJECT.join(("{}", "{}")))
    found = pattern(best).fullmatch(text)
    assert found
    values = tuple(_translated(language, value) for value in found.groups())
    return filled(table.get(best, TABLES[language]["list.subject"]), values)


def language_of(accept: str) -> str:
    """The language for a browser's ``Accept-Language``: the first it names that there is."""
    wanted = sorted(
        (part.strip() for part in accept.split(",") if part.strip()), key=_weight, reverse=True
    )
    codes = (part.partition(";")[0].strip().lower().partition("-")[0] for part in wanted)
    return next((code for code in codes if code in TABLES), LANGUAGES[0])


def _weight(part: str) -> float:
    try:
        return float(part.partition("q=")[2] or 1)
    except ValueError:
        return 0.0
