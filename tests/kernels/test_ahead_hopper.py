"""The Hopper kernel compiles without a GPU, to the instructions it promises and nothing slower."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
import triton

from sagewan.kernels import gelu_product, hopper_attention, hopper_prepare
from sagewan.kernels.hopper_attention import Form

pytest.importorskip(
    "cuda.bindings.nvrtc", reason="needs NVIDIA's compiler, which has no macOS build"
)
from sagewan.kernels.nvrtc import Compiled, CudaError, compile_source

FORMS = (
    Form(torch.float8_e4m3fn),
    Form(torch.float8_e4m3fn, keys_per_scale=128),
    Form(torch.bfloat16),
    Form(torch.float16),
)
PRODUCT = {
    torch.float8_e4m3fn: "QGMMA.64x136x32.F32.E4M3.E4M3",
    torch.bfloat16: "HGMMA.64x128x16.F32.BF16",
    torch.float16: "HGMMA.64x128x16.F32",
}


@cache
def built(form: Form) -> Compiled:
    return compile_source(hopper_attention.SOURCE, "sm_90a", form.defines())


@cache
def instructions(form: Form, folder: Path) -> tuple[str, ...]:
    """The attention kernel's machine code, an instruction a line."""
    return disassembled(built(form), folder)


def disassembled(made: Compiled, folder: Path) -> tuple[str, ...]:
    """Machine code, an instruction a line, as Triton's own disassembler prints it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(made.code)
    program = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if program is None:
        pytest.skip("no disassembler")
    printed = subprocess.run([program, "-sass", file], capture_output=True, text=True, check=True)
    return tuple(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);", printed.stdout, re.MULTILINE))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_both_products_are_hopper_s_own(form: Form, tmp_path: Path) -> None:
    code = instructions(form, tmp_path)
    products = [line for line in code if "MMA" in line]
    assert any("IGMMA.64x128x32.S8.S8" in line for line in products)
    assert any(PRODUCT[form.v_dtype] in line for line in products)
    # A product in any other form would be a slow path.
    assert all(
        "IGMMA.64x128x32.S8.S8" in line or PRODUCT[form.v_dtype] in line for line in products
    )
    assert sum("MUFU.EX2" in line for line in code) > 32


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_are_not_serialised_and_nothing_spills_among_them(
    form: Form, tmp_path: Path
) -> None:
    assert "wgmma" not in built(form).log, built(form).log
    code = instructions(form, tmp_path)
    places = [i for i, line in enumerate(code) if "GMMA" in line]
    loop = code[places[4] : places[-1]]  # behind the first Q·Kᵀ: the loop over the keys
    assert not [line for line in loop if re.search(r"\b(LDL|STL)\b", line)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_shared_memory_fits_the_architecture(form: Form) -> None:
    # The source asserts that the launcher counts it right; 227 KB is what a block may have.
    assert form.shared_bytes <= 227 * 1024
    wrong = {**form.defines(), "SHARED_BYTES": 1024}
    with pytest.raises(CudaError, match="the launcher asks for what this takes"):
        compile_source(hopper_attention.SOURCE, "sm_90a", wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_preparation_of_projections_compiles(dtype: torch.dtype) -> None:
    made = compile_source(hopper_prepare.SOURCE, "sm_90a", hopper_prepare.defines(dtype))
    used = re.search(r"Used (\d+) registers", made.log)
    # Three blocks of 128 threads share a multiprocessor's 65,536.
    assert used
    assert int(used[1]) <= 168
    spilled = re.search(r"(\d+) bytes spill stores", made.log)
    assert spilled
    assert int(spilled[1]) <= 128


def test_the_product_before_gelu_keeps_its_sums_in_registers(tmp_path: Path) -> None:
    made = compile_source(gelu_product.SOURCE, "sm_90a", gelu_product.FORM.defines())
    assert "0 bytes spill stores, 0 bytes spill loads" in made.log
    # The assembler would say so if it made products wait for one another.
    assert "wgmma" not in made.log
    assert gelu_product.FORM.shared_bytes <= 227 * 1024
    products = [line for line in disassembled(made, tmp_path) if "GMMA" in line]
    assert products
    assert all("QGMMA.64x256x32.F32.E4M3.E4M3" in line for line in products)
