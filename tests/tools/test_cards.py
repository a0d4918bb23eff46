"""The page of cards is what the plan says today."""

from tools.cards import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tools.cards"


def test_every_preset_fits_the_cards_it_is_named_for() -> None:
    """At the least for the models up to 14B; the host's memory is what such machines often have."""
    sections = dict(zip(("low-vram", "balanced", "quality"), page().split("## ")[1:], strict=True))
    named = {
        "low-vram": ("rtx-4060 ", "rtx-5060 ", "rtx-4070 ", "rtx-5070 "),
        "balanced": ("rtx-4070 ", "rtx-5070 ", "rtx-4060-ti", "rtx-5080 "),
        "quality": ("rtx-4080 ", "rtx-5080 ", "rtx-4090 "),
    }
    for preset, cards in named.items():
        for card in cards:
            line = next(line for line in sections[preset].splitlines() if f"| {card}" in line)
            assert ": no" not in line, line
