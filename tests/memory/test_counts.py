"""The budget's coefficients against live tensors, counted at full width on the meta device."""

import logging
from typing import Any

import pytest
import torch

from sagewan.attention.launch import Launcher
from sagewan.memory.meter import Meter
from sagewan.model import block
from sagewan.model import vae as module
from sagewan.model.attention import Attention, Turn
from sagewan.model.fused import FusedBlock
from sagewan.model.transformer import install
from sagewan.plan.budget.needs import Needs
from sagewan.plan.budget.text import text_stage
from sagewan.plan.budget.transformer import Chunks, activations, roomy_chunks
from sagewan.plan.budget.vae import decode_bytes, encode_bytes, vae_costs
from sagewan.plan.decoding import Decoding
from sagewan.plan.hardware import Device
from sagewan.plan.models import PUBLISHED
from sagewan.plan.request import Request
from tests.model.test_attention import PLAN
from tests.published import TRANSFORMERS, VAES

# A plan that counts a tenth too little runs out of memory; too much swaps a block too many.
LOW, HIGH = 0.9, 1.25
SLOW = pytest.mark.slow


class NoAttention(Attention):
    """Attention whose kernel takes no memory of its own."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        return torch.empty_like(q)


@pytest.mark.parametrize(
    ("name", "size", "frames", "chunks"),
    [
        ("wan2.1-t2v-14b", (832, 480), 81, Chunks(2048, 8)),
        ("wan2.1-t2v-14b", (832, 480), 81, Chunks(16384, None)),
        pytest.param(*("wan2.1-t2v-14b", (1280, 720), 81, Chunks(4096, 8)), marks=SLOW),
        pytest.param(*("wan2.1-t2v-14b", (1280, 720), 61, Chunks(1024, 1)), marks=SLOW),
        ("wan2.1-t2v-1.3b", (832, 480), 81, Chunks(2048, 8)),
        pytest.param(*("wan2.2-ti2v-5b", (1280, 704), 121, Chunks(2048, 8)), marks=SLOW),
        pytest.param(*("wan2.2-t2v-a14b", (1920, 1088), 121, Chunks(4096, 8)), marks=SLOW),
        ("wan2.1-t2v-1.3b", (416, 240), 17, Chunks(None, None)),
        ("wan2.1-t2v-14b", (832, 480), 33, Chunks(None, None)),
        ("wan2.2-ti2v-5b", (1280, 704), 61, Chunks(None, None)),
    ],
)
def test_activations_of_the_transformer(
    name: str, size: tuple[int, int], frames: int, chunks: Chunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PUBLISHED[name]
    if chunks.heads is None:
        # A matrix of scores with the text, which no GPU makes, is more than all else here.
        monkeypatch.setattr(block, "scaled_dot_product_attention", lambda q, *_: q.clone())
    latents = torch.empty(
        1,
        model.in_channels,
        (frames - 1) // 4 + 1,
        size[1] // model.spatial,
        size[0] // model.spatial,
        device="meta",
        dtype=torch.bfloat16,
    )
    transformer = on_meta(name)
    attention = NoAttention(Launcher())
    install(transformer, attention)
    turn = Turn(PLAN, 1, lambda: None, chunk=chunks.tokens, heads=chunks.heads)
    text = torch.empty(1, 512, 4096, device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), attention.during(turn), Meter() as meter:
        transformer(latents, torch.empty(1, device="meta"), text)
    counted = activations(model, model.tokens(size, frames), 2, chunks, quantised=False)
    # Of a whole sequence the feed-forward takes most, with room for rows that are rounded there.
    high = HIGH if chunks.tokens else 1.35
    assert LOW < counted / meter.peak < high, (counted / meter.peak, meter.peak / 2**30)


class Rounding(torch.nn.Linear):
    """Multiplies by rows that it rounds to 8 bit, as products of quantised weights do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = x.to(torch.int8)
        y = super().forward(x)
        del rounded
        return y


class NoKernels:
    """What runs between the products of a fused block, where there is no GPU: it is in place."""

    def run(self, *_: object, **__: object) -> None: ...


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("wan2.1-t2v-14b", 81),
        ("wan2.1-t2v-14b", 121),
        ("wan2.1-t2v-14b", 13),
        ("wan2.2-ti2v-5b", 61),
    ],
)
@pytest.mark.parametrize("linear", [torch.nn.Linear, Rounding])
def test_activations_of_a_fused_block_with_all_heads_at_once(
    name: str, frames: int, linear: type[torch.nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "scaled_dot_product_attention", lambda q, *_: q.clone())
    width, height = 1280, 704 if name == "wan2.2-ti2v-5b" else 720
    model, transformer, attention = PUBLISHED[name], on_meta(name), NoAttention(Launcher())
    for layer in transformer.blocks.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.__class__ = linear
    install(transformer, attention, lambda *given: FusedBlock(*given, NoKernels()))  # type: ignore[arg-type]
    tokens = model.tokens((width, height), frames)
    chunks = roomy_chunks(tokens)
    turn = Turn(PLAN, 1, lambda: None, chunk=chunks.tokens, heads=chunks.heads)
    cells = height // model.spatial, width // model.spatial
    shape = (1, model.in_channels, (frames - 1) // 4 + 1, *cells)
    latents = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    text = torch.empty(1, 512, 4096, device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), attention.during(turn), Meter() as meter:
        transformer(latents, torch.empty(1, device="meta"), text)
    counted = activations(model, tokens, 2, chunks, quantised=False)
    # Whatever rounds them or not, there is room for it; never half as much again.
    assert 1 <= counted / meter.peak < 1.5, (counted / meter.peak, meter.peak / 2**30)


def on_meta(name: str) -> Any:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with torch.device("meta"):
        model = WanTransformer3DModel(**{**TRANSFORMERS[name], "num_layers": 1})
    return model.to(torch.bfloat16)


@pytest.fixture
def without_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE's attention on the meta device makes a matrix of scores, which no GPU does."""
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention", lambda q, *_: torch.empty_like(q)
    )
    monkeypatch.setattr(module, "_HOST", "meta")


def vae_on_meta(name: str) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    with torch.device("meta"):
        return AutoencoderKLWan(**VAES[name]).eval()


@pytest.mark.usefixtures("without_attention")
@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.2-ti2v-5b"])
@pytest.mark.parametrize("tile", [None, pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW)])
@pytest.mark.parametrize(
    ("dtype", "at_once"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 2)]
)
def test_decoding(name: str, dtype: torch.dtype, at_once: int, tile: int | None) -> None:
    model, vae = PUBLISHED[name], vae_on_meta(name).to(dtype)
    rows, columns = 480 // model.spatial, 832 // model.spatial
    size = None if tile is None else (rows // tile // 2, columns // tile)
    latents = torch.empty(1, model.latent_channels, 3, rows, columns, device="meta", dtype=dtype)
    features = 0
    with torch.no_grad(), Meter() as meter:
        if size is None:
            for _ in module.decode_pieces(latents, vae, at_once):
                pass
        else:
            # What waits for its tile lies on the host.
            features = 3 * rows * columns * vae_costs(model).features
            features = features * dtype.itemsize // 4
            for _ in module.decode_tiles(latents, vae, size):
                pass
    decoding = Decoding(dtype=str(dtype)[6:], at_once=at_once)
    counted = decode_bytes(model, (rows, columns), size, decoding)
    peak = meter.peak - features
    # Several frames at once are small ones, of which too much may be counted.
    high = HIGH if at_once == 1 else 1.4
    assert LOW < counted / peak < high, (counted / peak, peak / 2**30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_text_encoder(dtype: torch.dtype) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=32,
        d_model=4096,
        d_ff=10240,
        d_kv=64,
        num_heads=64,
        num_layers=1,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        block = UMT5EncoderModel(config).to(dtype).eval().encoder.block[0]
    with torch.inference_mode(), Meter() as meter:
        hidden = torch.empty(1, 512, 4096, device="meta", dtype=dtype)
        mask = torch.zeros(1, 1, 512, 512, device="meta", dtype=dtype)
        block(hidden, attention_mask=mask)
    model = PUBLISHED["wan2.1-t2v-14b"]
    needs = Needs(
        request=Request(prompt="x"),
        model=model,
        device=Device(name="a GPU", sm=90),
        dtype=str(dtype)[6:],
        grid_size=(832, 480),
        frames=81,
        format=None,
        lora_bytes=0,
        quantised_attention=False,
    )
    stages = [text_stage(needs, n) for n in (0, 3)]
    active = next(item for item in stages[0].items if item.name == "activations")
    assert LOW < active.device / meter.peak < HIGH, (active.device, meter.peak)
    # Three swapped blocks are two on the device and two in pinned buffers that hold them.
    weights = sum(parameter.nbytes for parameter in block.parameters())
    assert abs((stages[0].device - stages[1].device) / weights - 1) < 0.01
    assert stages[1].pinned >= 2 * weights


@pytest.mark.usefixtures("without_attention")
@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.2-ti2v-5b"])
@pytest.mark.parametrize("tile", [None, pytest.param((15, 13), marks=SLOW)])
def test_encoding(name: str, tile: tuple[int, int] | None) -> None:
    model, vae = PUBLISHED[name], vae_on_meta(name)
    rows, columns = 480 // model.spatial, 832 // model.spatial
    video = torch.empty(1, 3, 4, 480, 832, device="meta")
    with torch.no_grad(), Meter() as meter:
        module.encode(lambda start, stop: video[:, :, : stop - start], 9, vae, tile)
    counted = encode_bytes(model, (rows, columns), tile)
    features = 0 if tile is None else 3 * rows * columns * vae_costs(model).features
    peak = meter.peak - features
    assert LOW < counted / peak < HIGH + 0.1, (counted / peak, peak / 2**30)


def test_a_storage_counts_from_its_first_tensor_to_its_last() -> None:
    with Meter() as meter:
        a = torch.empty(1000, device="meta")
        b = a + 1
        del a
        c = (b * 2).view(10, 100)
        del b
    assert (meter.peak, meter.live) == (8000, 4000)
    assert c.shape == (10, 100)
