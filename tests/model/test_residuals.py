"""What blocks add: kept, added again, measured."""

import pytest
import torch
from torch import Tensor

from sagewan.model.residuals import Measuring, Residuals


def doubled(hidden: Tensor) -> Tensor:
    """Blocks that overwrite what they are given, as Wan's do."""
    return hidden.mul_(2)


def test_what_was_added_last_is_added_again_for_its_own_text() -> None:
    residuals = Residuals()
    residuals.keep = True
    for text, value in (("prompt", 1.0), ("negative", 10.0)):
        after = residuals.through(text, torch.full((1, 2, 3), value), doubled)
        assert torch.equal(after, torch.full((1, 2, 3), 2 * value))
    residuals.reuse = True
    for text, added in (("prompt", 1.0), ("negative", 10.0)):
        hidden = torch.full((1, 2, 3), 5.0)
        after = residuals.through(text, hidden, pytest.fail)
        assert torch.equal(after, torch.full((1, 2, 3), 5.0 + added))


def test_nothing_is_kept_unless_wanted_and_another_transformer_begins_with_none() -> None:
    residuals = Residuals()
    residuals.through("prompt", torch.ones(1, 2, 3), doubled)
    assert not residuals.knows("prompt")
    residuals.keep = True
    residuals.through("prompt", torch.ones(1, 2, 3), doubled)
    assert residuals.knows("prompt")
    residuals.forget()
    assert not residuals.knows("prompt")
    residuals.keep = False
    residuals.through("prompt", torch.ones(1, 2, 3), doubled)
    assert not residuals.knows("prompt")


def test_magnitudes_are_factors_of_one_text_and_begin_anew_with_each_transformer() -> None:
    measuring = Measuring("prompt")
    for value in (1.0, 3.0, 1.5):
        measuring.through("prompt", torch.full((1, 2, 3), value), doubled)
        measuring.through("negative", torch.full((1, 2, 3), 99.0), doubled)
    measuring.forget()
    measuring.through("prompt", torch.ones(1, 2, 3), doubled)
    assert measuring.magnitudes == [None, pytest.approx(3), pytest.approx(0.5), None]
