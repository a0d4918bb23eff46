"""LoRA files of every key style are the same LoRA; what is none is refused in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sagewan.checkpoint.find import find_model
from sagewan.checkpoint.lora import find_loras, load_lora
from sagewan.errors import CheckpointError, RequestError
from sagewan.plan.lora import Lora, Schedule
from sagewan.plan.models import PUBLISHED, Model
from tests.loras import STYLES, pairs, write
from tests.machines import WAN_14B
from tests.shrunken import transformer

NAME = "wan2.1-t2v-1.3b"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from tests.shrunken import save

    return find_model(str(save(NAME, tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def changes() -> dict[str, Any]:
    return pairs(transformer(NAME, 3))


@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_is_the_same_lora(
    style: str, model: Model, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", changes, style)
    (file,) = find_loras((Lora(path=path, strength=0.5),), model)
    assert set(file.layers) == set(changes)
    assert file.unmatched == ()
    assert (file.rank, file.experts, file.schedule) == (4, (0,), None)
    loaded = load_lora(file)
    for name, (a, b) in changes.items():
        assert loaded[name].a.equal(a)
        assert torch.allclose(loaded[name].b, b * 0.5)


def test_the_alpha_of_peft_is_in_the_files_notes(
    model: Model, changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8}
    path = write(tmp_path / "a.safetensors", changes, lora_adapter_metadata=settings)
    loaded = load_lora(*find_loras((Lora(path=path),), model))
    assert all(torch.allclose(loaded[name].b, 2 * b) for name, (_, b) in changes.items())


def test_a_rank_stabilised_one_is_divided_by_the_root_of_the_rank(
    model: Model, changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": True}
    path = write(tmp_path / "a.safetensors", changes, lora_adapter_metadata=settings)
    loaded = load_lora(*find_loras((Lora(path=path),), model))
    assert all(torch.allclose(loaded[name].b, 4 * b) for name, (_, b) in changes.items())


def test_whole_differences_and_biases_are_read(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.ones(256),
        "diffusion_model.blocks.1.ffn.0.diff_b": torch.ones(192),
        "diffusion_model.blocks.1.modulation.diff": torch.ones(1, 6, 256),
        "diffusion_model.patch_embedding.diff": torch.ones(256, 36, 1, 2, 2),
        "diffusion_model.blocks.7.ffn.0.diff_b": torch.ones(192),
        "lora_te_text_model.lora_down.weight": torch.ones(4, 8),
    }
    save_file(tensors, path)
    (file,) = find_loras((Lora(path=path, strength=2),), model)
    assert file.layers == (
        "blocks.0.attn1.norm_q",
        "blocks.1.ffn.net.0.proj",
        "blocks.1.scale_shift_table",
    )
    # A picture's channels, a block too many, and the text encoder: told, not loaded.
    assert len(file.unmatched) == 3
    assert load_lora(file)["blocks.1.ffn.net.0.proj"].diff_b.eq(2).all()


def test_one_for_another_model_is_refused_with_the_shapes(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", changes, "comfy")
    with pytest.raises(CheckpointError, match=r"none of its 16 layers fits wan2.1-t2v-14b.*5120"):
        find_loras((Lora(path=path),), WAN_14B)


def test_what_is_no_lora_is_refused(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"blocks.0.self_attn.q.weight": torch.ones(256, 256)}, path)
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        find_loras((Lora(path=path),), model)
    save_file({"lora_unet_blocks_0_self_attn_q.hada_w1_a": torch.ones(4, 4)}, path)
    with pytest.raises(CheckpointError, match="a LoHa"):
        find_loras((Lora(path=path),), model)
    with pytest.raises(CheckpointError, match="is missing"):
        find_loras((Lora(path=tmp_path / "b.safetensors"),), model)
    path.write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(CheckpointError, match="is a web page"):
        find_loras((Lora(path=path),), model)


@pytest.mark.parametrize(
    ("lora", "experts", "guessed"),
    [
        (Lora(path=Path("wan_high_noise_r64.safetensors")), (0,), True),
        (Lora(path=Path("Wan2.2-LowNoise.safetensors")), (1,), True),
        (Lora(path=Path("style.safetensors")), (0, 1), False),
        (Lora(path=Path("highlights.safetensors")), (0, 1), False),
        (Lora(path=Path("style.safetensors"), expert="low"), (1,), False),
    ],
)
def test_which_expert(lora: Lora, experts: tuple[int, ...], guessed: bool, tmp_path: Path) -> None:
    model = PUBLISHED["wan2.2-t2v-a14b"]
    path = tmp_path / lora.path.name
    key = "diffusion_model.blocks.0.self_attn.q.diff_b"
    save_file({key: torch.ones(5120)}, path)
    (file,) = find_loras((Lora(path=path, expert=lora.expert),), model)
    assert (file.experts, file.guessed) == (experts, guessed)


def test_an_expert_of_a_model_that_has_one(model: Model) -> None:
    with pytest.raises(RequestError, match="leave low= out"):
        find_loras((Lora(path=Path("a.safetensors"), expert="low"),), model)


def test_the_schedule_is_in_its_notes(
    model: Model, changes: dict[str, Any], tmp_path: Path
) -> None:
    wanted = {"steps": 4, "cfg": 1.0, "shift": 3.0}
    path = write(tmp_path / "a.safetensors", changes, **{"sagewan.sampling": wanted})
    (file,) = find_loras((Lora(path=path),), model)
    assert file.schedule == Schedule(steps=4, cfg=1.0, shift=3.0)
    for wrong in ({"cfg": 1}, {"steps": "4"}, {"steps": 4, "scheduler": "best"}, [4]):
        write(path, changes, **{"sagewan.sampling": wrong})
        with pytest.raises(CheckpointError, match=r"sagewan.sampling|scheduler is none of"):
            find_loras((Lora(path=path),), model)


@pytest.mark.parametrize("part", [0, 1])
def test_numbers_that_are_none_are_refused_by_name(
    part: int, model: Model, changes: dict[str, Any], tmp_path: Path
) -> None:
    name = next(iter(changes))
    spoilt = {key: tuple(x.clone() for x in pair) for key, pair in changes.items()}
    spoilt[name][part][1, 2] = (torch.nan, torch.inf)[part]
    (file,) = find_loras((Lora(path=write(tmp_path / "a.safetensors", spoilt)),), model)
    with pytest.raises(CheckpointError, match=rf"{name}.lora_[AB].weight holds NaN or infinite"):
        load_lora(file)


def test_a_part_that_stands_twice_is_refused(
    model: Model, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", changes)
    tensors = load_file(path)
    name = next(iter(changes))
    tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.zeros_like(changes[name][0])
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"are the same part of {name}"):
        find_loras((Lora(path=path),), model)


def test_a_bare_name_is_looked_for_among_the_models_loras(
    model: Model, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGEWAN_MODELS", str(tmp_path))
    (tmp_path / "loras").mkdir()
    everyones = write(tmp_path / "loras" / "soft.safetensors", changes)
    assert find_loras((Lora(path=Path("soft")),), model)[0].lora.path == everyones
    assert model.location
    own = model.location / "loras"
    own.mkdir()
    mine = write(own / "soft.safetensors", changes)
    for name in ("soft", "soft.safetensors"):
        assert find_loras((Lora(path=Path(name)),), model)[0].lora.path == mine
    (tmp_path / "here" / "soft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert find_loras((Lora(path=Path("soft")),), model)[0].lora.path == mine, "no file, a folder"
    with pytest.raises(CheckpointError, match="sharp"):
        find_loras((Lora(path=Path("sharp")),), model)


def test_the_demo_models_own_lora_brings_its_schedule() -> None:
    (file,) = find_loras((Lora(path=Path("four-steps")),), find_model("demo"))
    assert (len(file.layers), file.unmatched) == (80, ())
    assert file.schedule == Schedule(steps=4, cfg=1.0, shift=3.0, scheduler="euler")
