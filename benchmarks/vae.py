"""Decoding Wan's VAE on one GPU: number formats, memory layouts, latent frames at once.

    python -m benchmarks.vae [--vae 2.1|2.2] [--size 480p|720p] [--frames 81] [--json FILE]

Random weights at the published widths for the times, each held to the first way (float32, as
diffusers keeps it) before it is timed; and the demo model's trained VAE for what a format costs in
the picture: PSNR over the bytes of a clip that is encoded and decoded again. And what is gained
where frames are written while the next are decoded.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from sagewan.checkpoint.find import find_model
from sagewan.model.vae import decode_pieces, encode
from sagewan.pipeline.build import load_vae
from sagewan.pipeline.decode import frame_bytes, streamed
from sagewan.pipeline.export import write_video
from sagewan.pipeline.guard import FrameGuard
from tests.published import VAES

MODELS = {"2.1": "wan2.1-t2v-14b", "2.2": "wan2.2-ti2v-5b"}
SIZES = {"tiny": (8, 8), "480p": (60, 104), "720p": (90, 160)}
# The most that a way may differ from float32, of values that random weights leave in −1 … 1.
LIMIT = 0.05


class Way(NamedTuple):
    dtype: torch.dtype
    layout: torch.memory_format
    at_once: int

    @property
    def name(self) -> str:
        layout = "channels last" if self.layout == torch.channels_last_3d else "contiguous"
        return f"{str(self.dtype)[6:]}, {layout}, {self.at_once} at once"


WAYS = (
    Way(torch.float32, torch.contiguous_format, 1),
    Way(torch.float32, torch.channels_last_3d, 1),
    Way(torch.bfloat16, torch.contiguous_format, 1),
    Way(torch.bfloat16, torch.channels_last_3d, 1),
    Way(torch.bfloat16, torch.channels_last_3d, 2),
    Way(torch.bfloat16, torch.channels_last_3d, 4),
    Way(torch.float16, torch.channels_last_3d, 1),
)


def laid_out(vae: Any, way: Way) -> Any:
    """The VAE in a way's dtype, its 5-D and 4-D weights in its layout."""
    vae = vae.to(way.dtype)
    flat = way.layout == torch.channels_last_3d
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=way.layout)
        elif parameter.ndim == 4:
            layout = torch.channels_last if flat else torch.contiguous_format
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return vae


def decoded(latents: Tensor, vae: Any, way: Way) -> Iterator[Tensor]:
    """The bytes of each piece, on the device."""
    ready = latents.to(way.dtype).contiguous(memory_format=way.layout)
    for piece in decode_pieces(ready, vae, way.at_once):
        yield frame_bytes(piece)


def seconds(latents: Tensor, vae: Any, way: Way) -> float:
    wait()
    begin = time.perf_counter()
    for _ in decoded(latents, vae, way):
        pass
    wait()
    return time.perf_counter() - begin


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_vae(name: str, device: str) -> Any:
    with torch.device(device):
        vae = AutoencoderKLWan.from_config(VAES[MODELS[name]])
    return vae.eval().requires_grad_(False)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def psnr(found: Tensor, wanted: Tensor) -> float:
    mean = float((found.double() - wanted.double()).square().mean())
    return 10 * math.log10(255**2 / mean) if mean else math.inf


def clip(side: int, count: int, device: str) -> Tensor:
    """A disc that moves before bars that turn, [1, 3, count, side, side] in −1 … 1."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side, device=device)] * 2, indexing="ij")
    frames = []
    for t in range(count):
        bars = torch.sin(8 * (x * math.cos(t / 20) + y * math.sin(t / 20)))
        disc = ((x + 0.6 - 0.06 * t) ** 2 + y**2 < 0.09).float()
        frames.append(torch.stack([bars * (1 - disc) + disc, bars * 0.4, 0.3 - disc]))
    return torch.stack(frames, 1)[None].clamp(-1, 1)


def times(arguments: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    rows, columns = SIZES[arguments.size]
    vae = random_vae(arguments.vae, device)
    channels, factor = vae.config.z_dim, vae.config.scale_factor_spatial // 8
    shape = (1, channels, (arguments.frames - 1) // 4 + 1, rows // factor, columns // factor)
    latents = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0))
    found: list[dict[str, Any]] = []
    wanted = None
    for way in WAYS:
        vae = laid_out(vae.float(), way)
        try:
            short = torch.cat(list(decode_pieces(latents[:, :, :3].to(way.dtype), vae)), 2)
            wanted = short.float() if wanted is None else wanted
            apart = error(short.float(), wanted)
            assert apart < LIMIT, f"{way.name}: error {apart}"
            del short
            if device != "cpu":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            took = [seconds(latents, vae, way) for _ in range(arguments.repeats)]
        except torch.OutOfMemoryError:
            print(f"{way.name}: out of memory", flush=True)
            continue
        spent = statistics.median(took)
        most, held = 0, 0
        if device != "cpu":
            most, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        found.append({"way": way.name, "seconds": spent, "first": took[0], "error": apart,
                      "peak_bytes": most, "reserved_bytes": held})  # fmt: skip
        print(
            f"{way.name:40} {spent:7.3f} s ({found[0]['seconds'] / spent:5.2f}×; first run "
            f"{took[0]:.2f}), error {apart:.4f}, peak {most / 2**30:.2f} GiB "
            f"({held / 2**30:.2f} reserved)",
            flush=True,
        )
    return found


def pictures(device: str) -> list[dict[str, Any]]:
    """What each number format costs in the demo's picture, against float32."""
    path = find_model("demo").parts["vae"]
    frames = clip(256, 17, device)
    found = []
    wanted = None
    for way in (WAYS[0], WAYS[3], WAYS[5], WAYS[6]):
        vae = load_vae(path).to(device)
        latents = encode(lambda a, b: frames[:, :, a:b], frames.shape[2], vae, None)
        vae = laid_out(vae, way)
        out = torch.cat([x.clone() for x in decoded(latents, vae, way)], 1)
        wanted = out if wanted is None else wanted
        levels = (out.int() - wanted.int()).abs()
        found.append({"way": way.name, "psnr": psnr(out, wanted), "most": int(levels.max())})
        print(
            f"demo, {way.name:34} PSNR against float32 {found[-1]['psnr']:.1f} dB, "
            f"largest difference {found[-1]['most']} of 255",
            flush=True,
        )
    return found


def writing(arguments: argparse.Namespace, device: str) -> dict[str, float]:
    """Seconds to decode, to write the mp4 of those frames, and both: one after the other, and as a
    run does, where the GPU decodes the next piece meanwhile."""
    rows, columns = SIZES[arguments.size]
    way = WAYS[3]
    vae = laid_out(random_vae(arguments.vae, device), way)
    channels, factor = vae.config.z_dim, vae.config.scale_factor_spatial // 8
    count = (arguments.frames - 1) // 4 + 1
    latents = torch.randn(1, channels, count, rows // factor, columns // factor, device=device)
    size = (columns * 8, rows * 8)

    def frames(ahead: int) -> Iterator[Any]:
        ready = latents.to(way.dtype)
        return streamed(decode_pieces(ready, vae), size, FrameGuard(), ahead=ahead)

    def spent(run: Callable[[], Any]) -> float:
        wait()
        begin = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - begin

    whole = [frame.copy() for frame in frames(0)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.mp4"
        found = {
            "decode": spent(lambda: list(frames(0))),
            "write": spent(lambda: write_video(path, whole, fps=16)),
            "one after the other": spent(lambda: write_video(path, frames(0), fps=16)),
            "as a run": spent(lambda: write_video(path, frames(1), fps=16)),
        }
    print(", ".join(f"{name} {value:.2f} s" for name, value in found.items()), flush=True)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vae", default="2.1", choices=list(MODELS))
    parser.add_argument("--size", default="480p", choices=list(SIZES))
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    results = {
        "device": name,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "vae": arguments.vae,
        "size": arguments.size,
        "frames": arguments.frames,
        "pictures": pictures(device),
        "writing": writing(arguments, device),
        "times": times(arguments, device),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
