"""Measures where the inputs of a transformer's layers lie, which its weights are quantised by: some
videos are denoised, and tokens that each layer gets are kept. No video is written."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.calibration import measured_layer, place_of, write_calibration
from sagewan.checkpoint.find import find_model
from sagewan.errors import RequestError
from sagewan.pipeline.build import build
from sagewan.pipeline.calibrate import disk_told, stops_told
from sagewan.pipeline.conditions import encode
from sagewan.pipeline.decide import decide
from sagewan.pipeline.denoise import denoise, start
from sagewan.pipeline.pictures import load_picture
from sagewan.pipeline.probe import probe
from sagewan.pipeline.progress import DECIDE, Watch
from sagewan.pipeline.prompts import read_prompts
from sagewan.pipeline.session import Session
from sagewan.plan.plan import Plan
from sagewan.plan.request import NO_QUANTIZATION, Request

logger = logging.getLogger(__name__)

# Of each layer's inputs about so many are kept, from all steps, passes and prompts alike (3.2 GB of
# a 14B transformer), and so many principal directions of those.
ROWS = 1024
DIRECTIONS = 8


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured: by which plan, of how many layers, the least share of a layer's inputs
    that lies along its directions, and where it is kept."""

    plan: Plan
    layers: int
    least: float
    paths: tuple[Path, ...]


def measure_inputs(request: Request, prompts: Path | None, watch: Watch) -> Measured:
    """Measure the request's model on videos of the prompts in a file, or of its own, with the seeds
    from its seed on, or from 0. Raises as :func:`sagewan.pipeline.calibrate.calibrate`, and
    RequestError for a model whose files are quantised already."""
    watch.stage(DECIDE)
    model = find_model(request.model)
    if model.quantized:
        raise RequestError(
            f"model={request.model}: its files are {model.quantized} already, and are not rounded "
            "again; measure the 16-bit ones"
        )
    texts = [request.prompt] if prompts is None else read_prompts(prompts, model)
    request = replace(_whole(request), prompt=texts[0])
    plan = decide(request, model, probe(), watch=watch).plan
    with stops_told(plan), Session() as session:
        samples = _denoised(plan, texts, session, watch)
    paths, shares = [], []
    watch.stage("directions", sum(map(len, samples.values())))
    for part, layers in samples.items():
        directions = {}
        for name, rows in layers.items():
            directions[name] = principal(torch.cat(rows))
            shares.append(float(directions[name].square().sum()) / directions[name].shape[1])
            watch.step(len(shares))
        if layers:  # an expert's turn may never have come
            paths.append(place_of(model.parts[part]))
            with disk_told():
                write_calibration(paths[-1], directions)
    return Measured(plan=plan, layers=len(shares), least=min(shares), paths=tuple(paths))


def principal(rows: Tensor, count: int = DIRECTIONS) -> Tensor:
    """Inputs [n, K] → their largest principal directions about zero, float32 [R, K], the largest
    first, each as long as the root of its share, where the mean square of all K inputs is 1."""
    rows = rows.float()
    rows = rows / rows.square().mean().sqrt().clamp(min=1e-30)
    squares = (rows @ rows.T).double() / len(rows)
    _, vectors = torch.linalg.eigh(squares)
    largest = vectors[:, -min(count, *rows.shape) :].flip(1).float()
    found: Tensor = largest.T @ rows / math.sqrt(len(rows))
    return found


def _whole(request: Request) -> Request:
    """The request with nothing left out or added, and weights as the files have them unless it says
    otherwise."""
    left_out = [
        name
        for name in ("lora", "sparsity", "cache")
        if (value := getattr(request, name)) is not None and value != ()
    ]
    if left_out:
        logger.warning("%s is left out: the model itself is measured", ", ".join(left_out))
    quantization = request.quantization or NO_QUANTIZATION
    return replace(
        request,
        lora=(),
        sparsity=None,
        cache=None,
        quantization=quantization,
        seed=request.seed or 0,
    )


@dataclass
class _Samples:
    """Tokens of each measured layer of one transformer; ``each`` of a call, on average."""

    each: float
    layers: dict[str, list[Tensor]] = field(default_factory=dict)
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def watch(self, transformer: nn.Module, plan: Plan) -> None:
        """Keep tokens of whatever its layers get from now on."""
        for name, module in transformer.named_modules():
            linear = isinstance(module, nn.Linear) and plan.weights.policy.stores(name)
            if linear and measured_layer(name) == name:
                # After the layer: one that is watched so gets its input in 16 bit.
                module.register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, _layer: nn.Module, inputs: tuple[Any, ...], _out: Any) -> None:
        # Of many calls by chance: every second one would be that of one of guidance's passes.
        count = int(self.each + float(torch.rand((), generator=self._generator)))
        if not count:
            return
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        chosen = torch.randint(len(rows), (count,), generator=self._generator)
        self.layers.setdefault(name, []).append(rows[chosen.to(rows.device)].cpu())


def _denoised(
    plan: Plan, prompts: Sequence[str], session: Session, watch: Watch
) -> Mapping[str, Mapping[str, list[Tensor]]]:
    """By transformer and layer, inputs [n, K] of every call."""
    watch.planned(plan)
    watch.stage("load")
    components = build(plan, Launcher(), session, watch)
    samples = {}
    for expert, part in enumerate(components.transformers):
        own = samples[part.name] = _Samples(ROWS / max(1, _calls(plan, expert) * len(prompts)))
        part.load = partial(_watched, part.load, own, plan)
    paths = {"image": plan.request.image, "last_image": plan.request.last_image}
    pictures = {
        name: load_picture(path, plan.grid_size, name) for name, path in paths.items() if path
    }
    watch.stage("encode")
    texts = encode(components, plan, pictures, prompts)
    for number in range(len(prompts)):
        own_text = replace(texts, prompt=texts.prompt[number : number + 1])
        noise = start(plan, [plan.seed + number])
        denoise(components, plan, own_text, watch, resume=noise)
    return {name: own.layers for name, own in samples.items()}


def _calls(plan: Plan, expert: int) -> int:
    """Forward passes of an expert in one video."""
    steps = zip(plan.steps.experts, plan.steps.passes, strict=True)
    return sum(passes for own, passes in steps if own == expert)


def _watched(load: Any, samples: _Samples, plan: Plan) -> Any:
    transformer = load()
    samples.watch(transformer, plan)
    return transformer
