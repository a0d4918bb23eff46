"""The Hopper kernel's own source, compiled for the CPU and run thread by thread."""

import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from sagewan.kernels import hopper_attention as hopper
from sagewan.kernels.hopper_attention import Form
from sagewan.kernels.prepared import PADDING, Columns, Prepared, Rows
from sagewan.kernels.query_key import LOG2E
from sagewan.reference import formats

HERE = Path(__file__).parent
Edit = Callable[[str], str]


class Map(ctypes.Structure):
    """``Map`` of block_on_cpu.h."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_longlong * 4),
        ("stride", ctypes.c_longlong * 4),
        ("rows", ctypes.c_int),
    )


def tensor_map(x: Tensor, box: Sequence[int]) -> Map:
    """In place of the driver's: as ``nvrtc.tensor_map``, with the tensor kept alive."""
    each = x.element_size()
    size = [x.shape[-1] * each, *reversed(x.shape[:-1])]
    stride = [s * each for s in reversed(x.stride())]
    four = ctypes.c_longlong * 4
    made = Map(x.data_ptr(), four(*size), four(*stride), box[-2])
    made.tensor = x
    return made


@cache
def library(form: Form, folder: Path, edit: Edit | None) -> ctypes.CDLL:
    text = (Path(hopper.__file__).parent / hopper.SOURCE).read_text()
    text = edit(text) if edit else text
    begin, end = text.index("// ---- PTX"), text.index("// ---- The copying warp")
    text = f'{text[:begin]}#define INSTEAD_OF_PTX\n#include "block_on_cpu.h"\n{text[end:]}'
    text = re.sub(r"extern __shared__ .* char memory\[\];", "", text).replace('extern "C" ', "")
    head, tail = (
        f'#undef {old}\n#define {new}\n#include "block_on_cpu.h"\n'
        for old, new in (("AFTER", "BEFORE"), ("BEFORE", "AFTER"))
    )
    text = f"{head}#undef BEFORE\n{text}\n#undef INSTEAD_OF_PTX\n{tail}"
    file = folder / f"{abs(hash((form, edit)))}.cpp"
    file.write_text(text)
    defines = [f"-D{name}={value}" for name, value in form.defines().items()]
    made = file.with_suffix(".so")
    options = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-pthread"]
    subprocess.run(["g++", *options, *defines, f"-I{HERE}", file, "-o", made], check=True)
    return ctypes.CDLL(str(made))


def attend(
    prepared: Prepared[Rows, Any], folder: Path, *, edit: Edit | None = None, **options: Any
) -> Any:
    """``hopper_attention.attend`` on CPU tensors; ``edit`` changes the source first."""

    class Kernel:
        def __init__(self, form: Form) -> None:
            self.form = form

        def launch(
            self, grid: tuple[int, int], _: int, maps: Sequence[Map], arguments: Any
        ) -> None:
            run = library(self.form, folder, edit).run
            run(*grid, (Map * 3)(*maps), ctypes.byref(arguments))

    with (
        mock.patch.object(hopper, "tensor_map", tensor_map),
        mock.patch.object(hopper, "_kernel", lambda _, form: Kernel(form)),
        mock.patch.object(torch.cuda, "device", mock.MagicMock()),
    ):
        return hopper.attend(prepared, **options)


def prepare(
    mode: str, q: Tensor, k: Tensor, v: Tensor, *, keys_per_scale: int | None = None
) -> Prepared[Rows, Any]:
    """What ``prepare_…`` of a mode gives, by the formulas of the reference; or with a scale for so
    many keys."""
    scale = q.shape[3] ** -0.5
    smoothed = mode != "sageattn"
    scaled, centred = q.float() * scale * LOG2E, k.float() - k.float().mean(2, keepdim=True)
    q_mean = scaled.mean(2, keepdim=True) * smoothed
    turn = formats.rotate if smoothed else torch.clone
    groups = q.shape[1] // k.shape[1]
    bias = q_mean @ centred.repeat_interleave(groups, 1).mT
    removed = q.float() @ k.float().mean(2, keepdim=True).repeat_interleave(groups, 1).mT * scale
    queries = _rows(turn(scaled - q_mean), removed.squeeze(3))
    bias = bias.squeeze(2) if smoothed else None
    block = keys_per_scale or (128 if mode == "sageattn_3_fp8" else 64)
    keys = _rows(turn(centred), bias, block, along=mode == "sageattn_3")
    return Prepared(
        q=queries,
        k=keys,
        v=_columns(v) if mode == "sageattn_3_fp8" else v,
        queries=q.shape[2],
        keys=k.shape[2],
        head_dim=q.shape[3],
        dtype=q.dtype,
    )


def _rows(x: Tensor, dots: Tensor | None, block: int = 64, *, along: bool = False) -> Rows:
    padding = -x.shape[2] % PADDING
    scaled = formats.int8(F.pad(x, (0, 0, 0, padding)), block, along=along)
    return Rows(
        data=scaled.data.to(torch.int8),
        scale=scaled.scale.squeeze(3).contiguous(),
        rows_per_scale=block,
        dots=None if dots is None else F.pad(dots, (0, padding)),
    )


def _columns(v: Tensor) -> Columns:
    scaled = formats.e4m3_per_channel(F.pad(v.float(), (0, 0, 0, -v.shape[2] % PADDING)))
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    stored = scaled.data.mT.unflatten(3, (-1, 16))[..., order].flatten(3)
    return Columns(data=stored.to(torch.float8_e4m3fn), scale=scaled.scale.squeeze(2).contiguous())
