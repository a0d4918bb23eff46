"""The schedulers by name: diffusers' own objects, in flow-matching form.

A flow's noise level σ goes from 1 to 0; a shift s moves a grid of levels towards the noisy end,
σ → s·σ / (1 + (s − 1)·σ). ``unipc`` and ``dpm++2m`` and ``flow-euler`` use the grids that diffusers
gives those schedulers. ``flow-euler``'s is shifted twice there: its end, the least σ of the shifted
training table, is shifted again with the rest. ``euler`` and ``lcm`` use the grid of the original
Wan programs (Wan-Video/Wan2.1, wan/utils/fm_solvers.py, get_sampling_sigmas): n even steps from 1
towards 0, shifted once; at 4 steps the 1000, 750, 500, 250 that distilled models were taught.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sagewan.plan.noise import TRAIN_STEPS, original_grid


@dataclass
class Sampler:
    """A scheduler under way: its state, and the generator of the noise that ``lcm`` adds."""

    scheduler: Any
    generator: torch.Generator
    adds_noise: bool

    @property
    def times(self) -> Tensor:
        """The time of each step, from 1000 towards 0; integers where diffusers rounds them."""
        times: Tensor = self.scheduler.timesteps
        return times

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        """Float32 latents one step less noisy; each call takes the next of the times."""
        more = {"generator": self.generator} if self.adds_noise else {}
        out: Tensor = self.scheduler.step(prediction, time, latents, return_dict=False, **more)[0]
        return out

    def copy(self) -> "Sampler":
        """The same state, unharmed by later steps of this one."""
        generator = self.generator.clone_state()
        return Sampler(copy.deepcopy(self.scheduler), generator, self.adds_noise)


def make_sampler(
    name: str, *, shift: float, steps: int, generator: torch.Generator, device: str
) -> Sampler:
    """The scheduler called ``name``, set to ``steps`` steps; noise comes from ``generator``."""
    scheduler = _MAKERS[name](shift)
    if name in _ORIGINAL_GRID:
        scheduler.set_timesteps(sigmas=original_grid(steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
    # Steps are taken in order from the first: two steps may share one rounded time.
    scheduler.set_begin_index(0)
    return Sampler(scheduler, generator, adds_noise=name == "lcm")


def _unipc(shift: float) -> Any:
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        num_train_timesteps=TRAIN_STEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )


def _dpm(shift: float) -> Any:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_STEPS,
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )


def _euler(shift: float) -> Any:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS, shift=shift)


def _lcm(shift: float) -> Any:
    from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler

    return FlowMatchLCMScheduler(num_train_timesteps=TRAIN_STEPS, shift=shift)


_MAKERS: Mapping[str, Callable[[float], Any]] = {
    "unipc": _unipc,
    "euler": _euler,
    "dpm++2m": _dpm,
    "lcm": _lcm,
    "flow-euler": _euler,
}
_ORIGINAL_GRID = ("euler", "lcm")
