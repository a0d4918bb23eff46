"""Ahead-of-time compilation of just what a launcher would launch, for a GPU that is not here."""

import re
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from sagewan.kernels import (
    fp4_attention,
    fp8_attention,
    fp8_linear,
    hopper_prepare,
    int8_attention,
    nvfp4_unpack,
    prepare,
    prepare_fp4,
    thin_linear,
    token_rows,
)
from sagewan.kernels import launch as launching

# Bytes of shared memory that one block may have.
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}
_LAUNCHERS: tuple[Any, ...] = (
    prepare,
    prepare_fp4,
    int8_attention,
    fp8_attention,
    fp4_attention,
    fp8_linear,
    nvfp4_unpack,
    thin_linear,
    token_rows,
    hopper_prepare,
    launching,
)
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    arguments: Mapping[str, object]
    schedule: launching.Schedule

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Built:
    """A compiled kernel and what its assembler said."""

    launch: Launch
    sm: int
    compiled: Any

    @property
    def ptx(self) -> str:
        return str(self.compiled.asm["ptx"])

    @property
    def shared(self) -> int:
        return int(self.compiled.metadata.shared)

    @cached_property
    def spilled(self) -> int:
        """Bytes that the assembler spills to memory a thread."""
        usage = assembled(self.ptx, self.sm)
        return sum(int(size) for size in re.findall(r"(\d+) bytes spill", usage))

    def products(self) -> set[str]:
        """The tensor-core instructions, such as ``wgmma.mma_async.sync.aligned.m64n64k32.s32…``."""
        return set(self.all_products())

    def all_products(self) -> list[str]:
        """Every place of a tensor-core instruction in the program."""
        return re.findall(r"^\s*(?:@\S+ )?((?:wg)?mma\S*|tcgen05\.mma\S*)", self.ptx, re.M)


def record(sm: int, run: Callable[[], object]) -> list[Launch]:
    """What ``run`` would launch on a GPU of this compute capability. Tensors may be on ``meta``."""
    launches = []

    def capability(_: object) -> int:
        return sm

    def note(kernel: Any, _: object, __: object, arguments: Any, schedule: Any) -> None:
        launches.append(Launch(kernel, arguments, schedule))

    with ExitStack() as stack:
        for module in _LAUNCHERS:
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", note))
            if hasattr(module, "compute_capability"):
                stack.enter_context(mock.patch.object(module, "compute_capability", capability))
        run()
    return launches


def build(launch: Launch, sm: int) -> Built:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        known = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (known and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[index,] = _TYPES[value.dtype], _DIVISIBLE
        elif isinstance(value, TensorDescriptor):
            kind = _TYPES[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{kind}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            assert type(value) is int, (name, value)
            signature[name] = "i32" if value < 2**31 else "i64"
            if known and value % 16 == 0:
                attributes[index,] = _DIVISIBLE
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {
        "num_warps": launch.schedule.warps,
        "num_stages": launch.schedule.stages,
        "maxnreg": launch.schedule.registers,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return Built(launch, sm, compiled)


def assembled(ptx: str, sm: int) -> str:
    """What ptxas says of the registers and spills of a kernel."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    tool = tools / (
        "ptxas-blackwell" if sm >= 100 and (tools / "ptxas-blackwell").exists() else "ptxas"
    )
    target = re.search(r"^\.target (\S+?),?\s*(?:,.*)?$", ptx, re.M)
    assert target
    command = [tool, "-v", f"--gpu-name={target.group(1)}", "-o", "/dev/null", "-"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True)
    return done.stderr
