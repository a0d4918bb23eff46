"""Writes docs/cards.md: what the presets need on the cards people have, as the plan says it.

``python -m tools.cards`` writes it; a test holds it to the plan.
"""

from pathlib import Path

from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.models import PUBLISHED
from sagewan.plan.modes import PRESETS
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.pretend import pretend
from sagewan.plan.request import Request
from sagewan.plan.speed import estimated_seconds

PAGE = Path(__file__).parent.parent / "docs" / "cards.md"
GIB = 2**30

# Each with the host memory its machines often have, in GiB.
CARDS = {
    "rtx-3060": 32,
    "rtx-3090": 64,
    "rtx-4060": 16,
    "rtx-4060-ti": 32,
    "rtx-4070": 32,
    "rtx-4080": 32,
    "rtx-4090": 64,
    "rtx-5060": 16,
    "rtx-5060-ti": 32,
    "rtx-5070": 32,
    "rtx-5080": 32,
    "rtx-5090": 64,
}
MODELS = ("wan2.1-t2v-1.3b", "wan2.2-ti2v-5b", "wan2.1-t2v-14b", "wan2.2-t2v-a14b")

# A machine with all that the project installs, whatever runs this tool.
_MACHINE = Hardware(
    cpu=Device(name="CPU"),
    system="Linux",
    torch_cuda="13.0",
    packages={"torch": "2.11.0", "triton": "3.6.0", "comfy-kitchen": "0.2.40"},
    segments_grow=True,
)

_INTRODUCTION = """# What fits which card

*Made by `python -m tools.cards` from the plan; nothing here was measured on these cards.*

Each preset on each card, with the host memory named beside it, as `sagewan plan --model M
--preset P --gpu CARD --ram GIB` says: the most memory on the card and on the host in GiB (file
pages not counted), how many of the transformer's blocks are swapped, and the minutes of denoising
and decoding by the card's listed rates, with the preset's own steps and size. Where "no" stands it
does not fit, and the plan says what would. On Windows decoding takes smaller tiles.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([_INTRODUCTION, *(_section(name) for name in PRESETS)])


def _section(preset: str) -> str:
    chosen = PRESETS[preset]
    width, height = chosen.size
    head = (
        f"## {preset}\n\n{width}x{height}, {chosen.frames} frames, {chosen.steps} steps, "
        f"{chosen.quantization}, {chosen.attention}\n\n"
        "| card | host | " + " | ".join(MODELS) + " |\n|---|---|" + "---|" * len(MODELS)
    )
    return "\n".join([head, *(_line(preset, card) for card in CARDS), ""])


def _line(preset: str, card: str) -> str:
    cells = [_cell(_plan(preset, card, model)) for model in MODELS]
    return f"| {card} | {CARDS[card]} | " + " | ".join(cells) + " |"


def _plan(preset: str, card: str, model: str) -> Plan:
    hardware = pretend(_MACHINE, gpu=card, vram=None, ram=CARDS[card])
    return make_plan(Request(prompt="x", preset=preset), PUBLISHED[model], hardware, Evidence())


def _cell(plan: Plan) -> str:
    memory = plan.memory
    text = f"{memory.device_peak / GIB:.1f} + {memory.host_peak / GIB:.1f}, "
    text += f"{memory.block_swap} of {plan.model.layers}, "
    seconds = estimated_seconds(plan)
    text += f"{max(1, round((seconds or 0) / 60))} min"
    return text if memory.fits else f"{text}: no"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
