"""A product of FP8 rows, bias and GELU that writes FP8 rows, on Hopper (9.0), in CUDA C++ compiled
by NVRTC (``gelu_product.cu``): what is between a feed-forward's products is written once, as FP8.

The scale of a row must be known before the row is. A result is no larger than the length of its
row of the input times that of its row of the weight, and e4m3 has the same precision over fifteen
powers of two: so a bound does, though results are a seventieth of it.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels.fp8_attention import E4M3_MAX
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.kernels.nvrtc import Kernel, tensor_map

SOURCE = "gelu_product.cu"
M_TILE, N_TILE, K_TILE = 128, 256, 128
_THREADS = 384
# Sides of matrices whose rows the copy engine can read.
_SIDE = 16
# Rounding the rows of the input to e4m3 makes none longer by more.
_ROUNDED = 1.0 + 2.0**-4
_CHUNK = 1024
_P, _I = ctypes.c_void_p, ctypes.c_int


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the kernel is compiled: tiles on their way, and rows of tiles in a band of those at work
    at once."""

    stages: int = 4
    group: int = 16

    @property
    def shared_bytes(self) -> int:
        """The kernel's ``Shared``: tiles, what is to be written, and barriers."""
        total = self.stages * (M_TILE + N_TILE) * K_TILE + M_TILE * N_TILE + 16 * self.stages
        return -(-total // 1024) * 1024

    def defines(self) -> dict[str, int]:
        """What the kernel's source is compiled with."""
        return {
            "STAGES": self.stages,
            "GROUP": self.group,
            "SHARED_BYTES": self.shared_bytes,
        }


FORM = Form()


class _Arguments(ctypes.Structure):
    """``Arguments`` of the kernel."""

    _fields_ = (
        *((name, _P) for name in ("x_scale", "x_norm", "w_scale", "bias", "bound", "out_scale")),
        *((name, _I) for name in ("m", "n", "steps", "m_tiles", "n_tiles")),
    )


@cache
def _kernel(device: int, form: Form) -> Kernel:
    with torch.cuda.device(device):
        return Kernel(SOURCE, "product", "sm_90a", form.defines(), shared_bytes=form.shared_bytes)


def bound_of(weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Of an e4m3 weight [N, K] with scales [N] and its bias [N]: [2] float32, by the first of which
    the length of a row of the input is multiplied, and to which the second is added, so that the
    result is the scale of a row of the output in FP8."""
    parts = zip(weight.split(_CHUNK), scale.flatten().split(_CHUNK), strict=True)
    lengths = [data.float().norm(dim=1) * own for data, own in parts]
    longest = torch.cat(lengths).amax() * _ROUNDED
    most = longest.new_zeros(()) if bias is None else bias.float().abs().amax()
    return torch.stack([longest, most]) / E4M3_MAX


def gelu_product(
    x: Fp8Rows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, bound: Tensor
) -> Fp8Rows:
    """x [M, K] with its norm, e4m3 weight [N, K] with float32 scales [N], bias [N] bfloat16 or
    None, and :func:`bound_of` them → e4m3 rows [M, N] of the approximation of GELU by tanh of
    their product. Raises ShapeError for other layouts and sides that are no multiples of 16."""
    _check(x, weight, weight_scale, bias)
    (m, k), n = x.data.shape, weight.shape[0]
    out = Fp8Rows.empty(m, n, device=weight.device)
    bias = weight_scale.new_zeros(n, dtype=torch.bfloat16) if bias is None else bias
    m_tiles, n_tiles = -(-m // M_TILE), -(-n // N_TILE)
    arguments = _Arguments(
        *(
            int(t.data_ptr())
            for t in (x.scale, x.norm, weight_scale, bias, bound, out.scale)
            if t is not None
        ),
        *(m, n, -(-k // K_TILE), m_tiles, n_tiles),
    )
    maps = (
        tensor_map(x.data, (M_TILE, K_TILE)),
        tensor_map(weight, (N_TILE, K_TILE)),
        tensor_map(out.data, (M_TILE // 2, K_TILE)),
    )
    blocks = torch.cuda.get_device_properties(weight.device).multi_processor_count
    grid = min(blocks, m_tiles * n_tiles), 1
    with torch.cuda.device(weight.device):
        _kernel(weight.device.index, FORM).launch(grid, _THREADS, maps, arguments)
    return out


def _check(x: Fp8Rows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    n, k = weight.shape
    shapes = f"{list(x.data.shape)} by {[n, k]}"
    if x.norm is None:
        raise ShapeError(f"{shapes}: rows of unknown length; give them their norm")
    if x.data.dim() != 2 or x.data.shape[1] != k or n % _SIDE or k % _SIDE or not x.data.numel():
        raise ShapeError(f"{shapes}: give [M, K] by [N, K], of sides that are multiples of 16")
    given = (x.data, x.scale, x.norm, weight, weight_scale, *(() if bias is None else (bias,)))
    if not all(t.is_contiguous() for t in given) or weight_scale.numel() != n:
        raise ShapeError(f"{shapes}, {weight_scale.numel()} scales: give N, and no gaps")
    if bias is not None and (bias.shape != (n,) or bias.dtype != torch.bfloat16):
        raise ShapeError(f"a bias {list(bias.shape)} in {bias.dtype}: give [N] in bfloat16")
