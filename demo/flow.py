"""Flow matching on the demo model's latents: the loss, and the optimiser that lowers it."""

from __future__ import annotations

from collections.abc import Iterable

import dit
import muon
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

UNTOLD = 0.1  # the share of clips whose caption is left out, for guidance
GIVEN = 1 / 3  # the share whose first latent frame is known: image to video
# The share whose noise level is uniform before the shift. The others are logit-normal, of which
# hardly any lie where sampling starts, and there it is settled what fills the picture.
EVEN = 0.25


def without_some_captions(ids: Tensor) -> Tensor:
    """ids int64 [B, L], some of them replaced by those of an empty prompt."""
    empty = torch.zeros_like(ids)
    empty[:, 0] = 1
    left_out = torch.rand(len(ids), 1, device=ids.device) < UNTOLD
    return torch.where(left_out, empty, ids)


def draw_levels(count: int, shift: float, device: torch.device) -> Tensor:
    """Noise levels [count] in 0..1."""
    even = torch.rand(count, device=device)
    central = torch.randn(count, device=device).sigmoid()
    chosen = torch.rand(count, device=device) < EVEN
    return dit.shifted(torch.where(chosen, even, central), shift)


def noised(clean: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """clean [B, C, t, h, w] → noisy latents, the velocity to find, the two noise levels of each
    clip [B, 2] (first latent frame, the others), and where the loss counts [B, 1, t, 1, 1]."""
    batch, device = len(clean), clean.device
    level = draw_levels(batch, shift, device)
    known = torch.rand(batch, device=device) < GIVEN
    levels = torch.stack([level * ~known, level], 1)
    noise = torch.randn_like(clean)
    amount = levels[:, 1:].repeat(1, clean.shape[2])
    amount[:, 0] = levels[:, 0]
    noisy = torch.lerp(clean, noise, amount[:, None, :, None, None])
    wanted = torch.ones_like(amount)
    wanted[:, 0] = (~known).float()
    return noisy, noise - clean, levels, wanted[:, None, :, None, None]


def flow_loss(
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
    clean: Tensor,
    ids: Tensor,
    shift: float,
    block_step: object,
) -> Tensor:
    """The mean squared error of the velocity, for random noise, levels and known first frames."""
    noisy, target, levels, wanted = noised(clean, shift)
    with torch.autocast(clean.device.type, torch.bfloat16, cache_enabled=False):
        text = dit.embed_text(text_encoder, without_some_captions(ids))
        velocity = dit.forward(transformer, noisy, levels * 1000, text, block_step)
    return ((velocity - target).square() * wanted).mean() / wanted.mean()


class Optimizer:
    """Muon for the matrices of the transformer's blocks, AdamW for all else; one rate."""

    def __init__(self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> None:
        matrices, others = list(matrices), list(others)
        self.parameters = [*matrices, *others]
        device = self.parameters[0].device
        gpu = device.type == "cuda"
        self.rate = torch.zeros((), device=device)
        self.muon = muon.Muon(matrices)
        self.adam = torch.optim.AdamW(
            others,
            lr=self.rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=gpu,
            capturable=gpu,
        ) if others else None  # fmt: skip

    def step(self) -> None:
        """Clip, step, and leave no gradient; can be part of a CUDA graph."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if self.adam:
            self.adam.step()
        self.muon.step(self.rate)
        for parameter in self.parameters:
            parameter.grad = None


class Average:
    """A slow copy of the parameters."""

    EVERY = 10  # steps between two updates

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.live = list(parameters)
        self.slow = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self, number: int) -> None:
        """To be called after every step; it does something after some."""
        if number % self.EVERY == 0:
            decay = min(0.999, (number + 1) / (number + 20)) ** self.EVERY
            torch._foreach_lerp_(self.slow, self.live, 1 - decay)

    @torch.no_grad()
    def take(self) -> None:
        """Give the parameters their averaged values."""
        for live, slow in zip(self.live, self.slow, strict=True):
            live.copy_(slow)
