"""One attention call for other programs: checked, decided by the plan, proved, and run."""

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sagewan.attention.cache import load_evidence
from sagewan.attention.launch import Launcher
from sagewan.attention.resolve import ImplementationError
from sagewan.errors import RequestError, ShapeError
from sagewan.pipeline.decide import prove
from sagewan.pipeline.probe import probe
from sagewan.pipeline.report import Change
from sagewan.plan.attention import Choice, Fallback, plan_attention
from sagewan.plan.catalogue import Problem
from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.request import Request

logger = logging.getLogger(__name__)

_LAYOUTS = ("BHND", "BNHD")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class _Session:
    """What this process knows of its machine: probed once, evidence by device, head size, dtype."""

    def __init__(self) -> None:
        self.hardware: Hardware | None = None
        self.evidence: dict[tuple[str, int, str], Evidence] = {}
        self.launcher = Launcher()
        self._told: set[Fallback] = set()

    def device(self, device: torch.device) -> tuple[Device, Hardware]:
        self.hardware = self.hardware or probe()
        index = device.index or 0
        name = "cpu" if device.type == "cpu" else f"cuda:{index}"
        return self.hardware.device(name), self.hardware

    def tell(self, fallbacks: Iterable[Fallback]) -> None:
        """Each step down once: a caller sees the result, not what computed it."""
        for step in fallbacks:
            if step not in self._told:
                self._told.add(step)
                change = Change(step.from_mode, step.to_mode, step.why())
                logger.warning("%s", change.sentence())


_session = _Session()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mode: str,
    layout: str = "BHND",
    scale: float | None = None,
    return_lse: bool = False,
    strict: bool = False,
    emulate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q·kᵀ·scale)·v in a named mode, without mask, causality or dropout.

    q [B, H, N, D], k and v [B, Hk, M, D] with H a multiple of Hk (or heads third, as
    ``layout="BNHD"``), float16, bfloat16 or float32 on one device, any strides → like q; with
    ``return_lse`` also the natural log-sum-exp [B, H, N] in float32. ``scale`` defaults to
    D**-0.5. Inputs are not changed, and no gradient is computed.

    The mode falls back as in a video's plan, each step logged once as a warning; an
    implementation's first use on a device is its self-test. Raises ShapeError for tensors it does
    not take, RequestError for an unknown mode or layout, UnsupportedError where ``strict`` forbids
    the fallback that this machine needs.
    """
    if layout not in _LAYOUTS:
        raise RequestError(f"layout={layout}: use {' or '.join(_LAYOUTS)}")
    if layout == "BNHD" and all(x.ndim == 4 for x in (q, k, v)):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    _check(q, k, v, scale)
    request = Request(prompt="attend", attention=mode, strict=strict, emulate=emulate)
    with torch.no_grad():
        output, lse = _run(request, (q, k, v), scale, return_lse=return_lse)
    output = output.transpose(1, 2) if layout == "BNHD" else output
    return output if lse is None else (output, lse)


def _run(
    request: Request,
    inputs: tuple[Tensor, Tensor, Tensor],
    scale: float | None,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Launch what the plan chose; after a failure, plan again without that implementation."""
    device, hardware = _session.device(inputs[0].device)
    problem = _problem(*inputs, return_lse=return_lse)
    while True:
        choice = _decide(request, problem, device, hardware)
        try:
            if return_lse:
                return _session.launcher.attend_with_lse(*inputs, choice, scale=scale)
            return _session.launcher.attend(*inputs, choice, scale=scale), None
        except ImplementationError as failure:
            if choice.row.trusted:
                raise
            key = _key(device, problem)
            _session.evidence[key] = _session.evidence[key].with_failure(
                failure.implementation, failure.objection
            )


def _decide(request: Request, problem: Problem, device: Device, hardware: Hardware) -> Choice:
    """Plan, prove what the plan wants proved, and plan again until nothing is left to prove."""
    key = _key(device, problem)
    evidence = _session.evidence.get(key) or load_evidence(device, hardware, problem)
    while True:
        plan = plan_attention(request, None, problem, device, hardware, evidence, layers=1)
        _session.evidence[key] = evidence
        if not plan.unproven:
            _session.tell(plan.fallbacks)
            return plan.main
        evidence = prove(plan, device, hardware, evidence)


def _key(device: Device, problem: Problem) -> tuple[str, int, str]:
    return device.torch_name, problem.head_dim, problem.dtype


def _problem(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool) -> Problem:
    return Problem(
        head_dim=q.shape[3],
        dtype=str(q.dtype).removeprefix("torch."),
        keys=v.shape[2],
        grouped_heads=k.shape[1] != q.shape[1],
        log_sum_exp=return_lse,
    )


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """Refuse what no implementation takes, naming the shapes."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(x.ndim != 4 for x in (q, k, v)):
        raise ShapeError(f"{shapes}: give 4 dimensions each, [batch, heads, tokens, head size]")
    if k.shape != v.shape:
        raise ShapeError(f"{shapes}: k and v must have the same shape")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"{shapes}: batch and head size must be equal in all three")
    if 0 in q.shape or 0 in k.shape:
        raise ShapeError(f"{shapes}: no dimension may be empty")
    if q.shape[1] % k.shape[1]:
        raise ShapeError(f"{shapes}: the heads of q must be a multiple of those of k")
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ShapeError(
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}: give all in float16, bfloat16 or float32"
        )
    if not q.device == k.device == v.device or q.device.type not in ("cpu", "cuda"):
        raise ShapeError(
            f"q on {q.device}, k on {k.device}, v on {v.device}: put all on one CPU or CUDA device"
        )
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ShapeError(f"scale={scale}: give a positive number, or leave it out for D**-0.5")
