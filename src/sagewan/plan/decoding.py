"""How the VAE turns latents into frames."""

from dataclasses import dataclass

from sagewan.plan.hardware import Device


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """``dtype`` is torch's name of what the decoder computes in; with ``channels_last`` a cell's
    features lie side by side, as tensor cores read them."""

    dtype: str = "float32"
    channels_last: bool = False


# What diffusers' examples advise, and what pictures are always encoded in.
EXACT = Decoding()


def plan_decoding(device: Device, dtype: str) -> Decoding:
    """bfloat16 where the transformer computes in it on a GPU: what that costs in the picture is in
    docs/measured.md. Exact on a CPU, and for a run in float32."""
    if device.is_cuda and dtype == "bfloat16":
        return Decoding(dtype="bfloat16", channels_last=True)
    return EXACT
