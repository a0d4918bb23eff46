"""One attention call for other programs: checked, decided by the plan, proved, and run."""

import logging
import math
from collections.abc import Iterable
from typing import ClassVar, NamedTuple
from weakref import WeakValueDictionary

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

Inputs = tuple[Tensor, Tensor, Tensor]

_LAYOUTS = ("BHND", "BNHD")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Wanted(NamedTuple):
    """The mode that a caller names, and what may stand in for it."""

    mode: str
    strict: bool = False
    emulate: bool = False

    def request(self) -> Request:
        """Raises RequestError for an unknown mode."""
        return Request(
            prompt="attend", attention=self.mode, strict=self.strict, emulate=self.emulate
        )


class Session:
    """What a caller's calls ran, and what they fell back from. What is known of the machine is the
    process's: probed once, evidence by device, head size and dtype."""

    hardware: Hardware | None = None
    evidence: ClassVar[dict[tuple[str, int, str], Evidence]] = {}
    # By id, for the operators of compiled programs.
    every: ClassVar[WeakValueDictionary[int, "Session"]] = WeakValueDictionary()

    def __init__(self) -> None:
        self.launcher = Launcher()
        self.fallbacks: list[Fallback] = []
        self.handle = id(self)
        self.every[self.handle] = self

    def device(self, device: torch.device) -> tuple[Device, Hardware]:
        hardware = Session.hardware = Session.hardware or probe()
        index = device.index or 0
        name = "cpu" if device.type == "cpu" else f"cuda:{index}"
        return hardware.device(name), hardware

    def tell(self, fallbacks: Iterable[Fallback]) -> None:
        """Each step down once: a caller sees the result, not what computed it."""
        for step in fallbacks:
            if step not in self.fallbacks:
                self.fallbacks.append(step)
                change = Change(step.from_mode, step.to_mode, step.why())
                logger.warning("%s", change.sentence())


_session = Session()


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
    wanted = Wanted(mode, strict, emulate)
    with torch.no_grad():
        if return_lse:
            output, lse = attend_in_with_lse(_session, wanted, (q, k, v), scale)
        else:
            output, lse = attend_in(_session, wanted, (q, k, v), scale), None
    output = output.transpose(1, 2) if layout == "BNHD" else output
    return output if lse is None else (output, lse)


def attend_in(
    session: Session, wanted: Wanted, inputs: Inputs, scale: float | None = None
) -> Tensor:
    """q [B, H, N, D], k and v [B, Hk, M, D] → [B, H, N, D], in the wanted mode, counted in the
    session. In a compiled program it is one operator, ``sagewan::attend``."""
    if torch.compiler.is_compiling():
        compiled: Tensor = _attend_operator(*inputs, session.handle, *wanted, scale)
        return compiled
    return _run(session, wanted, inputs, scale, return_lse=False)[0]


def attend_in_with_lse(
    session: Session, wanted: Wanted, inputs: Inputs, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`attend_in`, with the log-sum-exp [B, H, N] in float32."""
    if torch.compiler.is_compiling():
        both = _attend_with_lse_operator(*inputs, session.handle, *wanted, scale)
        return both[0], both[1]
    output, lse = _run(session, wanted, inputs, scale, return_lse=True)
    assert lse is not None
    return output, lse


def _attend_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    session: int,
    mode: str,
    strict: bool,
    emulate: bool,
    scale: float | None,
) -> Tensor:
    wanted = Wanted(mode, strict, emulate)
    output, _ = _run(Session.every[session], wanted, (q, k, v), scale, return_lse=False)
    return _as_declared(output, q)


def _attend_with_lse_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    session: int,
    mode: str,
    strict: bool,
    emulate: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    wanted = Wanted(mode, strict, emulate)
    output, lse = _run(Session.every[session], wanted, (q, k, v), scale, return_lse=True)
    assert lse is not None
    return _as_declared(output, q), lse.contiguous()


def _as_declared(output: Tensor, q: Tensor) -> Tensor:
    """In memory like q: a compiled program relies on it, whatever implementation runs."""
    declared = torch.empty_like(q)
    return output if output.stride() == declared.stride() else declared.copy_(output)


_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, int session, str mode, bool strict, bool emulate, float? scale)"
)
_attend_operator = torch.library.custom_op(
    "sagewan::attend", _attend_now, mutates_args=(), schema=f"{_ARGUMENTS} -> Tensor"
)
_attend_with_lse_operator = torch.library.custom_op(
    "sagewan::attend_with_lse",
    _attend_with_lse_now,
    mutates_args=(),
    schema=f"{_ARGUMENTS} -> (Tensor, Tensor)",
)


@_attend_operator.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)


@_attend_with_lse_operator.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _run(
    session: Session,
    wanted: Wanted,
    inputs: Inputs,
    scale: float | None,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Launch what the plan chose; after a failure, plan again without that implementation."""
    request = wanted.request()
    device, hardware = session.device(inputs[0].device)
    problem = _problem(*inputs, return_lse=return_lse)
    while True:
        choice = _decide(session, request, problem, device, hardware)
        try:
            if return_lse:
                return session.launcher.attend_with_lse(*inputs, choice, scale=scale)
            return session.launcher.attend(*inputs, choice, scale=scale), None
        except ImplementationError as failure:
            if choice.row.trusted:
                raise
            key = _key(device, problem)
            session.evidence[key] = session.evidence[key].with_failure(
                failure.implementation, failure.objection
            )


def _decide(
    session: Session, request: Request, problem: Problem, device: Device, hardware: Hardware
) -> Choice:
    """Plan, prove what the plan wants proved, and plan again until nothing is left to prove."""
    key = _key(device, problem)
    evidence = session.evidence.get(key) or load_evidence(device, hardware, problem)
    while True:
        plan = plan_attention(request, None, problem, device, hardware, evidence, layers=1)
        session.evidence[key] = evidence
        if not plan.unproven:
            session.tell(plan.fallbacks)
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


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """Refuse what no implementation takes, naming the shapes."""
    if any(x.ndim != 4 for x in (q, k, v)):
        raise ShapeError(
            f"{_shapes(q, k, v)}: give 4 dimensions each, [batch, heads, tokens, head size]"
        )
    if k.shape != v.shape:
        raise ShapeError(f"{_shapes(q, k, v)}: k and v must have the same shape")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"{_shapes(q, k, v)}: batch and head size must be equal in all three")
    if 0 in q.shape or 0 in k.shape:
        raise ShapeError(f"{_shapes(q, k, v)}: no dimension may be empty")
    if q.shape[1] % k.shape[1]:
        raise ShapeError(f"{_shapes(q, k, v)}: the heads of q must be a multiple of those of k")
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
