"""Some of the random problems of ``benchmarks/prove.py``, for each of our rows that runs here."""

import pytest
import torch

from benchmarks.prove import ours, prove
from sagewan.plan.catalogue import ROWS, Implementation

pytestmark = pytest.mark.gpu
OURS = [row for row in ROWS if row.call.startswith("sagewan.kernels.")]


@pytest.mark.parametrize("row", OURS, ids=lambda row: row.name)
def test_random_problems_are_right(row: Implementation) -> None:
    major, minor = torch.cuda.get_device_capability()
    if row not in ours(10 * major + minor):
        pytest.skip("this GPU is not in the row's list")
    wrong = [one for one in prove(row, range(2, 32), "cuda") if one.wrong]
    assert not wrong, wrong
