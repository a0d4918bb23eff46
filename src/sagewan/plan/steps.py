"""The steps of a run: how many, how the noise falls, and what guides each."""

from dataclasses import dataclass
from functools import cached_property

from sagewan.errors import RequestError
from sagewan.plan.lora import Schedule
from sagewan.plan.models import Model
from sagewan.plan.modes import Preset
from sagewan.plan.noise import expert_at, step_times
from sagewan.plan.request import Request


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How the noise is removed. ``boundary`` is the noise level where the second expert starts."""

    count: int
    scheduler: str
    shift: float
    cfg: float
    cfg_2: float | None
    boundary: float | None

    def guidance(self, expert: int) -> float:
        """That of the first transformer, 0, or of the second, 1."""
        return self.cfg if expert == 0 or self.cfg_2 is None else self.cfg_2

    @cached_property
    def experts(self) -> tuple[int, ...]:
        """Which transformer has each step."""
        times = step_times(self.scheduler, shift=self.shift, steps=self.count)
        return tuple(expert_at(time, self.boundary) for time in times)

    @property
    def passes(self) -> tuple[int, ...]:
        """Forward passes of each step: two where guidance compares with and without the prompt."""
        return tuple(2 if self.guidance(expert) > 1 else 1 for expert in self.experts)


def plan_steps(
    request: Request, model: Model, preset: Preset | None, taught: Schedule | None
) -> Steps:
    """Those of the request, else of a distilled LoRA, the preset or the model. RequestError."""
    usual = model.sampling
    if model.experts == 1 and (request.cfg_2 is not None or request.boundary is not None):
        raise RequestError(
            f"cfg_2 and boundary are for models with two experts, and {model.name} has one"
        )
    count = preset.steps if preset and not model.is_demo else usual.steps
    if taught:
        count = taught.steps
    count = request.steps or count
    _check_ends(request, count)
    cfg, cfg_2 = _guidance(request, model, taught)
    shift, scheduler = (
        (taught.shift, taught.scheduler) if taught else (usual.shift, usual.scheduler)
    )
    return Steps(
        count=count,
        scheduler=request.scheduler or scheduler,
        shift=shift if request.shift is None else request.shift,
        cfg=cfg,
        cfg_2=cfg_2,
        boundary=model.boundary if request.boundary is None else request.boundary,
    )


def _guidance(
    request: Request, model: Model, taught: Schedule | None
) -> tuple[float, float | None]:
    """The guidance of the first expert, and of the second if there is one."""
    usual, usual_2 = model.sampling.cfg, model.sampling.cfg_2
    if taught:
        usual = usual_2 = taught.cfg
    cfg = usual if request.cfg is None else request.cfg
    if model.experts == 1:
        return cfg, None
    # As diffusers: the second expert follows the first's guidance if only that is chosen.
    default = usual_2 if request.cfg is None else request.cfg
    return cfg, default if request.cfg_2 is None else request.cfg_2


def _check_ends(request: Request, steps: int) -> None:
    ends = request.attention_ends
    if ends and ends.first + ends.last >= steps:
        raise RequestError(
            f"attention_ends={ends}: of the run's steps, {steps} in all, none is left for "
            f"{request.attention}; name fewer, or choose attention {ends.mode}"
        )
