"""Our runs against diffusers' own pipelines: the same folder, prompt, pictures and seed.

Each published architecture is run shrunken, for each of its tasks. The last tests plant a
difference in the same comparison, to show that it sees one.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sagewan.attention.launch import Launcher
from sagewan.pipeline.build import build
from sagewan.pipeline.decode import decode
from sagewan.pipeline.guard import FrameGuard
from sagewan.plan.plan import Plan
from sagewan.plan.request import SCHEDULERS
from tests.pipeline.runs import difference, latents_of, picture, plan_for
from tests.shrunken import load_pipeline

LIMIT = 1e-4
# A hundred times the limit, and still less than any of the planted differences makes.
SEEN = 1e-2

Folder = Callable[[str], Path]

CASES = [
    ("wan2.1-t2v-1.3b", 0),
    ("wan2.1-t2v-14b", 0),
    ("wan2.1-i2v-14b", 1),
    ("wan2.1-flf2v-14b", 2),
    ("wan2.2-t2v-a14b", 0),
    ("wan2.2-i2v-a14b", 1),
    ("wan2.2-i2v-a14b", 2),
    ("wan2.2-ti2v-5b", 0),
    ("wan2.2-ti2v-5b", 1),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return {name: picture(folder / f"{name}.png", len(name)) for name in ("image", "last_image")}


def pipeline_of(plan: Plan, scheduler: Any = None) -> Any:
    """diffusers' pipeline for the plan's task, with its own scheduler or the one given."""
    pipeline = load_pipeline(plan.model.location, with_picture=plan.request.image is not None)
    pipeline.scheduler = scheduler or type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, flow_shift=plan.steps.shift
    )
    return pipeline


def arguments_of(plan: Plan) -> dict[str, Any]:
    """What diffusers' pipeline is called with for this plan."""
    request, steps = plan.request, plan.steps
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative,
        "width": plan.grid_size[0],
        "height": plan.grid_size[1],
        "num_frames": plan.frames,
        "num_inference_steps": steps.count,
        "guidance_scale": steps.cfg,
        "generator": torch.Generator().manual_seed(plan.seed),
    }
    if steps.cfg_2 is not None:
        arguments["guidance_scale_2"] = steps.cfg_2
    for name, path in (("image", request.image), ("last_image", request.last_image)):
        if path:
            arguments[name] = Image.open(path).convert("RGB")
    return arguments


def reference(plan: Plan, scheduler: Any = None) -> torch.Tensor:
    """diffusers' latents."""
    pipeline = pipeline_of(plan, scheduler)
    latents: torch.Tensor = pipeline(**arguments_of(plan), output_type="latent").frames
    return latents


def with_pictures(count: int, pictures: dict[str, Path]) -> dict[str, Path]:
    return dict(list(pictures.items())[:count])


@pytest.mark.parametrize(("name", "count"), CASES)
def test_each_architecture_and_task(
    name: str, count: int, shrunken_folder: Folder, pictures: dict[str, Path]
) -> None:
    experts = {"cfg_2": 2.5} if "a14b" in name else {}
    plan = plan_for(shrunken_folder(name), **experts, **with_pictures(count, pictures))
    latents = latents_of(plan)
    expected = reference(plan)
    assert latents.shape == expected.shape
    assert difference(latents, expected) <= LIMIT


@pytest.mark.parametrize(("name", "count"), [CASES[0], CASES[-1]], ids=["2.1 VAE", "2.2 VAE"])
def test_frames(name: str, count: int, shrunken_folder: Folder, pictures: dict[str, Path]) -> None:
    plan = plan_for(shrunken_folder(name), frames=13, **with_pictures(count, pictures))
    ours = np.stack(list(decode(build(plan, Launcher()), plan, latents_of(plan), FrameGuard())))
    theirs = pipeline_of(plan)(**arguments_of(plan), output_type="np").frames[0]
    steps = np.abs(ours.astype(int) - np.round(theirs * 255))
    # TI2V's two times are embedded once, not for each token: float32's last bit may differ.
    assert steps.max() <= (1 if plan.model.expand_timesteps else 0)
    assert steps.mean() < 1e-3
    assert ours.std() > 10


class SeededLCM:
    """diffusers' LCM scheduler, whose noise its pipeline leaves to the global generator."""

    def __init__(self, scheduler: Any, seed: int, drawn: torch.Size) -> None:
        self._scheduler = scheduler
        self._generator = torch.Generator().manual_seed(seed)
        torch.randn(drawn, generator=self._generator)

    def step(self, *arguments: Any, **more: Any) -> Any:
        return self._scheduler.step(*arguments, generator=self._generator, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)


class OnOriginalGrid:
    """A diffusers scheduler set to the noise levels that the original Wan programs step on."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        self._scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1], device=device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)


def scheduler_of_diffusers(name: str, plan: Plan, drawn: torch.Size) -> Any:
    import diffusers

    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    shift = plan.steps.shift
    if name == "unipc":
        return diffusers.UniPCMultistepScheduler(**flow, flow_shift=shift)
    if name == "dpm++2m":
        return diffusers.DPMSolverMultistepScheduler(**flow, flow_shift=shift)
    if name == "lcm":
        scheduler = diffusers.FlowMatchLCMScheduler(shift=shift)
        return OnOriginalGrid(SeededLCM(scheduler, plan.seed, drawn))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return OnOriginalGrid(scheduler) if name == "euler" else scheduler


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_scheduler(scheduler: str, shrunken_folder: Folder) -> None:
    folder = shrunken_folder("wan2.2-t2v-a14b")
    plan = plan_for(folder, scheduler=scheduler, shift=6.0, steps=4, cfg_2=2.0)
    latents = latents_of(plan)
    expected = reference(plan, scheduler_of_diffusers(scheduler, plan, latents.shape))
    assert difference(latents, expected) <= LIMIT


def test_schedulers_differ_from_each_other(shrunken_folder: Folder) -> None:
    folder = shrunken_folder("wan2.1-t2v-1.3b")
    found = [latents_of(plan_for(folder, scheduler=name, steps=4)) for name in SCHEDULERS]
    for index, one in enumerate(found):
        assert all(difference(one, other) > SEEN for other in found[:index])


def with_steps(**changes: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, steps=replace(plan.steps, **changes))


def with_request(**changes: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, request=replace(plan.request, **changes))


def exchanged(plan: Plan) -> Plan:
    request = plan.request
    return with_request(image=request.last_image, last_image=request.image)(plan)


PLANTED: dict[str, tuple[str, int, Callable[[Plan], Plan]]] = {
    "boundary": ("wan2.2-t2v-a14b", 0, with_steps(boundary=0.5)),
    "guidance of the second expert": ("wan2.2-t2v-a14b", 0, with_steps(cfg_2=4.0)),
    "guidance": ("wan2.1-t2v-1.3b", 0, with_steps(cfg=3.0)),
    "shift": ("wan2.1-t2v-1.3b", 0, with_steps(shift=4.0)),
    "seed": ("wan2.1-t2v-1.3b", 0, lambda plan: replace(plan, seed=8)),
    "prompt": ("wan2.1-t2v-1.3b", 0, with_request(prompt="grass walks on the cat")),
    "negative prompt": ("wan2.1-t2v-1.3b", 0, lambda plan: replace(plan, negative="grass")),
    "pictures exchanged": ("wan2.1-flf2v-14b", 2, exchanged),
    "pictures exchanged, without CLIP": ("wan2.2-i2v-a14b", 2, exchanged),
    "last picture left out": ("wan2.2-i2v-a14b", 2, with_request(last_image=None)),
    "picture left out": ("wan2.2-ti2v-5b", 1, with_request(image=None)),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_difference_is_seen(
    planted: str, shrunken_folder: Folder, pictures: dict[str, Path]
) -> None:
    name, count, change = PLANTED[planted]
    experts = {"cfg_2": 2.5} if "a14b" in name else {}
    plan = plan_for(shrunken_folder(name), **experts, **with_pictures(count, pictures))
    assert difference(latents_of(change(plan)), latents_of(plan)) > SEEN


@pytest.mark.parametrize("part", ["rotate", "_attend"])
def test_a_planted_change_of_the_attention_is_seen(
    part: str, shrunken_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(shrunken_folder("wan2.1-t2v-1.3b"))
    exact = latents_of(plan)
    unturned = {"rotate": lambda x, *_, out: out.copy_(x), "_attend": lambda q, *_: q.flatten(2)}
    monkeypatch.setattr(f"sagewan.model.block.{part}", unturned[part])
    assert difference(latents_of(plan), exact) > SEEN


@pytest.mark.parametrize("name", ["wan2.1-i2v-14b", "wan2.2-ti2v-5b"])
def test_a_seed_is_the_same_video_bit_for_bit(
    name: str, shrunken_folder: Folder, pictures: dict[str, Path]
) -> None:
    plan = plan_for(shrunken_folder(name), scheduler="lcm", **with_pictures(1, pictures))
    assert torch.equal(latents_of(plan), latents_of(plan))
