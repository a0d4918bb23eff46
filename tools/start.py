"""Set up sagewan in its own folder and open it: what start.sh and start.bat call.

Only the standard library, since nothing is installed yet. torch comes from PyTorch's own index,
chosen by the NVIDIA driver: PyPI has no CUDA build for Windows, and its Linux build wants a driver
that not everyone has. ``SAGEWAN_TORCH_INDEX`` overrides the choice; empty means pip's own.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
INDEX = "https://download.pytorch.org/whl/"
MIN_PYTHON = (3, 11)

# The oldest driver branch of each CUDA build (CUDA release notes, table of driver versions), and
# the compute capabilities its binaries hold. CUDA 12.6 predates Blackwell, 13 dropped Volta.
CUDA_13 = ("cu130", 580, 75, 999)
CUDA_12 = ("cu126", 525, 50, 90)


class Gpu(NamedTuple):
    name: str
    driver: int
    sm: int


class Start(NamedTuple):
    """``index`` is the name of PyTorch's index; ``advice`` what the user should know, or empty."""

    index: str
    advice: str


def choose_index(gpus: list[Gpu]) -> Start:
    """The torch build for a machine: by its driver and its newest GPU."""
    if not gpus:
        return Start("cpu", "No NVIDIA GPU was found: sagewan will run on the CPU, slowly.")
    gpu = max(gpus, key=lambda found: found.sm)
    for index, driver, oldest, newest in (CUDA_13, CUDA_12):
        if gpu.driver >= driver and oldest <= gpu.sm <= newest:
            return Start(index, "")
    needed = CUDA_13[1] if gpu.sm > CUDA_12[3] else CUDA_12[1]
    if gpu.driver < needed:
        return Start(
            "cpu",
            f"{gpu.name} needs NVIDIA driver {needed} or newer, and {gpu.driver} is installed: "
            "update the driver, delete the folder .venv and start again. Until then sagewan runs "
            "on the CPU, slowly.",
        )
    return Start("cpu", f"{gpu.name} is too old for current torch: sagewan will run on the CPU.")


def parse_gpus(listing: str) -> list[Gpu]:
    """Lines of ``name, driver_version, compute_cap`` as nvidia-smi prints them; others skipped."""
    gpus = []
    for line in listing.splitlines():
        parts = [part.strip() for part in line.rsplit(",", 2)]
        try:
            name, driver, capability = parts
            major, minor = capability.split(".")
            gpus.append(Gpu(name, int(driver.split(".")[0]), int(major) * 10 + int(minor)))
        except ValueError:
            continue
    return gpus


def find_gpus() -> list[Gpu]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(listing.stdout)


def install_commands(python: Path, index: str | None) -> list[list[str]]:
    """The pip calls of a first start: torch from its index, then the product."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    torch = [*pip, "torch"] + (["--index-url", INDEX + index] if index else [])
    return [torch, [*pip, "-e", str(ROOT)]]


def set_up(folder: Path) -> Path:
    """Make the environment if it is not ready; return its Python."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = folder / "started"
    made_for = fingerprint()
    if ready.exists() and ready.read_text(encoding="utf-8") == made_for:
        return python
    if ready.exists():
        # A newer version of sagewan: torch stays, what is new is added.
        print("Bringing this folder up to date …", flush=True)
        subprocess.run(install_commands(python, None)[1], check=True)
        ready.write_text(made_for, encoding="utf-8")
        return python
    index = os.environ.get("SAGEWAN_TORCH_INDEX")
    if index is None:
        index, advice = choose_index(find_gpus())
        if advice:
            print(advice, flush=True)
    print("Setting up, once; this takes some minutes …", flush=True)
    # By links, as `python -m venv` does: a copy onto the links of an environment that is there
    # already, such as `make`'s, would be written over the interpreter that they lead to.
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    for command in install_commands(python, index):
        subprocess.run(command, check=True)
    ready.write_text(made_for, encoding="utf-8")
    return python


def fingerprint() -> str:
    """What an environment was made for: another list of packages asks for another."""
    texts = ((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    return hashlib.sha256(b"".join(texts)).hexdigest()


def main(arguments: list[str]) -> int:
    if sys.version_info < MIN_PYTHON:
        needed = ".".join(map(str, MIN_PYTHON))
        print(f"sagewan needs Python {needed} or newer, and this is {sys.version.split()[0]}.")
        return 2
    try:
        python = set_up(Path(os.environ.get("SAGEWAN_VENV", ROOT / ".venv")))
    except subprocess.CalledProcessError as failure:
        print(f"Setting up failed (exit {failure.returncode}): {' '.join(failure.cmd)}")
        return 1
    command = [str(python), "-m", "sagewan", *(arguments or ["ui"])]
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 0  # It went to the app as well, which has ended in order.


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
