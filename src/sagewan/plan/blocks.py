"""The ways to run a transformer's blocks between their products: a table of rows, and the choice.

As in the other tables a row is plain data. Its function is a class whose instances are the forward
pass of one block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sagewan.plan.attention import AttentionPlan
from sagewan.plan.catalogue import CUDA_BINDINGS
from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.models import Model
from sagewan.plan.objection import Objection
from sagewan.plan.row import AMPERE_UP, ANY_FLOAT, Row, listed


@dataclass(frozen=True, kw_only=True)
class BlockRow(Row):
    """One way to run a block. ``fused`` ones run in kernels of ours that take heads of
    ``head_dims`` channels and rows of up to ``widest`` values. ``prepares`` is the implementation
    of attention whose form Q and K are brought to, and for which alone the row is."""

    fused: bool = False
    head_dims: tuple[int, ...] = ()
    widest: int | None = None
    prepares: str | None = None

    def objections(
        self,
        model: Model,
        attention: AttentionPlan,
        device: Device,
        hardware: Hardware,
    ) -> Iterator[Objection]:
        """Why this row can't run the model's blocks on the device."""
        yield from self.needs(attention.problem.dtype, device, hardware)
        if self.head_dims and model.head_dim not in self.head_dims:
            values = {"needed": listed(self.head_dims), "found": str(model.head_dim)}
            yield Objection("head-dim", values)
        if self.prepares and attention.main.row.name != self.prepares:
            values = {"needed": self.prepares, "found": attention.main.row.name}
            yield Objection("other-attention", values)
        width = max(model.heads * model.head_dim, model.ffn)
        if self.widest and width > self.widest:
            yield Objection("width", {"needed": str(self.widest), "found": str(width)})


BLOCK_ROWS: tuple[BlockRow, ...] = (
    BlockRow(
        name="sagewan.fused_block_hopper",
        call="sagewan.model.fused:HopperBlock",
        fused=True,
        prepares="sagewan.sageattn_3_fp8_hopper",
        sms=(90,),
        head_dims=(128,),
        widest=16384,
        package=CUDA_BINDINGS,
        versions=("12.8", "14"),
        install="pip install cuda-bindings nvidia-cuda-nvrtc",
        systems=("Linux", "Windows"),
    ),
    BlockRow(
        name="sagewan.fused_block",
        call="sagewan.model.fused:FusedBlock",
        fused=True,
        sms=AMPERE_UP,
        head_dims=(64, 128, 256),
        widest=16384,
        package="triton",
        versions=("3.6", "4"),
        install="pip install triton, on Windows triton-windows",
        systems=("Linux", "Windows"),
    ),
    BlockRow(
        name="sagewan.block", call="sagewan.model.block:Block", dtypes=ANY_FLOAT, trusted=True
    ),
)


def block_rows() -> tuple[BlockRow, ...]:
    """The rows, in order of preference."""
    return BLOCK_ROWS


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The row that runs the blocks, why those before it do not, and whether it still wants its
    self-test."""

    row: BlockRow
    refused: tuple[tuple[str, Objection], ...] = ()
    unproven: tuple[BlockRow, ...] = ()

    def why(self, language: str = "en") -> str:
        """Why the blocks are not fused, in one line; nothing if they are."""
        if self.row.fused:
            return ""
        sentences = dict.fromkeys(objection.sentence(language) for _, objection in self.refused)
        return "; ".join(sentences)


def plan_blocks(
    model: Model, attention: AttentionPlan, device: Device, hardware: Hardware, evidence: Evidence
) -> BlockPlan:
    """The first row without an objection; the last of the table has none."""
    refused: list[tuple[str, Objection]] = []
    for row in block_rows():
        objection = next(row.objections(model, attention, device, hardware), None)
        objection = objection or evidence.objection(row.name)
        if objection is None:
            unproven = not row.trusted and row.name not in evidence.tests
            return BlockPlan(row=row, refused=tuple(refused), unproven=(row,) if unproven else ())
        refused.append((row.name, objection))
    raise AssertionError("the last row runs everywhere")
