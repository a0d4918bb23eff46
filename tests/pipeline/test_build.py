import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.find import find_model
from sagewan.checkpoint.lora import find_loras
from sagewan.errors import CheckpointError
from sagewan.pipeline.build import Components, build
from sagewan.pipeline.loaded import Part
from sagewan.pipeline.session import Session
from sagewan.plan.lora import Lora, LoraFile
from sagewan.plan.models import PUBLISHED
from tests.loras import pairs, write
from tests.pipeline.runs import plain_plan, plan_for

Folder = Callable[[str], Path]


def components(folder: Path, dtype: str = "float32") -> Components:
    plan = plain_plan(find_model(str(folder)), dtype)
    return build(plan, Launcher())


@pytest.fixture
def copied(shrunken_folder: Folder, tmp_path: Path) -> Path:
    return shutil.copytree(shrunken_folder("wan2.1-i2v-14b"), tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_parts(dtype: torch.dtype, shrunken_folder: Folder) -> None:
    parts = components(shrunken_folder("wan2.1-i2v-14b"), str(dtype).removeprefix("torch."))
    (transformer,) = parts.transformers
    with transformer.on("cpu") as module:
        for name, weight in module.named_parameters():
            kept = any(part in name for part in module._keep_in_fp32_modules)
            assert weight.dtype == (torch.float32 if kept else dtype), name
        assert transformer.weight_bytes == sum(weight.nbytes for weight in module.parameters())
    for part in (parts.vae, parts.image_encoder):
        with part.on("cpu") as module:
            assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    with parts.text_encoder.on("cpu") as module:
        # float16 is too narrow for UMT5.
        expected = torch.bfloat16 if dtype == torch.float16 else dtype
        assert {weight.dtype for weight in module.parameters()} == {expected}


def test_weights_are_those_of_the_files(shrunken_folder: Folder) -> None:
    folder = shrunken_folder("wan2.2-t2v-a14b")
    for part in components(folder).transformers:
        saved = load_file(folder / part.name / "diffusion_pytorch_model.safetensors")
        with part.on("cpu") as module:
            found = dict(module.named_parameters())
            assert found.keys() == saved.keys()
            assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_which_parts_a_model_has(shrunken_folder: Folder) -> None:
    for name, published in PUBLISHED.items():
        found = components(shrunken_folder(name))
        assert len(found.transformers) == published.experts
        assert (found.image_encoder is not None) == published.image_encoder
        assert (found.image_processor is not None) == published.image_encoder
        assert found.weight_bytes == 0


def test_a_part_is_freed_even_if_it_is_still_held(shrunken_folder: Folder) -> None:
    part = components(shrunken_folder("wan2.1-t2v-1.3b")).vae
    with part.on("cpu") as held:
        assert not held.training
        assert not any(weight.requires_grad for weight in held.parameters())
    assert {weight.device.type for weight in held.parameters()} == {"meta"}
    with pytest.raises(ZeroDivisionError), part.on("cpu") as held:
        raise ZeroDivisionError
    assert {weight.device.type for weight in held.parameters()} == {"meta"}


def test_only_one_part_is_in_memory_at_a_time(
    shrunken_folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from contextlib import contextmanager

    from tests.pipeline.runs import latents_of, picture

    on, present, most, order = Part.on, set(), [], []

    @contextmanager
    def counted(self: Part, place: object, **more: object) -> Any:
        order.append(self.name)
        present.add(self.name)
        most.append(len(present))
        with on(self, place, **more) as module:
            yield module
        present.discard(self.name)

    monkeypatch.setattr(Part, "on", counted)
    path = picture(tmp_path / "a.png", 1)
    latents_of(plan_for(shrunken_folder("wan2.2-i2v-a14b"), image=path))
    assert order == ["text_encoder", "vae", "transformer", "transformer_2"]
    assert max(most) == 1


def test_the_hub_is_never_asked(shrunken_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", asked)
    parts = components(shrunken_folder("wan2.1-i2v-14b"))
    for part in (parts.text_encoder, parts.vae, parts.image_encoder, *parts.transformers):
        with part.on("cpu"):
            pass


def test_no_progress_bars_of_the_libraries(
    shrunken_folder: Folder, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = components(shrunken_folder("wan2.1-i2v-14b"))
    for part in (parts.text_encoder, parts.vae, parts.image_encoder, *parts.transformers):
        with part.on("cpu"):
            pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("transformer", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("image_encoder", "model"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_weights_that_don_t_fit_are_refused(part: str, file: str, fault: str, copied: Path) -> None:
    path = copied / part / f"{file}.safetensors"
    weights = load_file(path)
    name = max(weights, key=lambda key: weights[key].numel() if "embed" not in key else 0)
    if fault == "missing":
        del weights[name]
    else:
        weights[name] = torch.zeros(weights[name].shape[0] + 1, *weights[name].shape[1:])
    save_file(weights, path, metadata={"format": "pt"})
    parts = components(copied)
    all_parts = (parts.text_encoder, parts.vae, parts.image_encoder, *parts.transformers)
    (spoilt,) = [found for found in all_parts if found.name == part]
    with pytest.raises(CheckpointError, match=f"{part}.*fetch it again") as error, spoilt.on("cpu"):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"a": 1}'),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "none"}}'),
        ("tokenizer_config.json", "{}"),
    ],
)
def test_a_broken_tokenizer_is_refused(copied: Path, file: str, text: str) -> None:
    (copied / "tokenizer" / file).write_text(text)
    with pytest.raises(CheckpointError, match="tokenizer") as error:
        components(copied)
    assert "\n" not in str(error.value)


def test_a_model_known_by_name_alone_can_t_be_built() -> None:
    with pytest.raises(CheckpointError, match="only its name is known"):
        build(plain_plan(PUBLISHED["wan2.1-t2v-14b"]), Launcher())


def test_sharded_weights_are_read(copied: Path, shrunken_folder: Folder) -> None:
    from diffusers import WanTransformer3DModel

    whole = WanTransformer3DModel.from_pretrained(copied / "transformer")
    shutil.rmtree(copied / "transformer")
    whole.save_pretrained(copied / "transformer", max_shard_size="1MB")
    index = copied / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    with components(copied).transformers[0].on("cpu") as module:
        for name, weight in module.named_parameters():
            assert torch.equal(weight, whole.get_parameter(name))


def renamed(path: Path, name: Callable[[str], str]) -> None:
    weights = load_file(path)
    found = {name(key): weight for key, weight in weights.items()}
    save_file(found, path, metadata={"format": "pt"})


def test_the_published_names_of_clip_and_umt5_are_read(
    copied: Path, shrunken_folder: Folder
) -> None:
    clip = copied / "image_encoder" / "model.safetensors"
    renamed(clip, lambda key: f"vision_model.{key.removeprefix('vision_model.')}")
    umt5 = copied / "text_encoder" / "config.json"
    umt5.write_text(json.dumps({**json.loads(umt5.read_text()), "tie_word_embeddings": False}))
    parts, expected = components(copied), components(shrunken_folder("wan2.1-i2v-14b"))
    for part, original in (
        (parts.image_encoder, expected.image_encoder),
        (parts.text_encoder, expected.text_encoder),
    ):
        with part.on("cpu") as found, original.on("cpu") as same:
            pairs = zip(found.parameters(), same.parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("part", "file", "key", "value"),
    [
        ("vae", "config.json", "dim_mult", "x"),
        ("vae", "config.json", "temperal_downsample", 3),
        ("transformer", "config.json", "rope_max_seq_len", "x"),
        ("text_encoder", "config.json", "num_layers", "x"),
        ("image_encoder", "config.json", "hidden_size", "x"),
        ("image_processor", "preprocessor_config.json", "size", "x"),
        ("image_processor", "preprocessor_config.json", "size", None),
        ("image_processor", "preprocessor_config.json", "crop_size", None),
        ("image_processor", "preprocessor_config.json", "image_mean", "x"),
        ("image_processor", "preprocessor_config.json", "image_std", [None]),
        ("image_processor", "preprocessor_config.json", "rescale_factor", "x"),
        ("image_processor", "preprocessor_config.json", "resample", -1),
    ],
)
def test_values_of_a_wrong_type_are_one_sentence(
    part: str, file: str, key: str, value: object, copied: Path
) -> None:
    path = copied / part / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    def load() -> None:
        parts = components(copied)
        for found in (parts.text_encoder, parts.vae, parts.image_encoder, *parts.transformers):
            with found.on("cpu"):
                pass

    with pytest.raises(CheckpointError, match=f"{part} can't be read .*: fetch it again") as error:
        load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "file", "key", "value", "sentence"),
    [
        ("vae", "config.json", "patch_size", "x", "patch_size is 'x'"),
        ("vae", "config.json", "patch_size", [1, 2], r"patch_size is \[1, 2\]"),
        ("vae", "config.json", "patch_size", 0, "patch_size is 0"),
        ("vae", "config.json", "patch_size", 3, "its layers make 24"),
        ("vae", "config.json", "scale_factor_spatial", 3, "is 3, and its layers make 8"),
        ("vae", "config.json", "scale_factor_temporal", True, "its layers make 4"),
        ("vae", "config.json", "latents_std", [1.0], "1 numbers for 16"),
        ("vae", "config.json", "latents_mean", ["x"] * 16, "no list of numbers"),
        ("image_processor", "preprocessor_config.json", "crop_size", 3, "pictures become"),
        ("image_processor", "preprocessor_config.json", "image_std", 0, "finite numbers"),
    ],
)
def test_settings_that_would_fail_in_the_middle_of_a_run(
    part: str, file: str, key: str, value: object, sentence: str, copied: Path
) -> None:
    path = copied / part / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=sentence) as error, components(copied).vae.on("cpu"):
        pass
    assert "\n" not in str(error.value)


def test_out_of_memory_is_no_damage(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKLWan

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(AutoencoderKLWan, "from_config", full)
    with pytest.raises(RuntimeError, match="allocate memory"), components(copied).vae.on("cpu"):
        pass


def test_a_lora_is_on_its_expert_alone(shrunken_folder: Folder, tmp_path: Path) -> None:
    folder = shrunken_folder("wan2.2-t2v-a14b")
    with components(folder).transformers[0].on("cpu") as module:
        path = write(tmp_path / "a.safetensors", pairs(module))
    model = find_model(str(folder))
    loras = find_loras((Lora(path=path, expert="low"),), model)
    plan = plain_plan(model, loras=loras)
    changed = []
    for part in build(plan, Launcher()).transformers:
        with part.on("cpu") as module:
            changed.append(sum(name.endswith(".lora") for name, _ in module.named_modules()))
    assert changed == [0, 16]


def test_another_lora_does_not_load_the_model_again(
    shrunken_folder: Folder, tmp_path: Path
) -> None:
    model = find_model(str(shrunken_folder("wan2.1-t2v-1.3b")))
    session = Session()

    def outputs(*loras: LoraFile) -> tuple[Any, torch.Tensor]:
        plan = plain_plan(model, loras=loras)
        (part,) = build(plan, Launcher(), session).transformers
        with part.on("cpu") as module, torch.inference_mode():
            return module, module.blocks[0].ffn(torch.ones(1, 3, 256))

    module, plain = outputs()
    files = []
    for seed in (0, 1):
        path = write(tmp_path / f"{seed}.safetensors", pairs(module, seed, size=0.5))
        files += find_loras((Lora(path=path),), model)
    seen = [outputs(files[0]), outputs(files[1]), outputs(*files), outputs(), outputs(files[0])]
    assert all(other is module for other, _ in seen)
    first, second, both, none, again = (x for _, x in seen)
    assert none.equal(plain)
    assert again.equal(first)
    assert not any(x.equal(plain) for x in (first, second, both))
    session.close()


@pytest.mark.parametrize("before", [True, False])
def test_a_lora_that_can_not_be_put_on_leaves_nothing_on(
    before: bool, shrunken_folder: Folder, tmp_path: Path
) -> None:
    model = find_model(str(shrunken_folder("wan2.1-t2v-1.3b")))
    with components(model.location or Path()).transformers[0].on("cpu") as module:
        changes = pairs(module, size=0.5)
    good, spoilt = (write(tmp_path / f"{x}.safetensors", changes) for x in ("good", "spoilt"))
    first, second = (find_loras((Lora(path=x),), model)[0] for x in (good, spoilt))
    tensors = load_file(spoilt)
    save_file({name: x * torch.nan for name, x in tensors.items()}, spoilt)

    with Session() as session:

        def output(*loras: LoraFile) -> torch.Tensor:
            (part,) = build(plain_plan(model, loras=loras), Launcher(), session).transformers
            with part.on("cpu") as module, torch.inference_mode():
                found: torch.Tensor = module.blocks[0].ffn(torch.ones(1, 3, 256))
                return found

        worn = (first,) if before else ()
        expected = output(*worn)
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            output(first, second)
        assert output(*worn).equal(expected)
