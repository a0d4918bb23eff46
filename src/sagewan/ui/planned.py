"""The plan of what stands in the widgets, and what every mode would do here, for the templates."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sagewan.errors import SagewanError
from sagewan.pipeline.draft import draft_plan
from sagewan.plan.attention import Fallback
from sagewan.plan.hardware import GIB, Device, Hardware
from sagewan.plan.memory import MemoryPlan
from sagewan.plan.modes import AUTO, MODES, fitting_preset
from sagewan.plan.plan import Plan
from sagewan.plan.request import QUANTIZATIONS, Request
from sagewan.plan.serialize import plan_to_json
from sagewan.plan.speed import estimated_seconds
from sagewan.ui.views import fallback_notes
from sagewan.ui.words import Words

# Parts of the memory below this share of it are too small for the bar.
_SHOWN = 0.005


@dataclass(frozen=True, kw_only=True)
class ModeHere:
    """A mode, and what asking for it gets on this machine: itself, or another, and why."""

    name: str
    use: str
    formats: str
    runs: str | None
    why: str | None
    emulated: bool = False

    @property
    def itself(self) -> bool:
        return self.runs == self.name


@dataclass(frozen=True, kw_only=True)
class PlanView:
    """A plan in words. ``parts`` of the memory are (name, GiB, share of the card)."""

    mode: str
    brief: tuple[str, ...]
    lines: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    fallbacks: tuple[str, ...]
    parts: tuple[tuple[str, float, float], ...]
    memory: str
    fits: bool

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes, if it can't run as it is."""
        return () if self.fits else self.notes


def modes_here(request: Request, hardware: Hardware, words: Words) -> list[ModeHere]:
    """Every mode with what this machine would do if it were asked for it."""
    plain = replace(
        request, attention=None, attention_ends=None, attention_keep_layers=(), strict=False
    )
    return [_mode_here(replace(plain, attention=name), hardware, words) for name in MODES]


def _mode_here(request: Request, hardware: Hardware, words: Words) -> ModeHere:
    name = str(request.attention)
    runs = why = None
    emulated = False
    try:
        attention = draft_plan(request, hardware).attention
    except SagewanError as error:
        why = words.sentence(str(error))
    else:
        runs, emulated = attention.main.mode, attention.main.row.emulated
        why = words.joined(_reasons(attention.fallbacks, words)) or None
    mode = MODES[name]
    formats = f"Q·Kᵀ {words.format(mode.qk)}, P·V {words.format(mode.pv)}"
    use = words(f"mode.{name}")
    return ModeHere(name=name, use=use, formats=formats, runs=runs, why=why, emulated=emulated)


def planned_steps(plan: Plan) -> list[dict[str, str]]:
    """The fallbacks that a plan decided, as its JSON has them."""
    return list(plan_to_json(plan)["attention"]["fallbacks"])


def _reasons(fallbacks: Iterable[Fallback], words: Words) -> dict[str, None]:
    """Why each implementation on the way did not serve; what several say, once."""
    refusals = (refusal for step in fallbacks for _, refusal in step.objections)
    return dict.fromkeys(words.sentence(refusal.sentence()) for refusal in refusals)


def quantizations_here(request: Request, hardware: Hardware, words: Words) -> list[ModeHere]:
    """Every quantization with what this machine would make of the chosen model's weights."""
    plain = replace(request, attention=None, attention_ends=None, attention_keep_layers=())
    kinds = (kind for kind in QUANTIZATIONS if kind != AUTO)
    return [
        _quantization_here(replace(plain, quantization=kind), hardware, words) for kind in kinds
    ]


def _quantization_here(request: Request, hardware: Hardware, words: Words) -> ModeHere:
    name, formats, runs = str(request.quantization), "", None
    try:
        plan = draft_plan(replace(request, strict=False), hardware)
    except SagewanError as error:
        why: str | None = words.sentence(str(error))
    else:
        weights, main = plan.weights, plan.weights.main
        gib = f"{weights.bytes / GIB:.2f} GiB"
        formats = f"{gib} · {main.name} ({words.format(main.compute)})" if main else gib
        unpacked = main is not None and not main.low
        runs = words("quantization.unpacked") if unpacked else name
        reasons = dict.fromkeys(
            words.sentence(refusal.sentence()) for _, refusal in weights.refused
        )
        why = words.joined(reasons) if unpacked and reasons else None
    use = words(f"quantization.{name}")
    return ModeHere(name=name, use=use, formats=formats, runs=runs, why=why)


def plan_view(plan: Plan, words: Words) -> PlanView:
    """What would run, and what it needs."""
    parts, sentence = _memory(plan.memory, plan.device, words)
    return PlanView(
        mode=plan.attention.main.mode,
        brief=(
            plan.model.name,
            f"{plan.size[0]}×{plan.size[1]}",
            words("job.frames", count=plan.frames),
            words("job.steps", count=plan.steps.count),
        ),
        lines=tuple(_lines(plan, words)),
        notes=tuple(words.sentence(note) for note in plan.notes),
        fallbacks=tuple(fallback_notes(planned_steps(plan), words)),
        parts=parts,
        memory=sentence,
        fits=plan.memory.fits,
    )


def _memory(
    memory: MemoryPlan, device: Device, words: Words
) -> tuple[tuple[tuple[str, float, float], ...], str]:
    """The bar of the stage that takes most of the device (on a CPU, of the host), and its
    sentence."""
    on_device = memory.on_device
    stage = max(memory.stages, key=lambda stage: stage.device if on_device else stage.host)
    room = memory.room if on_device else memory.host_room
    sizes = [(item.name, item.device if on_device else item.host) for item in stage.items]
    parts = tuple(
        (f"{words.sentence(name)} {size / GIB:.2f} GiB", size / GIB, min(size / room, 1.0))
        for name, size in sizes
        if room and size / room >= _SHOWN
    )
    used = stage.device if on_device else stage.host
    sentence = words(
        "plan.memory",
        used=f"{used / GIB:.2f}",
        free=f"{room / GIB:.1f}",
        device=device.name,
        stage=words.stage(stage.name),
        most=words.joined(name for name, *_ in parts),
    )
    return parts, sentence


def _blocks(plan: Plan, words: Words) -> str:
    if plan.blocks.row.fused:
        return words("plan.fused")
    return words("plan.not_fused", why=words.sentence(plan.blocks.why()))


def _lines(plan: Plan, words: Words) -> list[tuple[str, str]]:
    steps, row = plan.steps, plan.attention.main.row
    guidance = f"CFG {steps.cfg:g}" + ("" if steps.cfg_2 is None else f" / {steps.cfg_2:g}")
    emulated = words("job.emulated") if row.emulated else ""
    grid = "" if plan.size == plan.grid_size else f" ({plan.grid_size[0]}×{plan.grid_size[1]})"
    lines = [
        (words("plan.attention"), f"{row.mode}{emulated}"),
        (words("plan.by"), row.name),
        (words("plan.weights_as"), plan.weights.format or plan.dtype),
        (words("plan.video"), f"{plan.size[0]}×{plan.size[1]}{grid}"),
        (words("plan.length"), words("plan.frames_at", count=plan.frames, fps=plan.fps)),
        (words("plan.steps"), f"{steps.count} · {steps.scheduler} · {guidance}"),
        (words("plan.tokens"), f"{plan.tokens:,}"),
        (words("plan.device"), f"{plan.device.name} · {plan.dtype}"),
    ]
    lines.append((words("plan.blocks"), _blocks(plan, words)))
    if plan.memory.on_device:
        swapped = words("plan.swapped", count=plan.memory.block_swap, blocks=plan.model.layers)
        lines.append((words("field.block_swap"), swapped))
    if sparsity := plan.sparsity:
        kept, blocks = sparsity.kept, sparsity.blocks
        told = words("plan.kept", sparsity=sparsity.sparsity, kept=kept, blocks=blocks)
        lines.append((words("field.sparsity"), told))
    if plan.cache:
        reusable, forwards = plan.cache.reusable, plan.cache.forwards
        told = words(
            "plan.reusable", cache=plan.cache.cache.rule, reusable=reusable, forwards=forwards
        )
        lines.append((words("field.cache"), told))
    seconds = estimated_seconds(plan)
    if seconds is not None:
        open_ = plan.cache and plan.cache.reused is None
        about = "plan.at_most" if open_ else "plan.about"
        lines.append((words("plan.time"), words(about, time=words.seconds(seconds))))
    if plan.attention.ends:
        counts = words("plan.ends", first=plan.attention.first, last=plan.attention.last)
        lines.insert(2, (counts, plan.attention.ends.row.mode))
    return lines


def preset_here(hardware: Hardware) -> str | None:
    """The preset for this machine's first card; None without one."""
    return fitting_preset(hardware.usable[0].memory_total) if hardware.usable else None
