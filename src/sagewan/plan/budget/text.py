"""The text encoder, UMT5-XXL."""

from sagewan.plan.budget.needs import Needs
from sagewan.plan.budget.stage import Item, Stage, placed, where
from sagewan.plan.hardware import MIB

# UMT5-XXL: its table of words, and one of its blocks, in parameters.
_UMT5_WORDS = 256_384 * 4096
_UMT5_BLOCK = 193_000_000
UMT5_BLOCKS = 24
# Its activations, for each byte of a number: attention over 512 tokens by 64 heads.
_UMT5_ACTIVATIONS = 60 * MIB


def text_staging(swapped: int, dtype_bytes: int) -> int:
    """Bytes of the two pinned buffers through which the text encoder's swapped blocks pass. It runs
    once or twice, so pinning them all would take longer than it gains, and up to 8.6 GiB."""
    return 2 * _UMT5_BLOCK * dtype_bytes if swapped else 0


def text_stage(needs: Needs, swapped: int) -> Stage:
    """The text encoder, of whose blocks so many are swapped."""
    model, dtype_bytes, on_device = needs.model, needs.number_bytes, needs.on_device
    if model.is_demo:
        return Stage("text", placed("text encoder", 2_200_000, 0, on_device=on_device))
    words, block = _UMT5_WORDS * dtype_bytes, _UMT5_BLOCK * dtype_bytes
    resident = words + (UMT5_BLOCKS - swapped + min(2, swapped)) * block
    pinned, whole = text_staging(swapped, dtype_bytes), UMT5_BLOCKS * block + words
    # In another dtype than its files have (those of Wan 2.1 are float32, others bfloat16, which is
    # assumed where they were not looked at) it is made anew, whole on the host.
    stored = model.dtypes.get("text_encoder", "bfloat16")
    anew = stored != ("float32" if dtype_bytes > 2 else "bfloat16")
    host, mapped = (pinned + whole, 0) if anew else (pinned, whole)
    items = (
        Item("text encoder", resident if on_device else 0, host, pinned, mapped),
        Item("activations", *where(_UMT5_ACTIVATIONS * dtype_bytes, on_device=on_device)),
    )
    return Stage("text", items)
