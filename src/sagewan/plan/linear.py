"""The ways to multiply by a stored weight: a table of rows, and what a row objects to.

As in the table of attention's, a row is plain data, and nothing is imported to read it. Its
function takes x [M, K], the weight (:class:`sagewan.checkpoint.packed.Packed`) and the bias or
None, and gives [M, N] in x's dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from packaging.version import Version

from sagewan.plan.catalogue import CUDA_BINDINGS
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.objection import Objection
from sagewan.plan.row import ADA_UP, AMPERE_UP, ANY_FLOAT, BLACKWELL, Row

E4M3 = "float8_e4m3fn"
E5M2 = "float8_e5m2"
INT8 = "int8"
NVFP4 = "nvfp4"
MXFP8 = "mxfp8"
GGUF = "gguf"
FORMATS = (E4M3, E5M2, INT8, NVFP4, MXFP8, GGUF)

# Sides of the matrices that FP8's and FP4's products take, of torch's and of our kernels.
_SIDE = 16
# Up to here reading the weight takes the time, and the smaller weight wins (docs/measured.md).
THIN_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class LinearProblem:
    """What a layer asks for: ``format`` of its weight, ``rows`` of activations in ``dtype``, the
    ``sides`` of its matrix; ``low`` if the policy lets it multiply in low precision."""

    format: str
    rows: int
    dtype: str
    low: bool
    sides: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LinearRow(Row):
    """One way to multiply. ``compute`` is what multiplies what; ``low`` whether the activations
    are rounded to a low precision too. ``rows`` is the range of rows it is meant for: outside, a
    later row of the table is faster; ``cuda`` the oldest that torch may be built for.
    ``takes_fp8``: its input may come as FP8 with a scale a row
    (:class:`sagewan.kernels.fp8_rows.Fp8Rows`), from whatever computed it. ``adds`` is the
    ``"module:function"`` that adds the product of such an input, times a gate, to what is there;
    ``gelu`` the one that gives GELU of it, as FP8."""

    formats: tuple[str, ...]
    compute: str
    low: bool = False
    takes_fp8: bool = False
    adds: str | None = None
    gelu: str | None = None
    rows: tuple[int, int | None] = (1, None)
    side: int = 1
    cuda: str | None = None

    def objections(
        self, problem: LinearProblem, device: Device, hardware: Hardware
    ) -> Iterator[Objection]:
        """Why this row can't serve the problem on the device; the machine's lack comes first."""
        if problem.format not in self.formats:
            yield Objection(
                "format", {"needed": " or ".join(self.formats), "found": problem.format}
            )
        yield from self.needs(problem.dtype, device, hardware)
        found = hardware.torch_cuda or "none"
        if self.cuda and found[0].isdigit() and Version(found) < Version(self.cuda):
            needed = f"{self.cuda} or newer"
            values = {"package": "torch's CUDA", "needed": needed, "found": found}
            yield Objection("package-version", values)
        if self.low and not problem.low:
            yield Objection("policy-16-bit")
        least, most = self.rows
        if problem.rows < least or (most is not None and problem.rows > most):
            yield Objection("rows", {"found": str(problem.rows)})
        if any(side % self.side for side in problem.sides):
            yield Objection("sides", {"needed": str(self.side)})

    def objection(
        self, problem: LinearProblem, device: Device, hardware: Hardware
    ) -> Objection | None:
        """The first of :meth:`objections`, or None: the row can be tried."""
        return next(self.objections(problem, device, hardware), None)


_TRITON = ("3.6", "4")
_INSTALL_TRITON = "pip install triton, on Windows triton-windows"

_FP8 = LinearRow(
    name="torch.fp8_rows",
    call="sagewan.model.matmul:fp8_rows",
    formats=(E4M3,),
    compute="fp8 e4m3 × fp8 e4m3",
    low=True,
    takes_fp8=True,
    sms=ADA_UP,
    dtypes=("bfloat16",),  # the one output of torch's product with a scale per row
    side=_SIDE,
    package="triton",
    versions=_TRITON,
    install=_INSTALL_TRITON,
    systems=("Linux", "Windows"),
)
_FP8_OF_NVFP4 = replace(
    _FP8,
    name="torch.fp8_rows_of_nvfp4",
    call="sagewan.model.matmul:fp8_rows_of_nvfp4",
    formats=(NVFP4,),
    compute="fp8 e4m3 × nvfp4 unpacked to fp8 e4m3",
    # Unpacking the weight costs the same for any number of tokens; the faster product has paid
    # for it, and for rounding the activations, from about here.
    rows=(256, None),
)
# Where cuBLASLt multiplies FP8 with a scale a row, and since when.
_HOPPER, _CUDA = (90,), "12.9"

_CUBLAS = replace(
    _FP8,
    name="cublas.fp8_rows",
    adds="sagewan.model.matmul:add_fp8_rows",
    sms=_HOPPER,
    cuda=_CUDA,
)
_CUBLAS_OF_NVFP4 = replace(
    _FP8_OF_NVFP4,
    name="cublas.fp8_rows_of_nvfp4",
    adds="sagewan.model.matmul:add_fp8_rows_of_nvfp4",
    sms=_HOPPER,
    cuda=_CUDA,
)
# The same, and one kernel of our own, in CUDA C++.
_OURS: dict[str, Any] = {
    "package": CUDA_BINDINGS,
    "versions": ("12.8", "14"),
    "install": "pip install cuda-bindings nvidia-cuda-nvrtc",
}

LINEAR_ROWS: tuple[LinearRow, ...] = (
    LinearRow(
        name="sagewan.thin",
        call="sagewan.model.matmul:thin",
        formats=(E4M3, NVFP4),
        compute="16 bit × weight unpacked in the kernel",
        rows=(1, THIN_ROWS),
        sms=AMPERE_UP,
        side=_SIDE,
        package="triton",
        versions=_TRITON,
        install=_INSTALL_TRITON,
        systems=("Linux", "Windows"),
    ),
    LinearRow(
        name="comfy_kitchen.nvfp4",
        call="sagewan.model.matmul:nvfp4",
        formats=(NVFP4,),
        compute="nvfp4 × nvfp4",
        low=True,
        sms=BLACKWELL,
        side=_SIDE,
        package="comfy-kitchen",
        versions=("0.2.40", "0.3"),
        install='pip install "comfy-kitchen>=0.2.40,<0.3"',
        systems=("Linux", "Windows"),
    ),
    replace(
        _CUBLAS,
        name="sagewan.fp8_rows_hopper",
        gelu="sagewan.model.matmul:gelu_fp8_rows",
        **_OURS,
    ),
    _CUBLAS,
    _FP8,
    replace(
        _CUBLAS_OF_NVFP4,
        name="sagewan.fp8_rows_hopper_of_nvfp4",
        gelu="sagewan.model.matmul:gelu_fp8_rows_of_nvfp4",
        **_OURS,
    ),
    _CUBLAS_OF_NVFP4,
    _FP8_OF_NVFP4,
    LinearRow(
        name="emulated.fp8",
        call="sagewan.model.matmul:emulated_fp8",
        formats=(E4M3,),
        compute="fp8 e4m3 × fp8 e4m3",
        low=True,
        dtypes=ANY_FLOAT,
        emulated=True,
        trusted=True,
    ),
    LinearRow(
        name="emulated.nvfp4",
        call="sagewan.model.matmul:emulated_nvfp4",
        formats=(NVFP4,),
        compute="nvfp4 × nvfp4",
        low=True,
        dtypes=ANY_FLOAT,
        emulated=True,
        trusted=True,
    ),
    LinearRow(
        name="sagewan.nvfp4_unpacked",
        call="sagewan.model.matmul:nvfp4_unpacked",
        formats=(NVFP4,),
        compute="unpacked before the product",
        sms=AMPERE_UP,
        side=_SIDE,
        package="triton",
        versions=_TRITON,
        install=_INSTALL_TRITON,
        systems=("Linux", "Windows"),
    ),
    LinearRow(
        name="torch.unpacked",
        call="sagewan.model.matmul:unpacked",
        formats=FORMATS,
        compute="unpacked before the product",
        dtypes=ANY_FLOAT,
        trusted=True,
    ),
)


def linear_rows(format_: str, *, emulate: bool = False) -> tuple[LinearRow, ...]:
    """The rows for a format, in order of preference; the emulation only where allowed."""
    return tuple(
        row for row in LINEAR_ROWS if format_ in row.formats and (emulate or not row.emulated)
    )
