"""What the transformer's weights are stored in, and what multiplies by them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import MappingProxyType

from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.layers import Layer, Role, block_layers, block_of, role_of
from sagewan.plan.linear import (
    E4M3,
    FORMATS,
    GGUF,
    NVFP4,
    LinearProblem,
    LinearRow,
    linear_rows,
)
from sagewan.plan.models import TEXT_TOKENS, Model
from sagewan.plan.modes import AUTO, Preset
from sagewan.plan.objection import Objection
from sagewan.plan.request import NO_QUANTIZATION, Request

# The stored format of each quantization.
QUANTIZED_AS: Mapping[str, str] = MappingProxyType({"fp8_scaled": E4M3, "fp4_scaled": NVFP4})

# ``auto`` keeps 16 bit where the weights leave this share of the card's free memory to the rest.
_ROOM_FOR_16_BIT = 0.5
_ROOM_FOR_FP8 = 1.0


@dataclass(frozen=True)
class Policy:
    """Which layers of a transformer are quantised, and which of them multiply in low precision; the
    ``whole`` blocks are left as they are."""

    stored: frozenset[Role]
    low: frozenset[Role]
    whole: frozenset[int] = frozenset()

    def stores(self, name: str) -> bool:
        """Whether the layer of this name in the transformer is quantised."""
        return role_of(name) in self.stored and block_of(name) not in self.whole


# Keys and values of cross-attention come from the text, 512 rows: 16 bit costs nothing there, and
# what they lose reaches every token. Embeddings, the modulation, norms, the first and the last
# layer are small, and stay as diffusers keeps them.
_WAN = Policy(
    stored=frozenset(
        {Role.SELF_ATTENTION, Role.CROSS_QUERY, Role.CROSS_KEY_VALUE, Role.FEED_FORWARD}
    ),
    low=frozenset({Role.SELF_ATTENTION, Role.CROSS_QUERY, Role.FEED_FORWARD}),
)
# The demo model's first block makes a few features far larger than all others, and what its last
# one loses no later one evens out: from each comes as much of the error as from the six between
# (docs/measured.md).
_DEMO = replace(_WAN, whole=frozenset({0, 7}))
POLICIES: Mapping[str, Policy] = MappingProxyType(
    {"wan": _WAN, "wan2.1": _WAN, "wan2.2": _WAN, "demo": _DEMO}
)


@dataclass(frozen=True, kw_only=True)
class WeightsPlan:
    """How the transformers' weights are kept and used.

    ``format`` is what the block's matrices become, None if they stay as the file has them;
    ``unpacks`` tells that a file's quantised matrices are unpacked to 16 bit. ``rows`` holds the
    row for each format and role; ``bytes`` is what one transformer takes. ``measured`` is what
    weights are rounded by, if they are to be quantised: a transformer's file of its inputs.
    """

    requested: str
    quantization: str
    from_preset: bool
    format: str | None
    unpacks: bool
    policy: Policy
    rows: tuple[tuple[str, Role, LinearRow], ...]
    bytes: int
    unproven: tuple[LinearRow, ...] = ()
    refused: tuple[tuple[str, Objection], ...] = ()
    measured: Mapping[str, Path] = field(default_factory=dict)

    def quantises(self, name: str) -> bool:
        """Whether the layer of this name in the transformer is to be quantised while loading."""
        return self.format is not None and self.policy.stores(name)

    def row(self, format_: str, role: Role) -> LinearRow:
        """What multiplies by a weight in this format in a layer of this role."""
        kind = GGUF if format_.startswith("gguf:") else format_
        return next(row for f, r, row in self.rows if (f, r) == (kind, role))

    def precise(self, format_: str) -> LinearRow:
        """What multiplies in 16 bit by a weight in this format, where its file wants that."""
        return self.row(format_, Role.CROSS_KEY_VALUE)

    @property
    def main(self) -> LinearRow | None:
        """What the block's largest products run by, None where they are torch's own in 16 bit."""
        return None if self.format is None else self.row(self.format, Role.FEED_FORWARD)


@dataclass(frozen=True)
class Situation:
    """What rows are chosen for: the model, its dtype and tokens, on this device."""

    model: Model
    dtype: str
    tokens: int
    device: Device
    hardware: Hardware
    evidence: Evidence


def plan_weights(request: Request, preset: Preset | None, situation: Situation) -> WeightsPlan:
    """Choose the storage and the rows."""
    model, dtype = situation.model, situation.dtype
    preferred = preset.quantization if preset else AUTO
    requested = request.quantization or preferred
    chosen = _auto(situation) if requested == AUTO else requested
    own = model.quantized
    # Quantising anew what is quantised already would lose twice.
    format_ = None if own else QUANTIZED_AS.get(chosen)
    unpacks = own is not None and request.quantization == NO_QUANTIZATION
    policy = POLICIES.get(model.family, _WAN)
    found = list(_choose(situation, policy, emulate=request.emulate))
    rows = tuple((f, role, row) for f, role, row, _ in found)
    used = format_ or (None if unpacks else own)
    main = [entry for entry in found if entry[0] == _kind(used) and entry[1] in policy.stored]
    # A file may hold other matrices quantised too, in other formats: all that may run is proved.
    may_run = found if own and not unpacks else main
    unproven = {row for *_, row, _ in may_run if not row.trusted and _untested(row, situation)}
    refused = next((r for _, role, _, r in main if role == Role.FEED_FORWARD), ())
    return WeightsPlan(
        requested=requested,
        quantization=chosen if used == format_ else (own or NO_QUANTIZATION),
        from_preset=request.quantization is None and preset is not None,
        format=used,
        unpacks=unpacks,
        policy=policy,
        rows=rows,
        bytes=weight_bytes(model, dtype, used, policy),
        unproven=tuple(sorted(unproven, key=lambda row: row.name)),
        refused=refused,
        measured=model.measured if format_ else {},
    )


def weight_bytes(
    model: Model, dtype: str, format_: str | None, policy: Policy | None = None
) -> int:
    """Bytes of one transformer whose policy's layers are stored in this format."""
    policy = policy or POLICIES.get(model.family, _WAN)
    each = 4 if dtype == "float32" else 2
    quantised = [layer for layer in block_layers(model) if layer.role in policy.stored]
    if format_ is None:
        return model.parameters * each
    blocks = sum(block not in policy.whole for block in range(model.layers))
    numbers = blocks * sum(prod(layer.shape) for layer in quantised)
    stored = blocks * sum(stored_bytes(layer, format_) for layer in quantised)
    return (model.parameters - numbers) * each + stored


def stored_bytes(layer: Layer, format_: str) -> int:
    """Bytes of one matrix in a format, with its scales."""
    rows, columns = layer.shape
    if format_ == NVFP4:
        padded = _up(rows, 16) * _up(columns, 16) // 2
        return padded + _up(rows, 128) * _up(-(-columns // 16), 4) + 4
    if format_.startswith(GGUF):
        return int(rows * columns * _GGUF_BITS.get(format_.removeprefix("gguf:"), 8) / 8)
    return rows * columns + 4 * rows


_GGUF_BITS = {"Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q4_K": 4.5, "F16": 16, "BF16": 16}


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _kind(format_: str | None) -> str | None:
    return GGUF if format_ and format_.startswith("gguf:") else format_


def _auto(situation: Situation) -> str:
    """16 bit where it leaves room, else FP8, and FP4 where even that does not fit the card."""
    free = situation.device.memory_free
    if not situation.device.is_cuda or situation.model.quantized or not free:
        return NO_QUANTIZATION
    for chosen, share in ((NO_QUANTIZATION, _ROOM_FOR_16_BIT), ("fp8_scaled", _ROOM_FOR_FP8)):
        if weight_bytes(situation.model, situation.dtype, QUANTIZED_AS.get(chosen)) <= share * free:
            return chosen
    return "fp4_scaled"


def _choose(
    situation: Situation, policy: Policy, *, emulate: bool
) -> Iterator[tuple[str, Role, LinearRow, tuple[tuple[str, Objection], ...]]]:
    """The row for each format and role, with the objections of those that multiply lower."""
    layers = block_layers(situation.model)
    for format_ in FORMATS:
        for role in Role:
            sides = [side for layer in layers if layer.role == role for side in layer.shape]
            problem = LinearProblem(
                format=format_,
                rows=_rows(role, situation),
                dtype=situation.dtype,
                low=role in policy.low,
                sides=tuple(dict.fromkeys(sides)),
            )
            refused: list[tuple[str, Objection]] = []
            for row in linear_rows(format_, emulate=emulate):
                objection = row.objection(problem, situation.device, situation.hardware)
                objection = objection or situation.evidence.objection(row.name)
                if objection is None:
                    yield format_, role, row, tuple(refused)
                    break
                if row.low:
                    refused.append((row.name, objection))


def _rows(role: Role, situation: Situation) -> int:
    """How many rows of activations a layer sees at once."""
    if role == Role.CROSS_KEY_VALUE:
        return TEXT_TOKENS
    if role == Role.TIME:
        return situation.tokens if situation.model.expand_timesteps else 1
    return TEXT_TOKENS if role == Role.OTHER else situation.tokens


def _untested(row: LinearRow, situation: Situation) -> bool:
    return row.name not in situation.evidence.tests
