"""Softmax attention by its formula, slow and precise: what every implementation is held to."""

import torch
from torch import Tensor

# Scores held at once: 128 MiB in float64.
_SCORES = 2**24
# Queries, and keys, to a block of a mask.
BLOCK = 128


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    block_mask: Tensor | None = None,
) -> Tensor:
    """softmax(q·kᵀ·scale)·v.

    q [B, H, N, D], k and v [B, Hk, M, D] with H a multiple of Hk, any float dtype
    → [B, H, N, D] in ``dtype``, which is also what it computes in (default float64).
    ``scale`` defaults to D**-0.5. ``block_mask`` [B or 1, H or 1, ⌈N/128⌉, ⌈M/128⌉] bool is true
    for the blocks that are attended to; a row without any is zero.
    """
    return attention_with_lse(q, k, v, scale=scale, dtype=dtype, block_mask=block_mask)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    block_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`attention`, with the natural log of each row's sum of exponentials [B, H, N]."""
    dtype = dtype or torch.float64
    keys, values = k.to(dtype), v.to(dtype)
    outputs, sums = [], []
    start = 0
    for rows in _rows(q, k):
        scores = _scores(rows.to(dtype), keys, scale)
        if block_mask is not None:
            allowed = _allowed(block_mask, range(start, start + rows.shape[2]), q, k)
            scores = scores.masked_fill(~allowed, -torch.inf)
        start += rows.shape[2]
        sums.append(scores.logsumexp(-1))
        weights = scores.softmax(-1)
        outputs.append((weights if block_mask is None else weights.nan_to_num(0.0)) @ values)
    return _ungroup(torch.cat(outputs, 2), q), _ungroup(torch.cat(sums, 2), q)


def log_sum_exp(
    q: Tensor, k: Tensor, *, scale: float | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The natural log of each row's sum of exponentials, [B, H, N] in ``dtype`` (float64)."""
    dtype = dtype or torch.float64
    keys = k.to(dtype)
    sums = [_scores(rows.to(dtype), keys, scale).logsumexp(-1) for rows in _rows(q, k)]
    return _ungroup(torch.cat(sums, 2), q)


def relative_error(output: Tensor, reference: Tensor) -> float:
    """‖output − reference‖ / ‖reference‖ in float64; NaN or infinite if the output is."""
    difference = output.to(reference.device, torch.float64) - reference.double()
    return float(difference.norm() / reference.double().norm())


def _scores(rows: Tensor, keys: Tensor, scale: float | None) -> Tensor:
    return rows @ keys.mT * (rows.shape[-1] ** -0.5 if scale is None else scale)


def _rows(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Queries [B, Hk, H/Hk·N, D] in pieces: query heads that share a key head are more rows."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    rows = max(1, _SCORES // (k.shape[0] * k.shape[1] * k.shape[2]))
    return tuple(grouped.split(rows, dim=2))


def _allowed(mask: Tensor, rows: range, q: Tensor, k: Tensor) -> Tensor:
    """What these of :func:`_rows`' may attend to, bool [B or 1, Hk or 1, rows, M]."""
    places = torch.arange(rows.start, rows.stop, device=mask.device)
    head, block = places // q.shape[2], places % q.shape[2] // BLOCK
    by_keys = mask.repeat_interleave(BLOCK, 3)[..., : k.shape[2]]
    if mask.shape[1] > 1:
        by_keys = by_keys.unflatten(1, (k.shape[1], -1))
        allowed: Tensor = by_keys[:, :, head, block]
    else:
        allowed = by_keys[:, :, block]
    return allowed


def _ungroup(rows: Tensor, q: Tensor) -> Tensor:
    return rows.reshape(*q.shape[:3], *rows.shape[3:])
