"""What the demo model can be told: phrases for every attribute, in English and Chinese.

`describe` writes one random caption of a clip; `canonical` the plain one that scoring uses.
`vocabulary` lists the words by attribute, for the product to name when it refuses one.
"""

from __future__ import annotations

import random
import re

import world

Labels = dict[str, str]  # attribute → its name in `world`; left-out attributes are absent

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
}
BARE = {"grow", "shrink", "rise", "fall", "sink", "rest"}  # need no second part
FORMS = {"move": "moving", "slide": "sliding", "glide": "gliding", "rise": "rising"} | {
    "become": "becoming",
}
DOUBLED = {"get", "sit"}

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
    },
}


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _inflect(verb: str, form: str) -> str:
    """form: "s" (moves), "ing" (moving) or "is" (is moving)."""
    if form == "s":
        return {"go": "goes"}.get(verb, verb + "s")
    ing = FORMS.get(verb) or (verb + verb[-1] if verb in DOUBLED else verb) + "ing"
    return ing if form == "ing" else "is " + ing


def _english_motion(motion: str, form: str, rng: random.Random) -> str:
    verbs, ends = ENGLISH_MOTION[motion]
    verb = rng.choice(verbs)
    if motion == "still" and form == "s" and rng.random() < 0.3:
        return "does not move"
    if verb in BARE and (motion in ("up", "down") or rng.random() < 0.8):
        return _inflect(verb, form)
    if motion in ("right", "left") and rng.random() < 0.15:
        sides = ("left", "right") if motion == "right" else ("right", "left")
        return f"{_inflect(verb, form)} from {sides[0]} to {sides[1]}"
    return f"{_inflect(verb, form)} {rng.choice(ends)}".strip()


def english(labels: Labels, rng: random.Random) -> str:
    """One random English caption; attributes missing from labels are not mentioned."""
    word = {name: rng.choice(ENGLISH[name][labels[name]]) for name in labels if name != "motion"}
    thing = " ".join(word[name] for name in ("size", "colour", "shape") if name in word)
    thing = ("the " + thing) if rng.random() < 0.12 else _article(thing)
    form = rng.choices(("s", "ing", "is"), (6, 2, 2))[0]
    text = f"{thing} {_english_motion(labels['motion'], form, rng)}"
    if rng.random() < 0.08:
        text = "a video of " + text if form != "s" else text
    if "background" in word:
        where = f"{_article(word['background'])} background"
        preposition = rng.choice(("on", "on", "over", "against", "in front of"))
        text = (
            f"{preposition} {where}, {text}"
            if rng.random() < 0.25
            else f"{text} {preposition} {where}"
        )
    return text


def chinese(labels: Labels, rng: random.Random) -> str:
    """One random Chinese caption; attributes missing from labels are not mentioned."""
    word = {name: rng.choice(CHINESE[name][labels[name]]) for name in labels}
    colour = word["colour"] + ("的" if word["colour"].endswith("色") else "")
    size = word.get("size", "")
    counter = rng.choice(("一个", "一个", "一颗", ""))
    thing = f"{counter}{size}{colour}{word['shape']}"
    if rng.random() < 0.5:
        thing = f"{counter}{colour}{size}{word['shape']}"
    adverb = rng.choice(("在", "正在")) if rng.random() < 0.15 else ""
    text = thing + adverb + word["motion"]
    if "background" in word:
        where = word["background"] + rng.choice(("", "的")) + "背景"
        front = rng.choice(("{}上，{}", "在{}上，{}", "{}，{}", "在{}前，{}"))
        text = front.format(where, text) if rng.random() < 0.7 else f"{text}，{where}"
    return text


def describe(labels: Labels, rng: random.Random) -> str:
    """A random caption: Chinese for a third, size and background left out about half the time."""
    said = dict(labels)
    if rng.random() < 0.5:
        del said["size"]
    if rng.random() < 0.5:
        del said["background"]
    return (chinese if rng.random() < 1 / 3 else english)(said, rng)


CANONICAL_MOTION = {
    "right": ("rolls to the right", "向右滚动"),
    "left": ("rolls to the left", "向左滚动"),
    "up": ("moves up", "向上移动"),
    "down": ("moves down", "向下移动"),
    "grow": ("grows", "变大"),
    "shrink": ("shrinks", "变小"),
    "still": ("stays still", "静止不动"),
}


def canonical(labels: Labels, language: str) -> str:
    """The plain caption ("en" or "zh") that names exactly the labels given."""
    speech = ENGLISH if language == "en" else CHINESE
    word = {name: speech[name][labels[name]][0] for name in labels if name != "motion"}
    moves = CANONICAL_MOTION[labels["motion"]][language == "zh"]
    if language == "en":
        thing = " ".join(word[n] for n in ("size", "colour", "shape") if n in word)
        where = f" on {_article(word['background'])} background" if "background" in word else ""
        return f"{_article(thing)} {moves}{where}"
    where = f"{word['background']}背景上，" if "background" in word else ""
    return f"{where}一个{word['colour']}的{word.get('size', '')}{word['shape']}{moves}"


def vocabulary() -> dict[str, dict[str, list[str]]]:
    """{"en" | "zh": {attribute: words and phrases}}, plus the small words of each language."""
    rng = random.Random(0)
    english_words = {n: sorted({w for ws in t.values() for w in ws}) for n, t in ENGLISH.items()}
    chinese_words = {n: sorted({w for ws in t.values() for w in ws}) for n, t in CHINESE.items()}
    phrases = {
        _english_motion(motion, form, rng)
        for motion in world.TAUGHT
        for form in ("s", "ing", "is")
        for _ in range(300)
    }
    motion_words = {w for phrase in phrases for w in phrase.split()}
    small = {"is", "a", "the", "to", "from", "in", "and", "not", "does"}
    english_words["motion"] = sorted(motion_words - small)
    english_words["other"] = sorted(
        small | {"an", "on", "over", "against", "front", "of", "video", "background"}
    )
    chinese_words["other"] = ["一个", "一颗", "的", "在", "正在", "上", "前", "背景"]
    return {"en": english_words, "zh": chinese_words}


def words(text: str) -> list[str]:
    """The tokens of a caption: lower-case words, single Chinese characters; no punctuation."""
    return re.findall(r"[\u4e00-\u9fff]|[a-z]+", text.lower())
