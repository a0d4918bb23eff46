"""What was measured of the inputs is found beside the weights, or where it was kept."""

import errno
from pathlib import Path

import pytest
import torch

from sagewan.checkpoint.calibration import (
    by_layer,
    find_calibration,
    measured_layer,
    place_of,
    write_calibration,
)
from sagewan.errors import CheckpointError

Q = "blocks.3.attn1.to_q"


def test_it_is_kept_and_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    assert find_calibration(folder) is None
    known = {Q: torch.randn(8, 32), "blocks.3.ffn.net.2": torch.randn(4, 48) * 1e4}
    for _ in range(2):  # measured again, it takes the place of the first
        write_calibration(place_of(folder), known)
    path = find_calibration(folder)
    assert path == place_of(folder)
    directions = by_layer(path)
    found = directions(Q, 32)
    assert found is not None
    assert torch.allclose(found.float(), known[Q], rtol=0.07, atol=0.002)
    assert directions("blocks.3.ffn.net.2", 48).float().isfinite().all()  # type: ignore[union-attr]
    assert directions("blocks.4.ffn.net.2", 48) is None
    # Queries, keys and values have one input.
    assert directions("blocks.3.attn1.to_v", 32) is found
    assert find_calibration(tmp_path / "other") is None


def test_what_came_with_the_weights_serves_until_they_are_measured_here(tmp_path: Path) -> None:
    file, folder = tmp_path / "wan2.1.safetensors", tmp_path / "wan2.2"
    file.touch()
    folder.mkdir()
    for transformer, name in ((file, "wan2.1.safetensors"), (folder, "wan2.2.safetensors")):
        write_calibration(tmp_path / "inputs" / name, {Q: torch.ones(1, 4)})
        assert find_calibration(transformer) == tmp_path / "inputs" / name
        write_calibration(place_of(transformer), {Q: torch.ones(1, 4)})
        assert find_calibration(transformer) == place_of(transformer)


def test_what_could_not_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    first, second = (
        {f"blocks.{n}.ffn.net.2": torch.full((2, 16), x) for n in range(9)} for x in (1.0, 2.0)
    )

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_calibration(path, first)
    assert not list(tmp_path.iterdir())
    # Of the measurement before nothing is left in the next one.
    write_calibration(path, second)
    for name in second:
        found = by_layer(path)(name, 16)
        assert found is not None
        assert float(found.float().max()) == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("layer", "other"),
    [
        ("blocks.0.attn1.to_k", "blocks.0.attn1.to_q"),
        ("blocks.0.attn1.to_out.0", "blocks.0.attn1.to_out.0"),
        ("blocks.0.attn2.to_q", "blocks.0.attn2.to_q"),
        ("blocks.0.attn2.to_k", None),
        ("blocks.0.attn2.add_v_proj", None),
        ("proj_out", None),
        ("condition_embedder.time_proj", None),
    ],
)
def test_the_text_and_what_is_outside_the_blocks_is_not_measured(
    layer: str, other: str | None
) -> None:
    assert measured_layer(layer) == other


def test_what_is_another_models_or_damaged_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_calibration(path, {Q: torch.ones(2, 16)})
    with pytest.raises(CheckpointError, match=r"32 inputs, and 16 were measured: remove the file"):
        by_layer(path)(Q, 32)
    write_calibration(path, {Q: torch.full((2, 16), torch.nan)})
    with pytest.raises(CheckpointError, match=r"is no measurement of inputs"):
        by_layer(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError):
        by_layer(path)
    assert by_layer(None)(Q, 32) is None
