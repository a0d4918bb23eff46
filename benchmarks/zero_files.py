"""A model's folder at its published size whose weights are zeros that take no disk: files with
holes. Its loading, its pages and its memory are those of a real one; its videos are of one colour.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.random_models import tokenize
from sagewan.pipeline import build as building
from tests.checkpoint.manifests import UMT5_XXL, load
from tests.published import VAES, write_folder

_NUMBERS = {"bfloat16": ("BF16", 2), "float32": ("F32", 4)}


def zero_folder(name: str, dtype: str, folder: Path) -> Path:
    """The folder, its transformers and text encoder stored in ``dtype``, its VAE in float32."""
    write_folder(name, folder)
    for part in ("transformer", "transformer_2"):
        if (folder / part).is_dir():
            _write(folder / part / "diffusion_pytorch_model.safetensors", load(name), dtype)
    vae = "vae-2.2" if VAES[name]["z_dim"] == 48 else "vae-2.1"
    _write(folder / "vae" / "diffusion_pytorch_model.safetensors", load(vae), "float32")
    channels = VAES[name]["z_dim"]
    config = {"_class_name": "AutoencoderKLWan", **VAES[name]}
    config |= {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    (folder / "vae" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    text = folder / "text_encoder"
    (text / "config.json").write_text(json.dumps({"model_type": "umt5", **UMT5_XXL}))
    _write(text / "model.safetensors", load("umt5-xxl"), dtype)
    return folder


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    kind, each = _NUMBERS[dtype]
    header, end = {}, 0
    for name, shape in shapes.items():
        place = [end, end + each * math.prod(shape)]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@contextmanager
def loaded_models(made: list[Any]) -> Iterator[None]:
    """Let a run load its models as always, but that any text is the same tokens; what it builds is
    told."""
    build = building.build

    def told(*arguments: Any) -> Any:
        made.append(build(*arguments))
        return made[-1]

    with (
        mock.patch.object(building, "build", told),
        mock.patch.object(building, "_tokenizer", return_value=tokenize),
    ):
        yield
