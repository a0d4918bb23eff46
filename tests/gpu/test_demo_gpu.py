"""A captured training step learns as the plain one does."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

pytestmark = pytest.mark.gpu


def losses_of(captured: bool) -> list[float]:
    import flow
    from replay import Replay

    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 32, device="cuda")
    inputs, wanted = torch.randn(2, 64, 32, device="cuda")
    optimizer = flow.Optimizer([layer.weight], [layer.bias])
    kept = torch.zeros((), device="cuda")

    def step() -> None:
        loss = (layer(inputs) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        kept.copy_(loss.detach())

    run = Replay(step, torch.device("cuda" if captured else "cpu"))
    if not captured:
        for _ in range(3):  # what the capture does to warm up
            step()
    optimizer.rate.fill_(0.01)
    found = []
    for _ in range(10):
        run()
        found.append(kept.item())
    return found


def test_a_captured_step_learns_as_the_plain_one():
    plain, captured = losses_of(captured=False), losses_of(captured=True)
    assert plain[-1] < plain[0]
    assert captured == pytest.approx(plain, rel=2e-3)
