import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import shrunken
from tests.checkpoint.writers import WRITERS
from tests.cli.conftest import Said, seconds_of_children

Run = Callable[..., Said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer in some of the forms that people have."""
    folder = tmp_path_factory.mktemp("inspect")
    state = shrunken.transformer("wan2.1-t2v-14b", 3).state_dict()
    for name in ("kijai.safetensors", "lightx2v_int8.safetensors", "q8_0.gguf", "original.pth"):
        WRITERS[name][1](state, folder / name)
    return folder


@pytest.mark.parametrize(
    ("file", "container", "format_", "scales"),
    [
        ("kijai.safetensors", "safetensors", "float8_e4m3fn", "per tensor"),
        ("lightx2v_int8.safetensors", "safetensors", "int8", "per row"),
        ("q8_0.gguf", "gguf", "gguf:Q8_0", "per block"),
        ("original.pth", "pth", "bfloat16", "none"),
    ],
)
def test_what_a_file_is(
    file: str, container: str, format_: str, scales: str, folder: Path, sagewan: Run
) -> None:
    said = sagewan("inspect", folder / file, "--json")
    assert said.code == 0
    found = json.loads(said.out)
    assert (found["kind"], found["family"], found["tasks"]) == ("transformer", "wan2.1", ["t2v"])
    assert found["problems"] == []
    assert "its VAE of 16 channels is missing" in found["missing"]
    (part,) = found["parts"]
    assert (part["container"], part["format"], part["scales"]) == (container, format_, scales)
    assert part["quantized"] == (0 if format_ == "bfloat16" else 20)
    assert sum(part["formats"].values()) == part["bytes"]
    said = sagewan("inspect", folder / file)
    assert said.code == 0
    assert format_ in said.out
    assert "2 blocks, 256 wide, 16 channels in" in said.out


def test_the_demo_by_its_name(sagewan: Run) -> None:
    found = json.loads(sagewan("inspect", "demo", "--json").out)
    assert (found["kind"], found["name"], found["family"]) == ("model", "demo", "demo")
    assert [part["role"] for part in found["parts"]] == ["transformer", "vae", "text_encoder"]


def test_a_lora_is_called_one(tmp_path: Path, sagewan: Run) -> None:
    name = "diffusion_model.blocks.{}.self_attn.q.lora_{}.weight"
    tensors = {}
    for block in range(3):
        tensors[name.format(block, "A")] = torch.zeros(8, 5120)
        tensors[name.format(block, "B")] = torch.zeros(5120, 8)
    save_file(tensors, tmp_path / "style.safetensors")
    said = sagewan("inspect", tmp_path / "style.safetensors")
    assert said.code == 0
    assert "3 layers of rank 8" in said.out
    assert "wan2.1-t2v-14b" in said.out


def test_problems_are_listed_and_exit_2(folder: Path, tmp_path: Path, sagewan: Run) -> None:
    found = load_file(folder / "kijai.safetensors")
    del found["blocks.1.cross_attn.norm_q.weight"]
    found["vace_blocks.0.weight"] = torch.zeros(3)
    save_file(found, tmp_path / "odd.safetensors")
    said = sagewan("inspect", tmp_path / "odd.safetensors", "--json")
    assert said.code == 2
    lacks, more = json.loads(said.out)["problems"]
    assert "lacks 1 of its weights, such as blocks.1.attn2.norm_q.weight" in lacks
    assert "no place for, such as vace_blocks.0.weight" in more


def test_nothing_there(tmp_path: Path, sagewan: Run) -> None:
    said = sagewan("inspect", tmp_path / "nowhere")
    assert (said.code, said.out) == (2, "")
    assert "there is no such file or folder" in said.err


@pytest.mark.parametrize("file", ["kijai.safetensors", "q8_0.gguf"])
def test_headers_take_no_torch_and_no_time(file: str, folder: Path) -> None:
    program = (
        "import sys\nfrom sagewan.cli import main\ncode = main(sys.argv[1:])\n"
        "assert not {'torch', 'numpy', 'gguf'} & sys.modules.keys()\nsys.exit(code)\n"
    )
    with seconds_of_children() as spent:
        done = subprocess.run(
            [sys.executable, "-c", program, "inspect", str(folder / file)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert spent() < 2, f"{spent():.1f} s"


def test_models_lists_the_folder_and_what_is_wrong_in_it(
    folder: Path, tmp_path: Path, sagewan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setenv("SAGEWAN_MODELS", str(models))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (models / "mine.gguf").write_bytes((folder / "q8_0.gguf").read_bytes())
    (models / "page.safetensors").write_text("<html>")
    for name in ("empty", "loras", "vae", "text_encoders"):
        (models / name).mkdir()
    said = sagewan("models")
    assert said.code == 0
    lines = {line.partition(": ")[0]: line for line in said.out.splitlines()}
    assert "t2v, gguf:Q8_0" in lines["mine.gguf"]
    assert "is a web page" in lines["page.safetensors"]
    assert "no model_index.json" in lines["empty"]
    assert lines["models folder"].endswith(str(models))
    found = json.loads(sagewan("models", "--json").out)
    names = [row["name"] for row in found["models"]]
    assert names == ["demo", "empty", "page.safetensors", "mine.gguf"]
