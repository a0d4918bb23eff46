"""The fused norm + SiLU + padding equals the plain one, forward and backward (interpreted)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CHECK = """
import torch, torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
import fused
torch.manual_seed(0)
for channels, past in ((24, 2), (16, 0)):
    norm = WanRMS_norm(channels, images=False)
    norm.gamma.data += 0.3 * torch.randn_like(norm.gamma)
    x = torch.randn(2, channels, 2, 3, 5, requires_grad=True)
    plain = F.pad(F.silu(norm(x)), (0, 0, 0, 0, past, 0))
    grad = torch.randn_like(plain)
    wanted = plain, *torch.autograd.grad(plain, (x, norm.gamma), grad)
    ours = fused.norm_act(x, norm.gamma, past)
    found = ours, *torch.autograd.grad(ours, (x, norm.gamma), grad)
    for a, b in zip(wanted, found):
        assert (a - b).abs().max() < 1e-5 * a.abs().max()
"""


def test_fused_equals_plain():
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).parents[2] / "demo"),
    }
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
