"""What the demo model can be told: phrases for every attribute, in English and Chinese.

`describe` writes one random caption of a clip. Of two objects the first named stands on the left,
unless the caption says the sides. `vocabulary` lists the words by attribute, for the product to
name when it refuses one. The plain captions that scoring uses are in `sagewan.evaluate.prompts`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from sagewan.evaluate import world
from sagewan.evaluate.prompts import Labels, article

ENGLISH: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "ball": ("ball", "ball", "sphere"),
        "square": ("square", "square", "box"),
        "triangle": ("triangle",),
        "star": ("star",),
        "heart": ("heart",),
        "ring": ("ring", "ring", "hoop"),
    },
    "colour": {name: (name,) for name in world.COLOURS}
    | {"purple": ("purple", "purple", "violet")},
    "size": {"small": ("small", "small", "little", "tiny"), "large": ("large", "big", "huge")},
    "background": {name: (name,) for name in world.BACKGROUNDS} | {"grey": ("grey", "gray")},
}
# Each motion: phrases in the three forms "a ball moves right / moving right / is moving right".
ENGLISH_MOTION: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "right": (("move", "roll", "slide", "drift", "glide", "go"), ("to the right", "right")),
    "left": (("move", "roll", "slide", "drift", "glide", "go"), ("to the left", "left")),
    "up": (("move", "slide", "drift", "glide", "go", "float", "rise"), ("up", "upwards", "up")),
    "down": (("move", "slide", "drift", "glide", "go", "fall", "sink"), ("down", "downwards")),
    "grow": (("grow", "get", "become"), ("bigger", "larger")),
    "shrink": (("shrink", "get", "become"), ("smaller",)),
    "still": (("stay", "stand", "sit", "rest"), ("still",)),
    "orbit": (("move", "go", "drift", "glide", "circle"), ("in a circle", "in circles", "around")),
    "bounce": (("bounce", "hop", "jump"), ("",)),
}
# Verbs that need no second part.
BARE = {"grow", "shrink", "rise", "fall", "sink", "rest", "circle", "bounce", "hop", "jump"}
ALONE = ("up", "down", "orbit", "bounce")  # motions whose bare verbs take none
DROPS_E = {"move", "slide", "glide", "rise", "become", "circle", "bounce"}
DOUBLED = {"get", "sit", "hop"}

CHINESE: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "ball": ("球", "球", "圆球"),
        "square": ("方块", "正方形"),
        "triangle": ("三角形", "三角"),
        "star": ("星星", "五角星", "星形"),
        "heart": ("心", "爱心", "心形"),
        "ring": ("圆环", "环"),
    },
    "colour": {
        "red": ("红色", "红"),
        "orange": ("橙色", "橘色"),
        "yellow": ("黄色", "黄"),
        "green": ("绿色", "绿"),
        "blue": ("蓝色", "蓝"),
        "purple": ("紫色",),
        "pink": ("粉色", "粉红色"),
        "white": ("白色", "白"),
    },
    "size": {"small": ("小", "小小的"), "large": ("大", "大大的")},
    "background": {
        "grey": ("灰色",),
        "black": ("黑色",),
        "brown": ("棕色", "褐色"),
        "teal": ("青色",),
        "beige": ("米色",),
        "navy": ("藏青色", "深蓝色"),
    },
    "motion": {
        "right": ("向右滚动", "向右移动", "往右移动", "向右滑动", "向右飘", "从左向右移动"),
        "left": ("向左滚动", "向左移动", "往左移动", "向左滑动", "向左飘", "从右向左移动"),
        "up": ("向上移动", "往上移动", "向上飘", "上升", "升起来"),
        "down": ("向下移动", "往下移动", "下落", "落下来", "下降"),
        "grow": ("变大", "慢慢变大", "越来越大"),
        "shrink": ("变小", "慢慢变小", "越来越小"),
        "still": ("不动", "静止不动", "停着不动", "保持静止"),
        "orbit": ("转圈", "绕圈", "绕圈移动"),
        "bounce": ("弹跳", "跳动", "蹦跳"),
    },
}


def _inflect(verb: str, form: str) -> str:
    """form: "s" (moves), "ing" (moving) or "is" (is moving)."""
    if form == "s":
        return {"go": "goes"}.get(verb, verb + "s")
    stem = verb[:-1] if verb in DROPS_E else verb + verb[-1] if verb in DOUBLED else verb
    ing = stem + "ing"
    return ing if form == "ing" else "is " + ing


def _english_motion(motion: str, form: str, rng: random.Random) -> str:
    verbs, ends = ENGLISH_MOTION[motion]
    verb = rng.choice(verbs)
    if motion == "still" and form == "s" and rng.random() < 0.3:
        return "does not move"
    if verb in BARE and (motion in ALONE or rng.random() < 0.8):
        return _inflect(verb, form)
    if motion in ("right", "left") and rng.random() < 0.15:
        sides = ("left", "right") if motion == "right" else ("right", "left")
        return f"{_inflect(verb, form)} from {sides[0]} to {sides[1]}"
    return f"{_inflect(verb, form)} {rng.choice(ends)}".strip()


def _english_object(labels: Labels, form: str, rng: random.Random) -> str:
    word = [rng.choice(ENGLISH[n][labels[n]]) for n in ("size", "colour", "shape") if n in labels]
    thing = " ".join(word)
    thing = ("the " + thing) if rng.random() < 0.12 else article(thing)
    return f"{thing} {_english_motion(labels['motion'], form, rng)}"


def _sides(count: int, rng: random.Random, words: tuple[str, str]) -> list[tuple[int, str]]:
    """The order in which objects are named, and what is said of each one's side."""
    if count == 1 or rng.random() < 0.6:
        return [(number, "") for number in range(count)]
    order = [(number, words[number]) for number in range(count)]
    return order if rng.random() < 0.5 else order[::-1]


def english(objects: Sequence[Labels], background: str | None, rng: random.Random) -> str:
    """One random English caption; what is missing from the labels is not mentioned."""
    form = rng.choices(("s", "ing", "is"), (6, 2, 2))[0]
    before = rng.random() < 0.5
    parts = []
    for number, side in _sides(len(objects), rng, ("on the left", "on the right")):
        text = _english_object(objects[number], form, rng)
        parts.append(f"{side} {text}" if before else f"{text} {side}")
    text = rng.choice((" and ", " and ", " while ", ", ")).join(part.strip() for part in parts)
    if form != "s" and rng.random() < 0.3:
        text = "a video of " + text
    if background:
        where = article(rng.choice(ENGLISH["background"][background])) + " background"
        preposition = rng.choice(("on", "on", "over", "against", "in front of"))
        text = (
            f"{preposition} {where}, {text}"
            if rng.random() < 0.25
            else f"{text} {preposition} {where}"
        )
    return text


def _chinese_object(labels: Labels, rng: random.Random) -> str:
    word = {name: rng.choice(CHINESE[name][labels[name]]) for name in labels}
    colour = word["colour"] + ("的" if word["colour"].endswith("色") else "")
    size = word.get("size", "")
    kind = f"{size}{colour}" if rng.random() < 0.5 else f"{colour}{size}"
    counter = rng.choice(("一个", "一个", "一颗", ""))
    adverb = rng.choice(("在", "正在")) if rng.random() < 0.15 else ""
    return f"{counter}{kind}{word['shape']}{adverb}{word['motion']}"


def chinese(objects: Sequence[Labels], background: str | None, rng: random.Random) -> str:
    """One random Chinese caption; what is missing from the labels is not mentioned."""
    sides = _sides(len(objects), rng, ("左边", "右边"))
    text = "，".join(side + _chinese_object(objects[number], rng) for number, side in sides)
    if background:
        where = rng.choice(CHINESE["background"][background]) + rng.choice(("", "的")) + "背景"
        front = rng.choice(("{}上，{}", "在{}上，{}", "{}，{}", "在{}前，{}"))
        text = front.format(where, text) if rng.random() < 0.7 else f"{text}，{where}"
    return text


def choose(
    objects: Sequence[Labels], background: str, rng: random.Random
) -> tuple[list[Labels], str | None]:
    """What a caption will mention: size and background are left out about half the time, and the
    size of two objects always, since they have but one."""
    sized = len(objects) == 1 and rng.random() < 0.5
    said = [{n: v for n, v in labels.items() if sized or n != "size"} for labels in objects]
    return said, background if rng.random() < 0.5 else None


def speak(said: Sequence[Labels], background: str | None, rng: random.Random) -> str:
    """A random caption that mentions just this; two in five are Chinese."""
    return (chinese if rng.random() < 0.4 else english)(said, background, rng)


def describe(objects: Sequence[Labels], background: str, rng: random.Random) -> str:
    """A random caption of a clip."""
    return speak(*choose(objects, background, rng), rng)


def vocabulary() -> dict[str, dict[str, list[str]]]:
    """{"en" | "zh": {attribute: words and phrases}}, plus the small words of each language."""
    rng = random.Random(0)
    english_words = {n: sorted({w for ws in t.values() for w in ws}) for n, t in ENGLISH.items()}
    chinese_words = {n: sorted({w for ws in t.values() for w in ws}) for n, t in CHINESE.items()}
    phrases = {
        _english_motion(motion, form, rng)
        for motion in world.MOTIONS
        for form in ("s", "ing", "is")
        for _ in range(300)
    }
    motion_words = {w for phrase in phrases for w in phrase.split()}
    small = {"is", "a", "the", "to", "from", "in", "and", "not", "does"}
    english_words["motion"] = sorted(motion_words - small)
    english_words["other"] = sorted(
        small | {"an", "on", "over", "against", "front", "of", "video", "background", "while"}
    )
    chinese_words["other"] = [
        "一个", "一颗", "的", "在", "正在", "上", "前", "背景", "左边", "右边",
    ]  # fmt: skip
    return {"en": english_words, "zh": chinese_words}


def words(text: str) -> list[str]:
    """The tokens of a caption: lower-case words, single Chinese characters; no punctuation."""
    return re.findall(r"[\u4e00-\u9fff]|[a-z]+", text.lower())
