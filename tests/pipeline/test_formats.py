"""The same video from every form of the weights, within what the form can hold."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sagewan.cli import main
from tests.checkpoint import writers
from tests.checkpoint.trees import weights
from tests.checkpoint.writers import WRITERS
from tests.pipeline.runs import difference, latents_of, plan_for

Folder = Callable[[str], Path]
NAME = "wan2.2-ti2v-5b"
# ‖out − original‖ / ‖original‖ of the latents after three steps, twice what was found. The model is
# random, so that it gives no measure of quality, and of the matrices those of the blocks alone are
# quantised.
BOUNDS = {
    "original.safetensors": 0.01,
    "original.pth": 0.01,
    "comfy_16.safetensors": 0.002,
    "kijai.safetensors": 0.06,
    "comfy_quant.safetensors": 0.06,
    "lightx2v_blocks": 0.06,
    "lightx2v_int8.safetensors": 0.03,
    "comfy_nvfp4.safetensors": 0.2,
    "lightx2v_nvfp4.safetensors": 0.2,
    "comfy_mxfp8.safetensors": 0.08,
    "q8_0.gguf": 0.02,
    "q4_0.gguf": 0.2,
}


@pytest.fixture(scope="module")
def expected(shrunken_folder: Folder) -> torch.Tensor:
    return latents_of(plan_for(shrunken_folder(NAME)))


@pytest.mark.parametrize("file", BOUNDS)
def test_every_form_makes_the_same_latents(
    file: str, expected: torch.Tensor, shrunken_folder: Folder, tmp_path: Path
) -> None:
    folder = shutil.copytree(shrunken_folder(NAME), tmp_path / "model")
    path = folder / file
    WRITERS[file][1](weights(folder / "transformer"), path)
    shutil.rmtree(folder / "transformer")
    found = difference(latents_of(plan_for(path)), expected)
    assert found < BOUNDS[file], f"{found:.4f}"
    lossless = file.startswith(("original", "comfy_16"))
    assert lossless or found > 0.001, "the quantised weights ran"


def test_a_video_of_the_demo_model_from_one_file(tmp_path: Path) -> None:
    from sagewan.checkpoint.find import demo_folder

    folder = shutil.copytree(demo_folder(), tmp_path / "demo")
    WRITERS["q8_0.gguf"][1](weights(folder / "transformer"), folder / "demo.gguf")
    shutil.rmtree(folder / "transformer")
    words = ["a red ball rolls to the right", "--model", str(folder / "demo.gguf"), "--steps", "2"]
    words += ["--size", "64x64", "--frames", "5", "--seed", "1", "-o", str(tmp_path / "a.mp4")]
    assert main(["generate", *words]) == 0
    assert (tmp_path / "a.mp4").stat().st_size > 1000


def test_matrices_outside_the_blocks_may_be_packed_too(
    expected: torch.Tensor,
    shrunken_folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writers, "is_quantised", lambda _, weight: weight.ndim == 2)
    folder = shutil.copytree(shrunken_folder(NAME), tmp_path / "model")
    writers.gguf_writer("Q8_0")(weights(folder / "transformer"), folder / "all.gguf")
    shutil.rmtree(folder / "transformer")
    assert difference(latents_of(plan_for(folder / "all.gguf")), expected) < 0.03
