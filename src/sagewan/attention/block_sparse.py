"""Exact attention past blocks of keys that are left out, by torch's own attention on the rest."""

from torch import Tensor, cat
from torch.nn.functional import scaled_dot_product_attention

from sagewan.reference.attention import BLOCK


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    block_mask: Tensor | None = None,
) -> Tensor:
    """q [B, H, N, D], k and v [B, Hk, M, D] → [B, H, N, D]. ``block_mask`` [B or 1, H or 1,
    ⌈N/128⌉, ⌈M/128⌉] bool is true for the blocks to attend to, None for all; a row without any is
    zero.

    Each block of queries has its keys gathered, so that memory grows by one block's keys.
    """
    grouped = k.shape[1] != q.shape[1]
    if block_mask is None:
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    if block_mask.shape[1] != 1:
        parts = [
            sdpa(q[:, h : h + 1], key, value, scale=scale, block_mask=block_mask[:, h : h + 1])
            for h, (key, value) in enumerate(_by_query_heads(q, k, v))
        ]
        return cat(parts, 1)
    if block_mask.shape[0] != 1:
        videos = [
            sdpa(*(x[b : b + 1] for x in (q, k, v)), scale=scale, block_mask=block_mask[b : b + 1])
            for b in range(len(q))
        ]
        return cat(videos, 0)
    out = q.new_zeros(q.shape)
    # One transfer: asking row by row would wait for the device each time.
    for block, allowed in enumerate(block_mask[0, 0].tolist()):
        keys = [slice(i * BLOCK, (i + 1) * BLOCK) for i, kept in enumerate(allowed) if kept]
        if not keys:
            continue
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        key, value = (cat([x[:, :, part] for part in keys], 2) for x in (k, v))
        out[:, :, rows] = scaled_dot_product_attention(
            q[:, :, rows], key, value, scale=scale, enable_gqa=grouped
        )
    return out


def _by_query_heads(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    shared = q.shape[1] // k.shape[1]
    heads = [slice(h // shared, h // shared + 1) for h in range(q.shape[1])]
    return [(k[:, head], v[:, head]) for head in heads]
