"""AutoencoderKLWan (is_residual) over a whole clip at once: the same numbers, no chunk loop.

diffusers feeds the clip in chunks of 1, 4, 4, … frames through feature caches, which costs
thousands of small launches. Because every convolution is causal, the whole clip can go through
each layer in one call, provided that the first frame takes the path it takes there:
- encoder, temporal halving: the first frame is passed on, `time_conv` sees the frames from 0 on;
- decoder, temporal doubling: the first frame is passed on, `time_conv` starts afresh at frame 1;
- the shortcut that repeats frames drops its first factor_t - 1 frames.
tests/demo proves equality with the chunked forward.

On a GPU `fused=True` puts norm, activation and padding into one kernel (fused.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor, nn


def _frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] → [B*T, C, H, W] (a view if x is channels_last_3d)."""
    return x.permute(0, 2, 1, 3, 4).flatten(0, 1)


def _clips(x: Tensor, batch: int) -> Tensor:
    """[B*T, C, H, W] → [B, C, T, H, W]."""
    return x.unflatten(0, (batch, -1)).permute(0, 2, 1, 3, 4)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)  # what tensor cores want


def causal_conv(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """WanCausalConv3d with zeros on the left: x [B, C, T, H, W] → [B, O, T, H, W]."""
    depth, height, width = conv.kernel_size
    padded = F.pad(x, (0, 0, 0, 0, depth - 1, 0))
    return F.conv3d(padded, conv.weight, conv.bias, padding=(0, height // 2, width // 2))


def _norm_act_conv(norm: nn.Module, conv: nn.Conv3d, x: Tensor, fused: bool) -> Tensor:
    if not fused:
        return causal_conv(conv, F.silu(norm(x)))
    from fused import norm_act  # needs Triton, which a machine without a GPU may lack

    depth, height, width = conv.kernel_size
    padded = norm_act(x, norm.gamma, depth - 1)
    return F.conv3d(padded, conv.weight, conv.bias, padding=(0, height // 2, width // 2))


def _residual(block: nn.Module, x: Tensor, fused: bool) -> Tensor:
    short = x
    if not isinstance(block.conv_shortcut, nn.Identity):
        short = causal_conv(block.conv_shortcut, x)
    x = _norm_act_conv(block.norm1, block.conv1, x, fused)
    return short + _norm_act_conv(block.norm2, block.conv2, x, fused)


def _middle(block: nn.Module, x: Tensor, fused: bool) -> Tensor:
    x = _residual(block.resnets[0], x, fused)
    x = block.attentions[0](x)
    return _residual(block.resnets[1], x, fused)


def _down(block: nn.Module, x: Tensor, fused: bool) -> Tensor:
    short = block.avg_shortcut(x)
    for resnet in block.resnets:
        x = _residual(resnet, x, fused)
    sampler = block.downsampler
    if sampler is None:
        return x + short
    x = _clips(sampler.resample(_frames(x)), len(x))
    if sampler.mode == "downsample3d" and x.shape[2] > 1:
        conv = sampler.time_conv
        later = F.conv3d(x, conv.weight, conv.bias, stride=(2, 1, 1))
        x = torch.cat([x[:, :, :1], later], 2)
    return x + short


def _up(block: nn.Module, x: Tensor, fused: bool) -> Tensor:
    start = x
    for resnet in block.resnets:
        x = _residual(resnet, x, fused)
    sampler = block.upsampler
    if sampler is None:
        return x
    if sampler.mode == "upsample3d" and x.shape[2] > 1:
        pairs = causal_conv(sampler.time_conv, x[:, :, 1:])
        pairs = pairs.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([x[:, :, :1], pairs], 2)
    conv = sampler.resample[1]
    frames = F.interpolate(_frames(x), scale_factor=2.0, mode="nearest-exact")
    x = _clips(F.conv2d(frames, conv.weight, conv.bias, padding=1), len(x))
    return x + block.avg_shortcut(start, first_chunk=True)


def encode(vae: AutoencoderKLWan, video: Tensor, fused: bool = False) -> tuple[Tensor, Tensor]:
    """video [B, 3, T, H, W] in -1..1 → mean and log variance [B, Z, 1 + (T-1)/4, H/16, W/16]."""
    net = vae.encoder
    x = _channels_last(patchify(video, vae.config.patch_size))
    x = causal_conv(net.conv_in, x)
    for block in net.down_blocks:
        x = _down(block, x, fused)
    x = _middle(net.mid_block, x, fused)
    x = _norm_act_conv(net.norm_out, net.conv_out, x, fused)
    mean, log_variance = causal_conv(vae.quant_conv, x).chunk(2, 1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(vae: AutoencoderKLWan, latents: Tensor, fused: bool = False) -> Tensor:
    """latents [B, Z, t, h, w] → video [B, 3, 1 + 4(t-1), 16h, 16w], not clamped."""
    net = vae.decoder
    x = causal_conv(vae.post_quant_conv, _channels_last(latents))
    x = _middle(net.mid_block, causal_conv(net.conv_in, x), fused)
    for block in net.up_blocks:
        x = _up(block, x, fused)
    x = _norm_act_conv(net.norm_out, net.conv_out, x, fused)
    return unpatchify(x, vae.config.patch_size)
