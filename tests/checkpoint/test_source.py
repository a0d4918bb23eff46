from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from sagewan.checkpoint.infer import config_of, main_format
from sagewan.checkpoint.names import transformer_name
from sagewan.checkpoint.packed import Packed, unpack
from sagewan.checkpoint.source import Source, open_source
from sagewan.errors import CheckpointError
from tests import shrunken
from tests.checkpoint.writers import WRITERS, is_quantised, original_name
from tests.published import TRANSFORMERS

NAMES = tuple(TRANSFORMERS)


def numbers(source: Source, name: str) -> Tensor:
    found = source.read(name)
    return unpack(found, torch.float32) if isinstance(found, Packed) else found.float()


def state_of(name: str) -> dict[str, Tensor]:
    return shrunken.transformer(name, 3).state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_that_diffusers_converts_to(name: str) -> None:
    state = {key: torch.empty(0) for key in state_of(name)}
    originals = {original_name(key): value for key, value in state.items()}
    converted = {key: transformer_name(key) for key in originals}
    assert set(converted.values()) == state.keys()
    by_diffusers = convert_wan_transformer_to_diffusers(dict(originals))
    # It leaves the positions of the two pictures of the first-last-frame model as they are.
    ours = {value: value for value in converted.values()}
    ours["img_emb.emb_pos"] = ours.pop("condition_embedder.image_embedder.pos_embed", None)
    assert by_diffusers.keys() - {"img_emb.emb_pos"} <= ours.keys()


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("name", ["wan2.1-flf2v-14b", "wan2.2-ti2v-5b"])
def test_every_format_is_read_as_what_it_means(file: str, name: str, tmp_path: Path) -> None:
    kind, write = WRITERS[file]
    state = state_of(name)
    if file == "q6_k.gguf":
        # Its blocks are of 256 numbers.
        state = {k: v[..., :192].repeat(1, 4) if v.ndim == 2 and v.shape[1] == 192 else v
                 for k, v in state.items()}  # fmt: skip
    means = write(state, tmp_path / file)
    source = open_source(tmp_path / file, "transformer")
    assert source.entries.keys() == state.keys()
    assert source.unknown == ()
    assert main_format(source) == kind
    for key, expected in means.items():
        assert source.entries[key].shape == state[key].shape, key
        assert torch.equal(numbers(source, key), expected), key
    matrix = source.read("blocks.1.attn1.to_q.weight")
    assert isinstance(matrix, Packed) == (kind not in ("bfloat16", "float16"))
    if isinstance(matrix, Packed):
        assert matrix.full_precision == (file in ("comfy_scaled.safetensors",
                                                  "comfy_quant.safetensors"))  # fmt: skip
    config = config_of(source)
    expected_config = shrunken.transformer_config(name)
    same = {key: value for key, value in expected_config.items() if key in config}
    if file != "q6_k.gguf":
        assert {key: config[key] for key in same} == same
    assert set(expected_config) <= set(config) | {"qk_norm"}


def test_quantised_matrices_are_most_of_what_is_tested() -> None:
    state = state_of("wan2.1-t2v-14b")
    assert sum(is_quantised(name, weight) for name, weight in state.items()) == 2 * 10


def test_reading_maps_pages_and_leaves_the_file_alone(
    tmp_path: Path, shrunken_folder: Callable[[str], Path]
) -> None:
    folder = shrunken_folder("wan2.1-t2v-1.3b") / "transformer"
    file = folder / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    source = open_source(folder, "transformer")
    name = "blocks.0.attn1.to_q.weight"
    weight, again = source.read(name), source.read(name)
    assert isinstance(weight, Tensor)
    assert isinstance(again, Tensor)
    assert weight.data_ptr() == again.data_ptr(), "one mapping, no copies"
    weight.zero_()
    assert file.read_bytes() == before


def test_a_large_file_is_mapped_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagewan.checkpoint.tensors._WINDOW", 100_000)
    state = state_of("wan2.1-t2v-1.3b")
    means = WRITERS["kijai.safetensors"][1](state, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors", "transformer")
    read = {name: source.read(name) for name in source.entries}
    (file,) = source.files
    assert 5 < len(file._mapped) < len(read), "fewer than tensors, which are limited by handles"
    assert all(torch.equal(numbers(source, name), means[name]) for name in means)


@pytest.mark.parametrize("at", [0, 100, 255])
def test_one_wrong_scale_among_many_is_found(at: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    WRITERS["lightx2v_fp8.safetensors"][1](state_of("wan2.1-t2v-1.3b"), path)
    for value in (0.0, float("nan"), float("inf"), -1e-3, 1e9):
        found = load_file(path)
        found["blocks.1.self_attn.o.weight_scale"][at] = value
        save_file(found, tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=r"blocks\.1\.self_attn\.o\.weight is"):
            open_source(tmp_path / "bad.safetensors", "transformer")
