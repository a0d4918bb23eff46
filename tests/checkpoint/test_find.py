import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sagewan.checkpoint.find import REPOSITORIES, find_model
from sagewan.checkpoint.folder import PARTS
from sagewan.errors import CheckpointError, RequestError
from sagewan.plan.models import PUBLISHED
from tests.published import VAES, write_folder

T2V, I2V = "wan2.1-t2v-14b", "wan2.1-i2v-14b"


@pytest.fixture(autouse=True)
def no_models_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGEWAN_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_folder_is_read_as_the_published_model(name: str, tmp_path: Path) -> None:
    folder = write_folder(name, tmp_path / "any name")
    found = find_model(str(folder))
    assert found == replace(PUBLISHED[name], name="any name", location=folder, parts=found.parts)
    names = [name for name in PARTS if (folder / name).is_dir()]
    assert found.parts == {name: folder / name for name in names}


@pytest.mark.parametrize("place", ["name", "repository", "cache", "cache without a ref"])
def test_a_name_finds_its_files(place: str, tmp_path: Path) -> None:
    repository = REPOSITORIES[T2V]
    cached = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    folder = {
        "name": tmp_path / "models" / T2V,
        "repository": tmp_path / "models" / repository.partition("/")[2],
    }.get(place, cached / "snapshots" / "abc")
    write_folder(T2V, folder)
    if place == "cache":
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("abc\n")
    found = find_model(T2V)
    assert found == replace(PUBLISHED[T2V], location=folder, parts=found.parts)


def test_every_published_name_has_a_repository() -> None:
    assert REPOSITORIES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_without_files_has_its_published_values_if_that_is_enough(name: str) -> None:
    assert find_model(name, need_files=False) == PUBLISHED[name]
    with pytest.raises(CheckpointError, match=f"sagewan download {name} --from hf"):
        find_model(name)


def test_the_demo_is_in_the_package() -> None:
    demo = find_model("demo")
    assert demo.is_demo
    assert demo.name == "demo"
    assert demo.tasks == ("t2v", "i2v")
    assert demo.head_dim == 128
    settings = json.loads((demo.location or Path()).joinpath("sagewan.json").read_text())
    assert demo.sampling.size == (settings["width"], settings["height"])
    assert demo.sampling.steps == settings["steps"]
    assert {"ball", "球"} <= set(demo.words["shape"])


def test_finding_imports_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; from sagewan.checkpoint.find import find_model; find_model('demo'); "
        "assert not {'torch', 'numpy', 'diffusers', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_shrunken_folders_saved_by_diffusers_are_read(
    shrunken_folder: Callable[[str], Path],
) -> None:
    for name, published in PUBLISHED.items():
        model = find_model(str(shrunken_folder(name)))
        for trait in ("tasks", "family", "experts", "boundary", "in_channels", "spatial", "patch"):
            assert getattr(model, trait) == getattr(published, trait), (name, trait)
        assert model.heads == 2
        assert model.words == {}


def test_what_the_weights_are_stored_in_is_seen(tmp_path: Path) -> None:
    folder = write_folder(T2V, tmp_path / "a")
    weights = {"a": ("F32", 100), "b": ("F32", 48), "c": ("BF16", 60)}
    header, end = {}, 0
    for name, (dtype, nbytes) in weights.items():
        size = nbytes // (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    for part, file in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = folder / part / f"{file}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    found = find_model(str(folder))
    assert found.dtypes == {"transformer": "float32", "text_encoder": "float32"}
    assert found.made_anew("transformer", "bfloat16")
    assert not found.made_anew("transformer", "float32")
    assert not PUBLISHED[T2V].made_anew("transformer", "bfloat16"), "not looked at"


def test_an_unknown_size_samples_like_the_nearest_model_with_its_own_shift(tmp_path: Path) -> None:
    folder = write_folder("wan2.2-ti2v-5b", tmp_path / "mine")
    change(folder / "transformer/config.json", num_layers=28)
    change(folder / "scheduler/scheduler_config.json", flow_shift=8.0)
    model = find_model(str(folder))
    assert model.sampling == replace(PUBLISHED["wan2.2-ti2v-5b"].sampling, shift=8.0)
    change(
        folder / "scheduler/scheduler_config.json",
        _class_name="FlowMatchEulerDiscreteScheduler",
        flow_shift=None,
        shift=2.0,
    )
    assert find_model(str(folder)).sampling.scheduler == "flow-euler"


def test_a_vae_config_without_scale_factors_means_those_of_wan_2_1(tmp_path: Path) -> None:
    assert "scale_factor_spatial" not in VAES[T2V]
    model = find_model(str(write_folder(T2V, tmp_path / "old")))
    assert (model.spatial, model.temporal, model.grid) == (8, 4, (16, 16))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def remove(path: Path) -> None:
    for file in path.glob("*"):
        file.unlink()
    path.rmdir()


REFUSALS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no index": (T2V, lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
    "index cut": (T2V, lambda f: (f / "model_index.json").write_text("{"), "not valid JSON"),
    "other pipeline": (
        T2V,
        lambda f: change(f / "model_index.json", _class_name="FluxPipeline"),
        "describes FluxPipeline",
    ),
    "no pipeline": (T2V, lambda f: (f / "model_index.json").write_text("{}"), "describes None"),
    "other transformer": (
        T2V,
        lambda f: change(f / "transformer/config.json", _class_name="FluxTransformer2DModel"),
        "describes FluxTransformer2DModel, and a Wan model has WanTransformer3DModel",
    ),
    "other vae": (
        T2V,
        lambda f: change(f / "vae/config.json", _class_name="AutoencoderKL"),
        "describes AutoencoderKL,",
    ),
    "other text encoder": (
        T2V,
        lambda f: change(f / "text_encoder/config.json", model_type="t5"),
        "describes t5",
    ),
    "text encoder of another model": (
        T2V,
        lambda f: change(f / "text_encoder/config.json", d_model=768),
        "parts of two models",
    ),
    "nonsense in a config": (
        T2V,
        lambda f: change(f / "transformer/config.json", num_layers="many"),
        "num_layers is 'many'",
    ),
    "channels that fit no task": (
        T2V,
        lambda f: change(f / "transformer/config.json", in_channels=17),
        "in_channels is 17",
    ),
    "no transformer": (T2V, lambda f: remove(f / "transformer"), "no folder transformer"),
    "no vae": (T2V, lambda f: remove(f / "vae"), "no folder vae"),
    "no tokenizer": (T2V, lambda f: remove(f / "tokenizer"), "no folder tokenizer"),
    "no image encoder": (I2V, lambda f: remove(f / "image_encoder"), "no folder image_encoder"),
    "image encoder not named": (
        I2V,
        lambda f: change(f / "model_index.json", image_encoder=[None, None]),
        "names no image_encoder",
    ),
    "no weights": (
        T2V,
        lambda f: (f / "transformer/diffusion_pytorch_model.safetensors").unlink(),
        "holds no weights",
    ),
    "weights cut short": (
        T2V,
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\x09\0\0\0"),
        "vae.*cut short",
    ),
    "no second expert": (
        "wan2.2-t2v-a14b",
        lambda f: remove(f / "transformer_2"),
        "no folder transformer_2",
    ),
    "no boundary": (
        "wan2.2-t2v-a14b",
        lambda f: change(f / "model_index.json", boundary_ratio=None),
        "transformer_2 and boundary_ratio",
    ),
    "boundary of no sense": (
        "wan2.2-t2v-a14b",
        lambda f: change(f / "model_index.json", boundary_ratio=875),
        "boundary_ratio is 875",
    ),
    "experts of two models": (
        "wan2.2-t2v-a14b",
        lambda f: change(f / "transformer_2/config.json", num_layers=30),
        "different shapes",
    ),
    "settings cut": (
        T2V,
        lambda f: (f / "sagewan.json").write_text('{"width": 256}'),
        "sagewan.json lacks height",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_folder_that_is_not_a_whole_wan_model_is_refused(case: str, tmp_path: Path) -> None:
    name, spoil, sentence = REFUSALS[case]
    folder = write_folder(name, tmp_path / "model")
    find_model(str(folder))
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=sentence) as refused:
        find_model(str(folder))
    assert isinstance(refused.value, RequestError)
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder or file, and the names are demo"):
        find_model(str(tmp_path / "nowhere"))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        find_model(str(tmp_path / "model.safetensors"))


def test_a_folder_of_somebody_unknown_is_one_sentence() -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        find_model("~nobody-of-this-name")
