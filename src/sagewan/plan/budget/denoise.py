"""Denoising: the transformer's weights, where they are, and its forward passes."""

from dataclasses import dataclass

from sagewan.plan.budget.needs import Needs
from sagewan.plan.budget.stage import Item, Stage
from sagewan.plan.budget.transformer import Chunks, Weights, activations, conditions_bytes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a transformer lies and computes: in ``chunks``, with ``swap`` blocks in host memory, of
    which ``pin_budget`` bytes may be pinned, and ``text_keys`` bytes kept from step to step."""

    chunks: Chunks
    swap: int
    pin_budget: int
    text_keys: int = 0


def weights_of(needs: Needs) -> Weights:
    """The bytes of one of its transformers."""
    return Weights.of(needs.model, needs.weight_bytes, needs.number_bytes)


def resident_bytes(needs: Needs, swap: int) -> int:
    """Bytes of the transformer on the device where so many blocks are swapped, the two buffers that
    they pass through included."""
    weights = weights_of(needs)
    return weights.around + (needs.model.layers - swap + min(2, swap)) * weights.block


def denoise_stage(needs: Needs, layout: Layout) -> Stage:
    """The steps."""
    active, kept = _active_bytes(needs, layout.chunks), _residual_bytes(needs)
    if not needs.on_device:
        items = {
            "transformer": resident_bytes(needs, layout.swap),
            "step cache": kept,
            "text keys and values": layout.text_keys,
            "activations": active,
        }
        return Stage("denoise", tuple(Item(name, 0, nbytes) for name, nbytes in items.items()))
    return Stage(
        "denoise",
        (
            _transformer(needs, layout),
            Item("LoRAs", needs.lora_bytes),
            Item("step cache", kept),
            Item("text keys and values", layout.text_keys),
            Item("activations", active),
        ),
    )


def _transformer(needs: Needs, layout: Layout) -> Item:
    waiting = layout.swap * weights_of(needs).block
    pinned = min(waiting, layout.pin_budget)
    # Weights that are quantised or cast while loading are whole on the host for a moment.
    host = pinned if needs.file_backed else max(waiting, needs.weight_bytes)
    mapped = max(0, waiting - host)
    return Item("transformer", resident_bytes(needs, layout.swap), host, pinned, mapped)


def _active_bytes(needs: Needs, chunks: Chunks) -> int:
    model, number = needs.model, needs.number_bytes
    active = activations(model, needs.tokens, number, chunks, quantised=needs.quantised_attention)
    if needs.format:
        # Some rows unpack one matrix at a time.
        active += model.ffn * model.heads * model.head_dim * number
    return active + conditions_bytes(model, needs.shape, number)


def _residual_bytes(needs: Needs) -> int:
    """What a step cache keeps of the blocks' result."""
    if not needs.keeps_residuals:
        return 0
    width = needs.model.heads * needs.model.head_dim
    return needs.texts * needs.tokens * width * needs.number_bytes
