"""FP8 products that are added to what is there, by cuBLASLt on Hopper (9.0), without a pass of
their own: torch's product with a scale a row has no such form.

The library is the one that torch itself has loaded. Scales of rows and columns of a product in FP8
need its version 12.9 or newer, and this architecture.
"""

import ctypes
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels.fp8_rows import Fp8Rows

# Of cublasLt.h: attributes of a product and their values, and the types of matrices.
_TRANSPOSE_A, _EPILOGUE, _BIAS = 3, 7, 8
_A_SCALE, _B_SCALE, _FAST_ACCUMULATION, _BIAS_TYPE = 17, 18, 25, 26
_A_SCALE_MODE, _B_SCALE_MODE = 31, 32
_TRANSPOSED, _WITH_BIAS, _SCALE_OF_ROW = 1, 4, 3
_FLOAT, _BFLOAT16, _E4M3, _IN_FLOAT = 0, 14, 28, 68
_WORKSPACE_BYTES = 1
# Which is taken to be 256 if nothing is said.
_ALIGNMENTS = (5, 6, 7, 8)
_MOST_WORKSPACE = 32 * 2**20
_OUT_OF_MEMORY = 3
# Sides of matrices whose rows the copy engine can read.
_SIDE = 16


class CublasError(RuntimeError):
    """A call of cuBLASLt failed; the message has which, and its status."""


class _Found(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True)
class _Shape:
    """[M, K] by [N, K], added to [M, N]; all matrices begin at multiples of ``alignment``."""

    m: int
    n: int
    k: int
    bias: bool
    alignment: int


def add_product(
    x: Fp8Rows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, into: Tensor
) -> None:
    """into += x·Wᵀ + bias, rounded once: x [M, K], e4m3 weight [N, K] with float32 scales [N], bias
    [N] and into [M, N] bfloat16, rows without gaps, on one device. Raises ShapeError for other
    layouts, dtypes and for sides that are no multiples of 16, and CublasError."""
    _check(x, weight, weight_scale, bias, into)
    (m, k), n = x.data.shape, weight.shape[0]
    scales = x.aligned_scale.flatten()
    alignment = math.gcd(256, *(t.data_ptr() for t in (x.data, weight, into)))
    with torch.cuda.device(into.device):
        product = _product(into.device.index, _Shape(m, n, k, bias is not None, alignment))
        pointers = {_A_SCALE: weight_scale.contiguous(), _B_SCALE: scales}
        product.run(weight, x.data, into, pointers if bias is None else {**pointers, _BIAS: bias})


def _check(
    x: Fp8Rows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, into: Tensor
) -> None:
    tensors = (x.data, weight, into)
    (m, k), n = x.data.shape, weight.shape[0]
    shapes = [tuple(t.shape) for t in tensors]
    if any(t.dim() != 2 or not t.is_contiguous() for t in tensors) or n % _SIDE or k % _SIDE:
        raise ShapeError(f"{shapes}: give contiguous matrices of sides that are multiples of 16")
    # The library is told of each side once, and would read and write whatever lies there.
    if weight.shape[1] != k or into.shape != (m, n) or weight_scale.shape != (n,):
        raise ShapeError(f"{shapes} and {len(weight_scale)} scales: give [M, K], [N, K], [M, N], N")
    if {into.dtype, into.dtype if bias is None else bias.dtype} != {torch.bfloat16}:
        raise ShapeError(f"added to {into.dtype}: give bfloat16, and a bias of the same")


class _Product:
    """One shape's product: what cuBLASLt was told of it, and the algorithm that it chose."""

    def __init__(self, device: int, shape: _Shape) -> None:
        self._library = _library()
        self._handle = _handle(device)
        # A call's pointers are written into the description, which all threads share.
        self._one_at_a_time = threading.Lock()
        self._what = self._made("MatmulDesc", _IN_FLOAT, _FLOAT)
        self._set(_TRANSPOSE_A, ctypes.c_int32(_TRANSPOSED))
        self._set(_FAST_ACCUMULATION, ctypes.c_int8(1))
        for attribute in (_A_SCALE_MODE, _B_SCALE_MODE):
            self._set(attribute, ctypes.c_int32(_SCALE_OF_ROW))
        if shape.bias:
            self._set(_EPILOGUE, ctypes.c_int32(_WITH_BIAS))
            self._set(_BIAS_TYPE, ctypes.c_int32(_BFLOAT16))
        # Which must not be null when the algorithm is chosen, but are not read then.
        for attribute in (_A_SCALE, _B_SCALE, *((_BIAS,) if shape.bias else ())):
            self._set(attribute, ctypes.c_uint64(256))
        # In columns, as cuBLAS sees a matrix of rows: Dᵀ [N, M] = W·xᵀ.
        self._weight = self._layout(_E4M3, shape.k, shape.n)
        self._x = self._layout(_E4M3, shape.k, shape.m)
        self._into = self._layout(_BFLOAT16, shape.n, shape.m)
        self._found = self._chosen(shape.alignment)

    def run(self, weight: Tensor, x: Tensor, into: Tensor, pointers: dict[int, Tensor]) -> None:
        one = ctypes.byref(ctypes.c_float(1.0))
        size = self._found.workspace
        workspace = torch.empty(size, dtype=torch.uint8, device=into.device)
        stream = torch.cuda.current_stream(into.device).cuda_stream
        out = ctypes.c_void_p(into.data_ptr())
        with self._one_at_a_time:
            for attribute, tensor in pointers.items():
                self._set(attribute, ctypes.c_uint64(tensor.data_ptr()))
            self._call(
                "Matmul", self._handle, self._what,
                one, ctypes.c_void_p(weight.data_ptr()), self._weight,
                ctypes.c_void_p(x.data_ptr()), self._x,
                one, out, self._into, out, self._into,
                ctypes.byref(self._found.algorithm), ctypes.c_void_p(workspace.data_ptr()),
                ctypes.c_size_t(size), ctypes.c_void_p(stream),
            )  # fmt: skip

    def _chosen(self, alignment: int) -> _Found:
        preference = self._made("MatmulPreference")
        try:
            return self._preferred(preference, alignment)
        finally:
            self._call("MatmulPreferenceDestroy", preference)

    def _preferred(self, preference: ctypes.c_void_p, alignment: int) -> _Found:
        wanted: list[tuple[int, Any]] = [(_WORKSPACE_BYTES, ctypes.c_size_t(_MOST_WORKSPACE))]
        wanted += [(attribute, ctypes.c_uint32(alignment)) for attribute in _ALIGNMENTS]
        for attribute, value in wanted:
            self._call(
                "MatmulPreferenceSetAttribute", preference, ctypes.c_int(attribute),
                ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)),
            )  # fmt: skip
        found, count = _Found(), ctypes.c_int()
        self._call(
            "MatmulAlgoGetHeuristic", self._handle, self._what,
            self._weight, self._x, self._into, self._into,
            preference, ctypes.c_int(1), ctypes.byref(found), ctypes.byref(count),
        )  # fmt: skip
        if not count.value or found.status:
            raise CublasError(f"cuBLASLt knows no such product, status {found.status}")
        return found

    def _layout(self, kind: int, rows: int, columns: int) -> ctypes.c_void_p:
        sides = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
        return self._made("MatrixLayout", kind, *sides)

    def _made(self, what: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call(f"{what}Create", ctypes.byref(made), *arguments)
        return made

    def _set(self, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._call(
            "MatmulDescSetAttribute", self._what, ctypes.c_int(attribute), ctypes.byref(value), size
        )

    def _call(self, name: str, *arguments: Any) -> None:
        _checked(self._library, name, *arguments)


@cache
def _product(device: int, shape: _Shape) -> _Product:
    return _Product(device, shape)


@cache
def _handle(_device: int) -> ctypes.c_void_p:
    """Of the current device."""
    handle = ctypes.c_void_p()
    _checked(_library(), "Create", ctypes.byref(handle))
    return handle


@cache
def _library() -> ctypes.CDLL:
    major = (torch.version.cuda or "").partition(".")[0]
    windows = sys.platform == "win32"
    name = f"cublasLt64_{major}.dll" if windows else f"libcublasLt.so.{major}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise CublasError(f"{name} was not found: {error}") from error


def _checked(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    function: Callable[..., int] = getattr(library, f"cublasLt{name}")
    status = function(*arguments)
    if status == _OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"cublasLt{name}: CUBLAS_STATUS_ALLOC_FAILED")
    if status:
        raise CublasError(f"cublasLt{name}: status {status}")
