"""The product that writes GELU as FP8, by its own source on a CPU, beside the formula; and what it
refuses."""

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sagewan.checkpoint.quantize import pack
from sagewan.errors import ShapeError
from sagewan.kernels import gelu_product as module
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.kernels.gelu_product import Form, bound_of, gelu_product
from sagewan.reference import formats
from tests.kernels.hopper_on_cpu import Map, tensor_map

HERE = Path(__file__).parent
on_linux = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux"
)
FORM = Form(stages=3, group=2)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    text = (Path(module.__file__).parent / module.SOURCE).read_text()
    begin, end = text.index("// ---- PTX"), text.index("// ---- The product")
    both = '#include "block_on_cpu.h"\n#include "product_on_cpu.h"\n'
    own = '#include "product_on_cpu.h"\n'
    # Of attention's products, which are in that header too.
    others = "typedef long long i64;\n#define V_FORMAT 0\n#define V_BYTES 0\n"
    text = (
        f"{text[:begin]}#define INSTEAD_OF_PTX\n{others}{both}#undef INSTEAD_OF_PTX\n{text[end:]}"
    )
    text = re.sub(r"extern __shared__ .* char memory\[\];", "", text).replace('extern "C" ', "")
    whole = f"#define BEFORE\n{both}#undef BEFORE\n{text}\n#define AFTER\n{own}"
    folder = tmp_path_factory.mktemp("product")
    (folder / "product.cpp").write_text(whole)
    options = ["-O2", "-std=c++17", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-pthread"]
    options += [f"-I{HERE}", *(f"-D{name}={value}" for name, value in FORM.defines().items())]
    command = ["g++", *options, folder / "product.cpp", "-o", folder / "product.so"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "product.so"))


def on_cpu(library: ctypes.CDLL, blocks: int, *arguments: Any) -> Fp8Rows:
    """:func:`gelu_product` by the library, on so many blocks."""

    class Kernel:
        def launch(
            self, grid: tuple[int, int], threads: int, maps: Sequence[Map], values: Any
        ) -> None:
            assert threads == 384
            library.run(*grid, (Map * 3)(*maps), ctypes.byref(values))

    properties = mock.MagicMock(multi_processor_count=blocks)
    with (
        mock.patch.object(module, "FORM", FORM),
        mock.patch.object(module, "_kernel", return_value=Kernel()),
        mock.patch.object(module, "tensor_map", tensor_map),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "device", mock.MagicMock()),
    ):
        return gelu_product(*arguments)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(x: Tensor) -> Fp8Rows:
    rounded = formats.e4m3_per_row(x)
    data = rounded.data.to(torch.float8_e4m3fn)
    return Fp8Rows(data, rounded.scale, x.norm(dim=1, keepdim=True))


@on_linux
@pytest.mark.parametrize(
    ("sides", "blocks"), [((140, 272, 144), 2), ((128, 256, 512), 1), ((5, 16, 16), 4)]
)
def test_it_is_gelu_of_the_product(
    sides: tuple[int, int, int], blocks: int, library: ctypes.CDLL
) -> None:
    m, n, k = sides
    x = rows_of(random(m, k) * torch.logspace(-1, 1, m)[:, None])
    weight = random(n, k, seed=1) * k**-0.5
    weight[: n // 4] *= 20
    packed = pack(weight, "float8_e4m3fn")
    bias = (0.3 * random(n, seed=2)).bfloat16()
    scale = packed.tensors["scale"]
    bound = bound_of(packed.data, scale, bias)
    found = on_cpu(library, blocks, x, packed.data, scale, bias, bound)
    product = F.linear(x.data.float() * x.scale, packed.data.float() * scale, bias.float())
    exact = F.gelu(product, approximate="tanh")
    assert float(found.data.float().abs().max()) < 448
    errors = (found.data.float() * found.scale - exact).norm(dim=1) / exact.norm(dim=1)
    # A scale of its own for each row costs .023, where no row of the weight is twenty times as long
    # as others; a tile or a scale in the wrong place costs a tenth and more of some rows.
    assert float(errors.square().mean().sqrt()) < 0.03
    assert float(errors.max()) < 0.05


@pytest.mark.parametrize(("large", "bias"), [(2.0, None), (50.0, 3.0)])
def test_no_result_is_beyond_its_bound(large: float, bias: float | None) -> None:
    """Not even where a row of the input and one of the weight are alike."""
    x = random(40, 96)
    weight = random(32, 96, seed=1)
    weight[3] = large * x[7]
    packed = pack(weight, "float8_e4m3fn")
    offset = None if bias is None else torch.full((32,), bias)
    longest, most = bound_of(packed.data, packed.tensors["scale"], offset)
    rows = rows_of(x)
    values = packed.data.float() * packed.tensors["scale"]
    product = F.linear(rows.data.float() * rows.scale, values, offset)
    assert rows.norm is not None
    ratio = product.abs().amax(1) / (rows.norm[:, 0] * longest + most) / 448
    assert 0.9 < float(ratio[7]) <= 1
    assert float(ratio.max()) <= 1


def test_what_it_does_not_take_is_refused() -> None:
    x, weight = rows_of(random(4, 32)), random(16, 32).to(torch.float8_e4m3fn)
    scale, bound = torch.ones(16, 1), torch.ones(2)
    with pytest.raises(ShapeError, match="norm"):
        gelu_product(Fp8Rows(x.data, x.scale), weight, scale, None, bound)
    with pytest.raises(ShapeError, match="multiples of 16"):
        gelu_product(x, weight[:, :16].contiguous(), scale, None, bound)
    with pytest.raises(ShapeError, match="give N"):
        gelu_product(x, weight, scale[:8], None, bound)
    with pytest.raises(ShapeError, match="bfloat16"):
        gelu_product(x, weight, scale, torch.ones(16), bound)
