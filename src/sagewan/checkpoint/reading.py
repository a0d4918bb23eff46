"""One stored weight → a tensor, or :class:`Packed` as the rest of the program keeps it.

ComfyUI's and LightX2V's FP4 files mean the same numbers in two ways; both come out as ComfyUI's.
"""

import torch
from torch import Tensor

from sagewan.checkpoint.layers import FP8, Weight
from sagewan.checkpoint.packed import Packed
from sagewan.checkpoint.tensors import Stored
from sagewan.errors import CheckpointError


def read_weight(weight: Weight) -> "Tensor | Packed":
    """A plain tensor in the file's dtype, or the packed weight with scales that can be right."""
    data = weight.data.tensor()
    if not weight.is_packed:
        return data
    rows, columns = weight.shape
    scale, tensor_scale = _scales(weight)
    if weight.format == "nvfp4" and "weight_scale_2" not in weight.beside:
        data = (data >> 4) | (data << 4)
    pre_scale = weight.beside.get("pre_quant_scale")
    return Packed(
        format=weight.format,
        shape=(rows, columns),
        data=data,
        scale=scale,
        tensor_scale=tensor_scale,
        pre_scale=None if pre_scale is None else pre_scale.tensor().float().view(-1),
        full_precision=weight.full_precision,
    )


def _scales(weight: Weight) -> tuple[Tensor | None, Tensor | None]:
    """The scale and, for NVFP4, the scale of the whole tensor."""
    if weight.format.startswith("gguf:"):
        return None, None
    if weight.format in (*FP8, "int8"):
        if weight.scale is None:
            return torch.ones(()), None  # cast without a scale
        scale = weight.scale.tensor().float()
        return scale.view(()) if scale.numel() == 1 else scale.view(-1, 1), None
    return _block_scales(weight), _tensor_scale(weight) if weight.format == "nvfp4" else None


def _block_scales(weight: Weight) -> Tensor:
    stored = weight.scale
    if stored is None:
        raise CheckpointError(f"{weight.data.file.path}: {weight.data.name} has no scales")
    scale = stored.tensor()
    rows, columns = weight.shape
    exponents = weight.format == "mxfp8"
    if exponents:
        scale = scale.view(torch.float8_e8m0fnu)
        broken = scale.view(torch.uint8) == 0xFF
    else:
        broken = (scale.view(torch.uint8) & 0x7F == 0x7F) | (scale.view(torch.uint8) > 0x80)
    if bool(broken.any()):
        raise CheckpointError(
            f"{stored.file.path}: {stored.name} holds scales that are NaN or negative, so the file "
            "is damaged: fetch it again"
        )
    group = 32 if exponents else 16
    return scale.view(-(-rows // 128) * 128, -(-(columns // group) // 4) * 4)


def _tensor_scale(weight: Weight) -> Tensor:
    def value(name: str) -> Tensor:
        stored: Stored = weight.beside[name]
        return stored.tensor().float().view(())

    if "weight_scale_2" in weight.beside:
        return value("weight_scale_2")
    if "weight_global_scale" in weight.beside:
        return 1 / value("weight_global_scale")
    return value("alpha") * value("input_global_scale")
