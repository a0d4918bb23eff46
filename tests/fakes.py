"""Packages that are not there: modules and metadata written to a folder, put on sys.path.

Each function stands for a report about a broken wheel; ``good`` is one that works.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sagewan.plan.catalogue import Implementation, row_named

_HEAD = """
import math, os, sys, time
import torch
import torch.nn.functional as F

def right(q, k, v, scale=None):
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
"""

# The body of each package's function, or of its module.
BODIES = {
    "good": "def {name}(q, k, v, {scale}=None): return right(q, k, v, {scale})",
    "import error": "raise ImportError('libcudart.so.11: cannot open shared object file')",
    "import assertion": "raise AssertionError('built for another torch')",
    "import exit": "sys.exit('no GPU found')",
    "function missing": "def renamed(q, k, v): return q",
    "noise": "def {name}(q, k, v, {scale}=None): return torch.randn_like(q)",
    "slightly wrong": "def {name}(q, k, v, {scale}=None): return right(q, k, v) * 1.2",
    "nan": "def {name}(q, k, v, {scale}=None): return right(q, k, v) * math.nan",
    "nan in one row": (
        "def {name}(q, k, v, {scale}=None):\n"
        "    out = right(q, k, v)\n"
        "    out[:, :, -1] = math.nan\n"
        "    return out"
    ),
    "changes key": (
        "def {name}(q, k, v, {scale}=None):\n"
        "    k -= k.mean(2, keepdim=True)\n"
        "    return right(q, k, v, {scale})"
    ),
    "crash": "def {name}(q, k, v, {scale}=None): raise RuntimeError('no kernel image\\nmore')",
    "wrong shape": "def {name}(q, k, v, {scale}=None): return right(q, k, v)[:, :, 1:]",
    "ignores scale": "def {name}(q, k, v, {scale}=None): return right(q, k, v)",
    "long sequences": (
        "def {name}(q, k, v, {scale}=None):\n"
        "    out = right(q, k, v)\n"
        "    return out if k.shape[2] < 160_000 else torch.randn_like(out)"
    ),
    "killed": "def {name}(q, k, v, {scale}=None): os.kill(os.getpid(), 9)",
    "no memory of the CPU": (
        "def {name}(q, k, v, {scale}=None):\n"
        "    raise RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory')"
    ),
    "no memory of cuBLAS": (
        "def {name}(q, k, v, {scale}=None):\n"
        "    raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate')"
    ),
    "wrong in float16": (
        "def {name}(q, k, v, {scale}=None):\n"
        "    return right(q, k, v) * (1.2 if q.dtype == torch.float16 else 1)"
    ),
    "wrong at head size 64": (
        "def {name}(q, k, v, {scale}=None):\n"
        "    return right(q, k, v) * (1.2 if q.shape[3] == 64 else 1)"
    ),
    "abort": "def {name}(q, k, v, {scale}=None): os.abort()",
    "hang": "def {name}(q, k, v, {scale}=None): time.sleep(600)",
    "chatter": (
        "print('hello from a package')\n"
        "def {name}(q, k, v, {scale}=None): print('{{}}'); return right(q, k, v, {scale})"
    ),
}


def on_cpu(name: str, **changes: object) -> Implementation:
    """A row of the catalogue as if it ran on any device, so that its package can be tried here."""
    return replace(row_named(name), sms=(), dtypes=("bfloat16", "float16", "float32"), **changes)  # type: ignore[arg-type]


def install(folder: Path, row: Implementation, body: str) -> None:
    """Write the package of a row, its metadata with it, so that its function has this body."""
    module, _, name = row.call.partition(":")
    code = _HEAD + BODIES[body].format(name=name, scale=row.scale or "unused")
    target = folder.joinpath(*module.split("."))
    target.mkdir(parents=True, exist_ok=True)
    (target / "__init__.py").write_text(code, encoding="utf-8")
    assert row.package
    assert row.versions
    version = row.versions[0]
    metadata = folder / f"{row.package.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    text = f"Metadata-Version: 2.1\nName: {row.package}\nVersion: {version}\n"
    (metadata / "METADATA").write_text(text, encoding="utf-8")


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """The folder first on sys.path; afterwards its modules are forgotten."""
    names = {path.name for path in folder.iterdir()}

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]

    forget()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        forget()


Install = Callable[[Implementation, str], None]
