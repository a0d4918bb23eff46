"""One quantised weight, as a file holds it and as it is kept in memory."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sagewan.errors import CheckpointError

FP8_DTYPES = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
GGUF = "gguf:"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight of ``shape`` (N, K) in a low precision.

    ========================  =====================================  =============================
    format                    data                                   scale
    ========================  =====================================  =============================
    float8_e4m3fn, …_e5m2     that dtype [N, K]                      float32 [] or [N, 1]
    int8                      int8 [N, K]                            float32 [] or [N, 1]
    nvfp4                     uint8 [N', K'/2], high nibble first,   e4m3 [N'', K''/16] in cuBLAS's
                              N' and K' rounded up to 16             swizzle, N'' to 128, K'' to 64
    mxfp8                     e4m3 [N', K'], rounded up to 32        e8m0 [N'', K''/32], the same
    gguf:TYPE                 uint8 [N, bytes of a row]              None
    ========================  =====================================  =============================

    ``tensor_scale`` is NVFP4's factor of the whole tensor, float32 []. ``pre_scale`` [K] float32
    multiplies the layer's input before the weight does (Comfy's ``pre_quant_scale``).
    ``full_precision`` is the file's word that this layer multiplies in 16 bit.
    """

    format: str
    shape: tuple[int, int]
    data: Tensor
    scale: Tensor | None = None
    tensor_scale: Tensor | None = None
    pre_scale: Tensor | None = None
    full_precision: bool = False

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field, those that it has."""
        fields = ("data", "scale", "tensor_scale", "pre_scale")
        found = {name: getattr(self, name) for name in fields}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device | str) -> "Packed":
        """The same weight on another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in self.tensors.items()}
        return replace(self, **moved)


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in ``dtype``, rounded to it once, ``pre_scale`` multiplied in."""
    if packed.pre_scale is not None:
        weight = unpack(replace(packed, pre_scale=None), torch.float32) * packed.pre_scale
        return weight.to(dtype)
    if packed.format in FP8_DTYPES or packed.format == "int8":
        # Every dtype holds the 8 bits exactly; multiplied in place by a matrix (a bare number would
        # be rounded first), no float32 copy four times the weight's size is made.
        return packed.data.to(dtype).mul_(_needed(packed, "scale").view(-1, 1))
    return _unpacked(packed).to(dtype)


def _unpacked(packed: Packed) -> Tensor:
    """float32 [N, K]."""
    from sagewan.checkpoint import kitchen

    rows, columns = packed.shape
    if packed.format == "nvfp4":
        scales = _needed(packed, "scale"), _needed(packed, "tensor_scale")
        return kitchen.unpack_nvfp4(packed.data, *scales)[:rows, :columns]
    if packed.format == "mxfp8":
        return kitchen.unpack_mxfp8(packed.data, _needed(packed, "scale"))[:rows, :columns]
    if packed.format.startswith(GGUF):
        from sagewan.checkpoint.gguf_unpack import unpack_gguf

        return unpack_gguf(packed.data, packed.format.removeprefix(GGUF))
    raise CheckpointError(f"weights in the format {packed.format} are not read by this version")


def _needed(packed: Packed, field: str) -> Tensor:
    tensor: Tensor | None = getattr(packed, field)
    if tensor is None:
        raise CheckpointError(f"a weight in {packed.format} has no {field}: fetch the file again")
    return tensor
