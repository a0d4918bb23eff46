"""Plain prompts of the demo model's world, in English and Chinese, and what each promises."""

from collections.abc import Mapping, Sequence

Labels = dict[str, str]  # attribute → its name in `world`; one that is left out is not mentioned

LANGUAGES = ("en", "zh")
_CHINESE = {
    "ball": "球",
    "square": "方块",
    "triangle": "三角形",
    "star": "星星",
    "heart": "心",
    "ring": "圆环",
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "white": "白色",
    "small": "小",
    "large": "大",
    "grey": "灰色",
    "black": "黑色",
    "brown": "棕色",
    "teal": "青色",
    "beige": "米色",
    "navy": "藏青色",
}
_MOTIONS: Mapping[str, tuple[str, str]] = {
    "right": ("rolls to the right", "向右滚动"),
    "left": ("rolls to the left", "向左滚动"),
    "up": ("moves up", "向上移动"),
    "down": ("moves down", "向下移动"),
    "grow": ("grows", "变大"),
    "shrink": ("shrinks", "变小"),
    "still": ("stays still", "静止不动"),
    "orbit": ("moves in a circle", "转圈"),
    "bounce": ("bounces", "弹跳"),
}


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def plain(objects: Sequence[Labels], background: str | None, language: str) -> str:
    """The plain prompt in "en" or "zh" that names exactly what is given, from left to right."""
    if language == "en":
        text = " and ".join(
            article(" ".join(labels[n] for n in ("size", "colour", "shape") if n in labels))
            + f" {_MOTIONS[labels['motion']][0]}"
            for labels in objects
        )
        return f"{text} on {article(background)} background" if background else text
    text = "，".join(
        f"一个{_CHINESE[labels['colour']]}的{_CHINESE.get(labels.get('size', ''), '')}"
        f"{_CHINESE[labels['shape']]}{_MOTIONS[labels['motion']][1]}"
        for labels in objects
    )
    return f"{_CHINESE[background]}背景上，{text}" if background else text
