"""The float64 formula against torch's own attention and against itself."""

import math

import pytest
import torch

from sagewan.reference import attention as reference
from sagewan.reference.attention import (
    attention,
    attention_with_lse,
    log_sum_exp,
    relative_error,
)
from tests.inputs import bias, normal


def test_it_is_softmax_attention() -> None:
    q, k, v = bias(50, head_dim=32)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(attention(q, k, v), expected)


def test_the_formula_by_hand() -> None:
    # Two keys, scores 0 and ln 3: weights ¼ and ¾.
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, math.log(3)]).reshape(1, 1, 2, 1)
    v = torch.tensor([4.0, 8.0]).reshape(1, 1, 2, 1)
    output, lse = attention_with_lse(q, k, v, scale=1.0)
    assert output.item() == pytest.approx(7.0)
    assert lse.item() == pytest.approx(math.log(4))


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = normal(2, 4, 37, 16), normal(2, 2, 53, 16), normal(2, 2, 53, 16, seed=1)
    whole, whole_lse = attention_with_lse(q, k, v)
    monkeypatch.setattr(reference, "_SCORES", 2 * 2 * 53 * 5)
    pieces, lse = attention_with_lse(q, k, v)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(lse, whole_lse)
    torch.testing.assert_close(log_sum_exp(q, k), whole_lse)


def test_fewer_key_heads_serve_several_query_heads() -> None:
    q, k, v = normal(2, 6, 9, 16), normal(2, 2, 11, 16), normal(2, 2, 11, 16, seed=1)
    repeated = attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    torch.testing.assert_close(attention(q, k, v), repeated)


def test_shifting_keys_shifts_only_the_log_sum_exp() -> None:
    q, k, v = bias(40, head_dim=16)
    shift = normal(1, 2, 1, 16, seed=9)
    before, lse = attention_with_lse(q, k, v)
    after, shifted = attention_with_lse(q, k.double() + shift, v)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(shifted - lse, (q.double() @ shift.double().mT).squeeze(-1) / 4)


def test_it_computes_in_the_dtype_asked_for() -> None:
    q, k, v = bias(8, head_dim=16)
    assert attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.float64
    assert attention(q, k, v, dtype=torch.float32).dtype == torch.float32


def test_relative_error_of_a_known_difference() -> None:
    reference_values = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), reference_values) == pytest.approx(0.1)
    assert math.isnan(relative_error(torch.tensor([math.nan, 4.0]), reference_values))


def test_blocks_that_are_left_out_have_no_weight_and_rows_without_any_are_zero() -> None:
    q, k, v = normal(2, 4, 300, 16), normal(2, 2, 270, 16), normal(2, 2, 270, 16, seed=1)
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 4, 3, 3), (1, 1, 3, 3), (1, 4, 3, 3), (2, 1, 3, 3)):
        mask = torch.rand(shape, generator=generator) < 0.6
        mask[:, :, 1] = False
        output, lse = attention_with_lse(q, k, v, block_mask=mask)
        allowed = mask.repeat_interleave(128, 2).repeat_interleave(128, 3)[..., :300, :270]
        keys, values = (x.repeat_interleave(2, 1).double() for x in (k, v))
        scores = (q.double() @ keys.mT / 4).masked_fill(~allowed, -torch.inf)
        torch.testing.assert_close(output, scores.softmax(-1).nan_to_num(0.0) @ values)
        torch.testing.assert_close(lse, scores.logsumexp(-1).expand_as(lse))
        assert not output[:, :, 128:256].any()


def test_pieces_do_not_change_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = normal(1, 4, 300, 16), normal(1, 2, 270, 16), normal(1, 2, 270, 16, seed=1)
    mask = torch.rand(1, 4, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    whole = attention(q, k, v, block_mask=mask)
    monkeypatch.setattr(reference, "_SCORES", 2 * 270 * 7)
    torch.testing.assert_close(attention(q, k, v, block_mask=mask), whole)
