"""Numbers of things, in words."""


def counted(number: int, thing: str) -> str:
    """``1 frame``, ``17 frames``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
