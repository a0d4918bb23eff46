"""One bound for all of an output is as good a scale for FP8 as each row's largest value."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sagewan.attention.problems import Trial
from sagewan.kernels.hopper_attention import output_scale
from sagewan.kernels.prepared import Columns, Prepared, Rows
from sagewan.plan.catalogue import Problem
from sagewan.reference import formats

FP32 = Problem(head_dim=128, dtype="float32")


def bound(v: Tensor) -> Tensor:
    """What :func:`output_scale` makes of V [B, H, M, D]."""
    scale = v.abs().amax(2) / formats.E4M3_MAX
    nothing = torch.empty(0)
    rows = Rows(data=nothing, scale=nothing, rows_per_scale=64)
    columns = Columns(data=nothing, scale=scale)
    prepared = Prepared(
        q=rows, k=rows, v=columns, queries=0, keys=0, head_dim=0, dtype=torch.bfloat16
    )
    return output_scale(prepared)


def rounding(out: Tensor, scale: Tensor) -> float:
    return float((formats.e4m3(out / scale) * scale - out).norm() / out.norm())


def told_apart(v: Tensor, out: Tensor) -> tuple[float, float]:
    """How much is lost with the bound, and with a scale for each row of all heads."""
    tokens = out.transpose(1, 2).flatten(2)
    return rounding(tokens, bound(v).view(-1, 1, 1)), rounding(
        tokens, formats.e4m3_per_row(tokens).scale
    )


@pytest.mark.parametrize("family", ["bias", "local"])
def test_it_costs_no_more_than_a_scale_for_each_row(family: str) -> None:
    q, k, v = Trial(family=family, queries=1000, keys=1000, batch=2).inputs(FP32, "cpu")
    v[1] *= 100  # Each video has its own.
    found, usual = told_apart(v, F.scaled_dot_product_attention(q, k, v))
    assert found < 1.02 * usual < 0.03


def test_not_even_where_all_keys_count_alike_and_one_value_stands_out() -> None:
    v = torch.randn(1, 2, 30_000, 128, generator=torch.Generator().manual_seed(0))
    v[0, 0, 17, 3] = 60.0
    found, usual = told_apart(v, v.mean(2, keepdim=True))
    assert found < 1.1 * usual < 0.035


def test_nothing_is_beyond_what_the_format_holds() -> None:
    _, _, v = Trial(family="bias", queries=1, keys=300).inputs(FP32, "cpu")
    # The largest output there can be: a query that attends to one key alone.
    assert float((v / bound(v).view(-1, 1, 1, 1)).abs().max()) <= formats.E4M3_MAX * 1.0001
