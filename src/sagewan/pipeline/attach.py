"""Our attention modes in diffusers' own pipelines: attached in one line, taken off in another."""

from typing import Any

from torch import Tensor

from sagewan.errors import RequestError
from sagewan.model.processor import SelfAttention
from sagewan.pipeline.attend import Session, Wanted, attend_in


class Attached:
    """What :func:`attach` returns: a record of what ran, and the way back. As a context manager it
    detaches at the block's end."""

    def __init__(self, transformers: list[Any], wanted: Wanted) -> None:
        self._wanted = wanted
        self._session = Session()
        self._before = [
            (block.attn1, block.attn1.processor)
            for transformer in transformers
            for block in transformer.blocks
        ]
        for attn, _ in self._before:
            attn.set_processor(SelfAttention(self._attend))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_in(self._session, self._wanted, (q, k, v))

    def ran(self) -> list[dict[str, object]]:
        """What computed the calls until now, the most frequent first: ``mode``,
        ``implementation``, ``torch_backend`` and ``calls``, as in a report."""
        return self._session.launcher.ran()

    def fallbacks(self) -> list[dict[str, str]]:
        """Each step down that was needed until now: ``from``, ``to`` and ``why``."""
        return [
            {"from": step.from_mode, "to": step.to_mode, "why": step.why()}
            for step in self._session.fallbacks
        ]

    def detach(self) -> None:
        """Give every layer the processor it had before; the record stays."""
        for attn, processor in self._before:
            attn.set_processor(processor)
        self._before = []

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(
    pipeline: Any, *, attention: str, strict: bool = False, emulate: bool = False
) -> Attached:
    """Compute the self-attention of a diffusers Wan pipeline, or of a WanTransformer3DModel, in a
    mode such as ``sageattn_3_fp8`` or ``auto``; in Wan 2.2 of both experts.

    What serves the mode is decided at the first call, for the device and the dtype the model then
    has, with a self-test of what has not run on this device before; each fallback is logged once as
    a warning. Cross-attention stays as it is. Raises RequestError for another pipeline or an
    unknown mode; the pipeline's call raises UnsupportedError where ``strict`` forbids a fallback.
    """
    wanted = Wanted(attention, strict, emulate)
    wanted.request()
    transformers = _transformers(pipeline)
    if not transformers:
        raise RequestError(
            f"{type(pipeline).__name__}: give a diffusers Wan pipeline or a WanTransformer3DModel"
        )
    return Attached(transformers, wanted)


def _transformers(pipeline: Any) -> list[Any]:
    from diffusers.models import WanTransformer3DModel

    experts = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    # A compiled model is of another class, and holds the same blocks.
    found = (getattr(model, "_orig_mod", model) for model in (pipeline, *experts))
    return [model for model in found if isinstance(model, WanTransformer3DModel)]
