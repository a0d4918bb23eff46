"""What the pass over Q and K computes on Hopper, by its own source on a CPU, beside the formulas:
norm over all heads, positions, smoothing, rotation and INT8."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sagewan.kernels import hopper_prepare
from sagewan.kernels.hopper_prepare import Position, int8_rows
from sagewan.kernels.prepare import Recipe
from sagewan.reference import formats
from sagewan.reference.attention import relative_error

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux"
)
HERE = Path(__file__).parent
# What is the GPU's alone, in the header that stands in for it.
REPLACED = ("u32 rounded(", "void multiply(")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    text = (Path(hopper_prepare.__file__).parent / hopper_prepare.SOURCE).read_text()
    for name in REPLACED:
        pattern = rf"__device__ __forceinline__ {re.escape(name)}.*?\n}}\n"
        text, count = re.subn(pattern, "", text, flags=re.DOTALL)
        assert count == 1, name
    text = text.replace('extern "C" ', "")
    include = '#include "rows_on_cpu.h"\n'
    whole = f"#define BEFORE\n{include}#undef BEFORE\n{text}\n#define AFTER\n{include}"
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "prepare.cpp").write_text(whole)
    defines = hopper_prepare.defines(torch.bfloat16).items()
    options = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-pthread", f"-I{HERE}"]
    options += [f"-D{name}={value}" for name, value in defines]
    command = ["g++", *options, folder / "prepare.cpp", "-o", folder / "prepare.so"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "prepare.so"))


def on_cpu(library: ctypes.CDLL, group: int, *arguments: Any, **options: Any) -> Any:
    """:func:`int8_rows` by the library, so many heads to a block."""

    class Kernel:
        def launch(self, grid: tuple[int, int], threads: int, maps: tuple[()], values: Any) -> None:
            assert threads == 128
            library.run(*grid, ctypes.byref(values))

    with (
        mock.patch.object(hopper_prepare, "_kernel", return_value=Kernel()),
        mock.patch.object(hopper_prepare, "_heads_of_a_block", return_value=group),
        mock.patch.object(torch.cuda, "device", mock.MagicMock()),
    ):
        return int8_rows(*arguments, **options)


@pytest.mark.parametrize("of", ["keys", "queries"])
def test_it_is_norm_positions_smoothing_rotation_and_int8(of: str, library: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # 70 tokens of two videos are a block that is whole and one that is not.
    x = (normal(2, 70, 3, 128) + normal(1, 1, 3, 128)).bfloat16()
    weight, angles = 1 + 0.1 * normal(3 * 128), 3 * normal(1, 70, 1, 64)
    cos, sin = (f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    factors = (x.float().square().mean((2, 3)) + 1e-6).rsqrt()
    normed = x.float() * factors[..., None, None] * weight.view(3, 128)
    pairs = torch.view_as_complex(normed.unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    mean, other = turned.mean(1), 0.1 * normal(2, 3, 128)
    smoothed = (turned - mean[:, None]).transpose(1, 2)
    recipe = Recipe(factor=0.1 if of == "queries" else 1.0, dot_factor=0.3, smoothed=True)
    asked = {"other": other} if of == "keys" else {"lowest": torch.full((2, 3), 0.004)}
    position = Position(weight=weight, eps=1e-6, cos=cos, sin=sin)
    rows = on_cpu(library, 2, x, factors, position, recipe, minus=mean, **asked)
    exact = F.pad(recipe.factor * formats.rotate(smoothed), (0, 0, 0, 128 - 70))
    scale = formats.int8(exact, 64).scale.clamp(min=0.004 if of == "queries" else 0)
    found, expected = rows.data * rows.scale[..., None], (exact / scale).round() * scale
    # In 16 bit before the rotation, where the formulas round once.
    assert relative_error(found, exact) < 1.05 * relative_error(expected, exact) < 0.015
    assert not rows.data[:, :, 70:].any()
    assert torch.allclose(rows.scale, scale.squeeze(3), rtol=2e-3)
    assert rows.scale.unflatten(2, (2, 64)).diff(dim=3).abs().max() == 0
    if of == "keys":
        dots = (smoothed @ other[..., None]).squeeze(3) * recipe.dot_factor
        assert torch.allclose(rows.dots, F.pad(dots, (0, 128 - 70)), rtol=1e-4, atol=1e-5)
