"""What swapping costs, what a forward pass allocates, and twenty videos in one process."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.pipelines import T2V, with_layers
from benchmarks.random_models import random_transformer
from benchmarks.watching import DEVICE, clear, host_bytes, of_process, used_bytes
from sagewan.attention.launch import Launcher
from sagewan.memory.placement import Place, Placement
from sagewan.model.attention import Attention, Turn
from sagewan.model.blocks import Blocks
from sagewan.model.linear import Multiplier
from sagewan.pipeline.probe import probe
from sagewan.pipeline.session import Session
from sagewan.plan.budget.transformer import Chunks
from sagewan.plan.catalogue import row_named
from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import GIB
from sagewan.plan.models import PUBLISHED, Model
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.request import Request

SHAPES = {"480p": (832, 480), "720p": (1280, 720)}


def _inputs(model: Model, size: tuple[int, int], frames: int) -> dict[str, torch.Tensor]:
    shape = (
        1,
        model.in_channels,
        (frames - 1) // 4 + 1,
        size[1] // model.spatial,
        size[0] // model.spatial,
    )
    generator = torch.Generator(DEVICE).manual_seed(0)
    latents = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    text = torch.randn(1, 512, 4096, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    return {
        "hidden_states": latents,
        "timestep": torch.tensor([500.0], device=DEVICE),
        "encoder_hidden_states": text,
    }


def _full_plan(size: tuple[int, int], quantization: str, attention: str = "sdpa") -> Plan:
    request = Request(
        prompt="x", size=size, frames=81, attention=attention, quantization=quantization, cfg=1.0
    )
    return make_plan(request, PUBLISHED[T2V], probe(), Evidence())


@torch.inference_mode()
def _forward(
    model: Any, plan: Plan, chunks: Chunks, given: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    attention, multiplier = Attention(Launcher()), Multiplier()
    Blocks().install(model, attention, plan.blocks.row)
    multiplier.install(model, plan.weights)
    turn = Turn(plan.attention, 1, lambda: None, chunk=chunks.tokens, heads=chunks.heads)
    with attention.during(turn):
        found: torch.Tensor = model(**given)[0]
    torch.cuda.synchronize()
    return found


def swap_cost(shape: str, layers: int | None = None) -> dict[str, Any]:
    """Seconds of a step with no block swapped and with half of them, fp8_scaled; the same bits. The
    faster the blocks, the less time there is to copy: FP8 attention where sequences are long."""
    attention = "sageattn_3_fp8" if shape == "720p" else "sdpa"
    plan = _full_plan(SHAPES[shape], "fp8_scaled", attention)
    if layers:
        plan = replace(plan, model=with_layers(plan.model, layers))
    given = _inputs(plan.model, SHAPES[shape], 81)
    seconds: dict[int, float] = {}
    results = []
    half = plan.model.layers // 2
    for swapped in (0, half):
        model = random_transformer(plan).eval().requires_grad_(requires_grad=False)
        place = Place(device=DEVICE, swapped=swapped, pin_budget=64 * GIB)
        placement = Placement(model, model.blocks, place)
        began = time.perf_counter()
        results.append(_forward(model, plan, plan.memory.chunks, given))
        # The first of all compiles its kernels.
        times = [time.perf_counter() - began]
        for _ in range(1 if shape == "720p" else 3):
            began = time.perf_counter()
            _forward(model, plan, plan.memory.chunks, given)
            times.append(time.perf_counter() - began)
        seconds[swapped] = min(times)
        pinned = placement.pinned_bytes
        placement.close()
        del placement, model
        clear()
    same = torch.equal(results[0], results[1])
    assert same, "swapped blocks compute something else"
    return {
        "seconds_whole": round(seconds[0], 3),
        "seconds_half_swapped": round(seconds[half], 3),
        "cost": round(seconds[half] / seconds[0] - 1, 4),
        "blocks": plan.model.layers,
        "pinned": round(pinned / GIB, 3),
        "limit": 0.03 if shape == "720p" else 0.10,
    }


def activations(shape: str) -> dict[str, Any]:
    """The most that a forward pass of 4 blocks allocates beyond weights and inputs, GiB."""
    plan = _full_plan(SHAPES[shape], "none")
    plan = replace(plan, model=with_layers(plan.model, 4))
    given = _inputs(plan.model, SHAPES[shape], 81)
    model = random_transformer(plan).eval().requires_grad_(requires_grad=False).to(DEVICE)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        found["diffusers"], expected = _peak_of(lambda: model(**given, return_dict=False)[0])
    chunks = plan.memory.chunks
    found["ours"], ours = _peak_of(lambda: _forward(model, plan, chunks, given))
    found["smallest"], _ = _peak_of(lambda: _forward(model, plan, Chunks(1024, 1), given))
    difference = float((ours - expected).float().norm() / expected.float().norm())
    assert difference < 2e-2, f"not what diffusers computes: {difference}"
    found["difference"] = round(difference, 5)
    found["limit"] = {"480p": 1.5, "720p": 3.3}[shape]
    found["attention"] = row_named("torch.sdpa").name
    return found


def _peak_of(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    clear()
    before = torch.cuda.memory_allocated()
    result = work()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / GIB, 3), result


def twenty() -> dict[str, Any]:
    """Twenty videos of the demo model in one session: memory after the third and after twenty more,
    and what is left when the session is closed, in MiB, on the device and on the host."""
    import psutil

    def now() -> tuple[float, float, float]:
        clear()
        device = (of_process() or [used_bytes()])[0]
        resident = psutil.Process().memory_info().rss
        return device / 2**20, resident / 2**20, host_bytes()["host"] / 2**20

    with tempfile.TemporaryDirectory() as folder, Session() as session:
        request = Request(
            prompt="a red ball rolls to the right",
            steps=2,
            output=Path(folder) / "x.mp4",
            device="cuda",
            attention="sdpa",
            block_swap=4,
        )
        for seed in range(3):
            session.generate(replace(request, seed=seed))
        before = now()
        for seed in range(20):
            session.generate(replace(request, seed=seed))
        after = now()
    closed = now()
    names = ("device", "host", "host without files")
    return {
        name: {
            "before": round(a, 1),
            "after": round(b, 1),
            "growth": round(b / a - 1, 4),
            "closed": round(c, 1),
        }
        for name, a, b, c in zip(names, before, after, closed, strict=True)
    }
