"""Quantised files hold what ComfyUI's readers expect, and what was asked for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sagewan.checkpoint import convert as converting
from sagewan.checkpoint.calibration import write_calibration
from sagewan.checkpoint.convert import Conversion, convert
from sagewan.checkpoint.names import original_transformer_name, transformer_name
from sagewan.checkpoint.packed import Packed, unpack
from sagewan.checkpoint.roles import TRANSFORMER
from sagewan.checkpoint.source import Source, open_source
from sagewan.errors import Cancelled, CheckpointError, RequestError
from sagewan.reference import formats
from tests.shrunken import transformer

NAME = "wan2.1-i2v-14b"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("transformer")
    transformer(NAME, 3).bfloat16().save_pretrained(folder)
    return open_source(folder, TRANSFORMER)


def quiet(done: int, total: int) -> None:
    assert done <= total


def comfy(source: Source, to: str, path: Path) -> dict[str, torch.Tensor]:
    convert(source, path, Conversion(to=to, layout="comfy"), quiet)
    return load_file(path)


def test_fp8_as_comfy_has_it(source: Source, tmp_path: Path) -> None:
    found = comfy(source, "fp8_scaled", tmp_path / "a.safetensors")
    weight: Any = source.read("blocks.1.ffn.net.0.proj.weight")
    data, scale = found["blocks.1.ffn.0.weight"], found["blocks.1.ffn.0.weight_scale"]
    assert data.dtype == torch.float8_e4m3fn
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert torch.isclose(scale, weight.abs().max().float() / 448)
    assert data.float().equal(formats.e4m3(weight.float() / scale))
    marker = bytes(found["blocks.1.ffn.0.comfy_quant"].tolist())
    assert json.loads(marker) == {"format": "float8_e4m3fn"}


def test_nvfp4_as_comfy_has_it(source: Source, tmp_path: Path) -> None:
    found = comfy(source, "fp4_scaled", tmp_path / "a.safetensors")
    weight: Any = source.read("blocks.0.attn1.to_q.weight")
    rows, columns = weight.shape
    data = found["blocks.0.self_attn.q.weight"]
    block = found["blocks.0.self_attn.q.weight_scale"]
    whole = found["blocks.0.self_attn.q.weight_scale_2"]
    assert (data.dtype, data.shape) == (torch.uint8, (rows, columns // 2))
    assert (block.dtype, block.shape) == (torch.float8_e4m3fn, (rows, columns // 16))
    assert torch.isclose(whole, weight.abs().max().float() / 2688)
    # Read by hand: the high nibble first, the scales of 32 rows apart side by side.
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = torch.stack([data >> 4, data & 15], -1).flatten(1).long()
    values = table[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    row, group = torch.arange(rows)[:, None], torch.arange(columns // 16)[None, :]
    tile = (row // 128) * (columns // 64) + group // 4
    place = tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + group % 4
    scales = block.flatten().float()[place].repeat_interleave(16, 1)
    read = values * scales * whole
    old = weight.float()
    # Each value is the nearest that its block's scale has: of two as near, either.
    step = scales * whole
    nearest = (formats.e2m1(old / step) * step - old).abs()
    assert ((read - old).abs() <= nearest * (1 + 1e-4)).all()
    usual = (formats.nvfp4(weight).value() - old).norm()
    assert 0.8 * usual < (read - old).norm() < 0.92 * usual


@pytest.mark.parametrize("to", ["fp8_scaled", "fp4_scaled"])
@pytest.mark.parametrize("layout", ["comfy", "diffusers"])
def test_what_is_not_quantised_is_the_same_to_the_bit(
    to: str, layout: str, source: Source, tmp_path: Path
) -> None:
    target = tmp_path / ("a.safetensors" if layout == "comfy" else "a")
    written = convert(source, target, Conversion(to=to, layout=layout), quiet)
    found = open_source(target, TRANSFORMER)
    packed = {name for name in found.entries if isinstance(found.read(name), Packed)}
    assert packed == set(written.errors)
    assert len(packed) == 2 * 12
    for name in source.entries:
        old, new = source.read(name), found.read(name)
        if isinstance(new, Packed):
            error = (unpack(new, torch.float32) - old.float()).norm() / old.float().norm()
            assert float(error) == pytest.approx(written.errors[name], rel=1e-3)
            assert written.errors[name] < (0.04 if to == "fp8_scaled" else 0.13)
        else:
            assert new.dtype == old.dtype
            assert new.equal(old)


def test_shards_have_an_index(source: Source, tmp_path: Path) -> None:
    conversion = Conversion(to="fp8_scaled", layout="diffusers", shard_bytes=500_000)
    written = convert(source, tmp_path / "a", conversion, quiet)
    assert len(written.files) > 3
    index = json.loads((tmp_path / "a/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in written.files}
    assert open_source(tmp_path / "a", TRANSFORMER).entries.keys() == source.entries.keys()


@pytest.mark.parametrize("stop", [1, 20, 60])
def test_a_broken_off_conversion_goes_on(stop: int, source: Source, tmp_path: Path) -> None:
    conversion = Conversion(to="fp4_scaled", layout="diffusers", shard_bytes=500_000)
    whole = convert(source, tmp_path / "whole", conversion, quiet)

    def cancel(done: int, total: int) -> None:
        if done == stop:
            raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        convert(source, tmp_path / "a", conversion, cancel)
    told: list[int] = []
    again = convert(source, tmp_path / "a", conversion, lambda done, total: told.append(done))
    assert told == sorted(told)
    assert told[-1] == len(source.entries)
    assert again.errors.keys() == whole.errors.keys()
    for one, other in zip(again.files, whole.files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_damage_in_what_was_written_is_found(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    verify = converting._verify

    def damaged(*arguments: Any) -> None:
        found = load_file(path)
        key = "blocks.1.cross_attn.k.weight"
        found[key] = found[key].roll(1, 0)
        save_file(found, path)
        verify(*arguments)

    monkeypatch.setattr(converting, "_verify", damaged)
    with pytest.raises(CheckpointError, match=r"blocks.1.attn2.to_k.weight was not written"):
        convert(source, path, Conversion(to="fp8_scaled", layout="comfy"), quiet)


def test_what_can_not_be_quantised_is_refused(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = Conversion(to="fp8_scaled", layout="comfy")
    convert(source, tmp_path / "a.safetensors", conversion, quiet)
    again = open_source(tmp_path / "a.safetensors", TRANSFORMER)
    with pytest.raises(CheckpointError, match="float8_e4m3fn already"):
        convert(again, tmp_path / "b.safetensors", conversion, quiet)

    class Full:
        free = 10

    monkeypatch.setattr(converting.shutil, "disk_usage", lambda _: Full)
    with pytest.raises(RequestError, match="free"):
        convert(source, tmp_path / "c.safetensors", conversion, quiet)
    assert not (tmp_path / "c.safetensors.partial").exists()


def test_a_file_of_another_conversion_does_not_pass_for_this_one(
    source: Source, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    convert(source, path, Conversion(to="fp8_scaled", layout="comfy"), quiet)
    with pytest.raises(RequestError, match="is there already, and is not what this would write"):
        convert(source, path, Conversion(to="fp4_scaled", layout="comfy"), quiet)
    before = path.stat().st_mtime_ns
    convert(source, path, Conversion(to="fp8_scaled", layout="comfy"), quiet)
    assert path.stat().st_mtime_ns == before
    path.write_bytes(b"a web page")
    with pytest.raises(RequestError, match="is there already"):
        convert(source, path, Conversion(to="fp8_scaled", layout="comfy"), quiet)


def test_weights_in_other_shards_are_not_mixed_with(source: Source, tmp_path: Path) -> None:
    whole = Conversion(to="fp8_scaled", layout="diffusers")
    convert(source, tmp_path / "a", replace(whole, shard_bytes=500_000), quiet)
    with pytest.raises(RequestError, match="is there already"):
        convert(source, tmp_path / "a", whole, quiet)
    with pytest.raises(RequestError, match="is there already"):
        convert(source, tmp_path / "a", replace(whole, shard_bytes=800_000), quiet)
    convert(source, tmp_path / "a", replace(whole, shard_bytes=500_000), quiet)


@pytest.mark.parametrize("by_file", [False, True])
def test_the_source_is_not_written_over(by_file: bool, source: Source, tmp_path: Path) -> None:
    folder = shutil.copytree(source.path, tmp_path / "transformer")
    own = next(folder.glob("*.safetensors")) if by_file else folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RequestError, match="is the source itself: name another place"):
        convert(
            open_source(own, TRANSFORMER),
            folder,
            Conversion(to="fp4_scaled", layout="diffusers"),
            quiet,
        )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_names_go_there_and_back(source: Source) -> None:
    for name in source.entries:
        assert transformer_name(original_transformer_name(name)) == name


def test_measured_inputs_change_the_numbers_and_no_scale_and_are_not_mixed_with_others(
    source: Source, tmp_path: Path
) -> None:
    plain = comfy(source, "fp8_scaled", tmp_path / "plain.safetensors")
    name = "blocks.1.ffn.net.0.proj"
    measured = tmp_path / "measured.safetensors"
    columns = source.entries[f"{name}.weight"].shape[1]
    write_calibration(measured, {name: torch.linspace(0, 2, columns).expand(1, columns)})
    conversion = Conversion(to="fp8_scaled", layout="comfy", measured=measured)
    # Those of another rounding are not taken for these.
    with pytest.raises(RequestError, match="is not what this would write"):
        convert(source, tmp_path / "plain.safetensors", conversion, quiet)
    convert(source, tmp_path / "own.safetensors", conversion, quiet)
    own = load_file(tmp_path / "own.safetensors")
    assert own.keys() == plain.keys()
    changed = [key for key in own if not own[key].float().equal(plain[key].float())]
    assert changed == ["blocks.1.ffn.0.weight"]
    # What it loses of that direction it makes up for.
    weight: Any = source.read(f"{name}.weight")
    direction = torch.linspace(0, 2, columns)
    lost = [
        (
            file["blocks.1.ffn.0.weight"].float() * file["blocks.1.ffn.0.weight_scale"]
            - weight.float()
        )
        @ direction
        for file in (plain, own)
    ]
    assert lost[1].norm() < 0.3 * lost[0].norm()
