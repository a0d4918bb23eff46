"""How the VAE turns latents into frames."""

from dataclasses import dataclass

from sagewan.plan.hardware import Device

# One latent frame of a small picture does not fill a GPU: several go through the decoder together.
_SMALL = 256 * 256
_TOGETHER = 4


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """``dtype`` is torch's name of what the decoder computes in; with ``channels_last`` a cell's
    features lie side by side, as tensor cores read them; ``at_once`` latent frames are decoded
    together."""

    dtype: str = "float32"
    channels_last: bool = False
    at_once: int = 1

    @property
    def rounds(self) -> bool:
        """Whether its weights are others than those that encode."""
        return self.dtype != "float32" or self.channels_last

    @property
    def number_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2


# What diffusers' examples advise, and what pictures are always encoded in.
EXACT = Decoding()


def plan_decoding(device: Device, dtype: str, size: tuple[int, int]) -> Decoding:
    """bfloat16 where the transformer computes in it on a GPU: what that costs in the picture is in
    docs/measured.md. As diffusers to the bit on a CPU, and for a run in float32. ``size`` is in
    pixels."""
    if device.is_cuda and dtype == "bfloat16":
        at_once = _TOGETHER if size[0] * size[1] <= _SMALL else 1
        return Decoding(dtype="bfloat16", channels_last=True, at_once=at_once)
    return EXACT
