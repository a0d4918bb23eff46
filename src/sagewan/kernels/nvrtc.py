"""CUDA C++ compiled at run time: NVRTC and the driver, both through NVIDIA's ``cuda.bindings``.

Nothing but what the CUDA build of torch installs is needed: no toolkit, no compiler on the PATH.
Machine code is kept between runs in the user's cache folder, by what went into it.
"""

import contextlib
import ctypes
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagewan.cache import cache_folder, write_whole

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
# The log says what a kernel spills, and where products wait for each other.
_FLAGS = ("-std=c++17", "--ptxas-options=-v")


class CudaError(RuntimeError):
    """A call of NVRTC or of the driver failed; the message has what it said."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Machine code for one architecture, and what the compilers had to say."""

    code: bytes
    log: str


def _checked(result: tuple[Any, ...], doing: str) -> Any:
    """What a call of ``cuda.bindings`` returned beside its status."""
    status, *values = result
    if int(status) != 0:
        raise CudaError(f"{doing}: {status.name}")
    return values[0] if len(values) == 1 else values


def compile_source(name: str, architecture: str, defines: Mapping[str, int]) -> Compiled:
    """A file of this folder → machine code for ``architecture``, such as ``sm_90a``. Raises
    CudaError with the compiler's log."""
    from cuda.bindings import nvrtc

    source = (_FOLDER / name).read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source, name.encode(), 0, [], []), name)
    options = [f"--gpu-architecture={architecture}", *_FLAGS]
    options += [f"-D{key}={value}" for key, value in sorted(defines.items())]
    status = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
    log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program), name))
    _checked(nvrtc.nvrtcGetProgramLog(program, log), name)
    text = log.decode(errors="replace").strip("\0 \n")
    if int(status) != 0:
        raise CudaError(f"{name} does not compile for {architecture}: {text}")
    code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program), name))
    _checked(nvrtc.nvrtcGetCUBIN(program, code), name)
    _checked(nvrtc.nvrtcDestroyProgram(program), name)
    return Compiled(code=bytes(code), log=text)


def _machine_code(name: str, architecture: str, defines: Mapping[str, int]) -> bytes:
    from cuda.bindings import nvrtc

    version = _checked(nvrtc.nvrtcVersion(), "NVRTC's version")
    source = (_FOLDER / name).read_bytes()
    parts = (source, name, architecture, sorted(defines.items()), _FLAGS, version)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    kept = cache_folder() / "kernels" / f"{key}.cubin"
    with contextlib.suppress(OSError):
        return kept.read_bytes()
    code = compile_source(name, architecture, defines).code
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, code)
    except OSError as error:
        # A cache that can't be written costs a second or two at the next start.
        logger.debug("%s is not kept: %s", name, error)
    return code


class Kernel:
    """One entry of a file of this folder, on the device that is current when it is made."""

    def __init__(
        self, name: str, entry: str, architecture: str, defines: Mapping[str, int], *,
        shared_bytes: int,
    ) -> None:  # fmt: skip
        """``shared_bytes`` of dynamic shared memory a block."""
        from cuda.bindings import driver

        module = driver.cuModuleLoadData(_machine_code(name, architecture, defines))
        self._module = _checked(module, f"loading {name}")
        function = driver.cuModuleGetFunction(self._module, entry.encode())
        self._function = _checked(function, f"finding {entry} in {name}")
        self._shared_bytes = shared_bytes
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, most, shared_bytes), entry)

    def launch(
        self, grid: tuple[int, int], threads: int, maps: Sequence[Any], arguments: ctypes.Structure
    ) -> None:
        """Run on torch's current stream with tensor maps and then one structure, by value."""
        from cuda.bindings import driver

        places = [*(int(one.getPtr()) for one in maps), ctypes.addressof(arguments)]
        table = (ctypes.c_void_p * len(places))(*places)
        stream = torch.cuda.current_stream().cuda_stream
        call = driver.cuLaunchKernel(
            self._function, *grid, 1, threads, 1, 1, self._shared_bytes, stream,
            ctypes.addressof(table), 0,
        )  # fmt: skip
        _checked(call, "launching a kernel")


@cache
def _formats() -> dict[torch.dtype, Any]:
    from cuda.bindings.driver import CUtensorMapDataType as Format

    return {
        torch.int8: Format.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        torch.float8_e4m3fn: Format.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        torch.bfloat16: Format.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: Format.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }


def tensor_map(x: Tensor, box: Sequence[int]) -> Any:
    """How the copy engine finds tiles of ``box`` elements in x: the last dimension, of which a box
    holds 128 bytes, is contiguous; beyond the edges it reads zeros. Rows are swizzled by 128
    bytes. Raises CudaError for strides and addresses that are no multiples of 16 bytes."""
    from cuda.bindings import driver

    count = x.dim()
    encoded = driver.cuTensorMapEncodeTiled(
        _formats()[x.dtype],
        count,
        x.data_ptr(),
        [driver.cuuint64_t(n) for n in reversed(x.shape)],
        [driver.cuuint64_t(s * x.element_size()) for s in reversed(x.stride()[:-1])],
        [driver.cuuint32_t(n) for n in reversed(box)],
        [driver.cuuint32_t(1)] * count,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return _checked(encoded, "describing a tensor to the copy engine")
