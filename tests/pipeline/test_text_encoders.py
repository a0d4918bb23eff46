"""UMT5 in the quantised forms that people have, run."""

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sagewan.pipeline.build import _text_encoder
from tests import shrunken
from tests.checkpoint import part_writers
from tests.checkpoint.writers import _add


def scaled(state: dict[str, Tensor], path: Path) -> None:
    """As ComfyUI's ``umt5_xxl_fp8_e4m3fn_scaled``."""
    found = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, weight in state.items():
        if weight.ndim == 2 and "layer" in name and "relative" not in name:
            scale = weight.abs().max() / 448
            found[name] = (weight / scale).to(torch.float8_e4m3fn)
            found[name.replace(".weight", ".scale_weight")] = scale
        else:
            found[name] = weight.half()
    save_file(found, path)


def q8_0(state: dict[str, Tensor], path: Path) -> None:
    """As llama.cpp converts it, its embedding packed too."""
    writer = gguf.GGUFWriter(None, "t5encoder")
    for name, weight in part_writers.umt5_original(state, llama=True).items():
        packed = weight.ndim == 2 and "rel_b" not in name
        _add(writer, name, weight.numpy(), "Q8_0" if packed else "F32")
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("write", "bound"), [(scaled, 0.08), (q8_0, 0.03)])
def test_a_quantised_text_encoder_says_the_same(
    write: object, bound: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    original = shrunken.filled(shrunken.text_encoder(), 1)
    state = {name: x for name, x in original.state_dict().items() if "embed_tokens" not in name}
    path = tmp_path / ("umt5.gguf" if write is q8_0 else "umt5.safetensors")
    write(state, path)  # type: ignore[operator]
    encoder = _text_encoder(path, dtype).eval()
    ids = torch.tensor([[3, 5, 4, 1, 0, 0]])
    mask = (ids > 0).long()
    with torch.inference_mode():
        found = encoder(ids, mask).last_hidden_state.float()
        expected = original(ids, mask).last_hidden_state
    assert float((found - expected).norm() / expected.norm()) < bound
    embeddings = encoder.shared.weight, encoder.encoder.embed_tokens.weight
    assert embeddings[0].data_ptr() == embeddings[1].data_ptr(), "once in memory"
