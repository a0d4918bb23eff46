"""What is said where the latents stop being finite with quantised weights."""

from types import SimpleNamespace

import torch

from sagewan.pipeline.recover import _rejected
from sagewan.plan.evidence import Evidence
from sagewan.plan.plan import make_plan
from sagewan.plan.request import Request
from tests.machines import WAN_14B, machine


def test_the_way_to_multiply_is_named_with_the_way_out() -> None:
    failure = SimpleNamespace(step=2, snapshot=SimpleNamespace(latents=torch.zeros(1)))

    def said(quantization: str) -> str:
        request = Request(prompt="a cat", quantization=quantization, attention="sdpa")
        hardware = machine("H100", triton="3.6")
        plan = make_plan(request, WAN_14B, hardware, Evidence())
        return str(_rejected(plan, failure))  # type: ignore[arg-type]

    assert "multiplied as fp8 e4m3 × fp8 e4m3; try" in said("fp8_scaled")
    assert said("fp8_scaled").endswith("--quantization none")
    assert said("none").endswith("--dtype float32")
