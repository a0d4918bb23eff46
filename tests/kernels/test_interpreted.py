"""Runs ``interpreted.py`` in a process of its own: Triton decides at its import to interpret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "file", ["interpreted.py", "interpreted_linear.py", "interpreted_block.py"]
)
# A minute of two idle cores; the limit is for busy ones.
@pytest.mark.timeout(900)
def test_kernels_under_the_interpreter(file: str) -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", here / file, "-p", "no:cacheprovider"],
        cwd=here.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
