"""The tokenizer that a text encoder's file carries, held to SentencePiece itself."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from sagewan.checkpoint.find import find_model
from sagewan.checkpoint.tokenizer import load_tokenizer, parse
from sagewan.errors import CheckpointError
from tests.checkpoint import part_writers
from tests.checkpoint.trees import weights
from tests.checkpoint.writers import original_name

TEXTS = (
    "a red ball rolls to the right",
    "A cat, sitting on a mat — two of them!",
    "一个红色的球向右滚动。",
    "ﬁne ½ Ｗｉｄｅ letters",
    "emoji 🐈 and ünïcödé",
    "digits 1280x720, 16 fps",
)


@pytest.fixture(scope="module")
def model() -> bytes:
    """A small model of the kind of UMT5's: unigram, bytes for what it does not know."""
    written = io.BytesIO()
    lines = [f"{text} {number}" for text in TEXTS[:3] for number in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=360,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        minloglevel=2,
    )
    return written.getvalue()


@pytest.mark.parametrize("place", ["tensor", "spiece.model", "folder"])
def test_it_gives_the_ids_that_sentencepiece_gives(
    place: str, model: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "umt5.safetensors"
    if place == "tensor":
        carried = torch.frombuffer(bytearray(model), dtype=torch.uint8)
        save_file({"spiece_model": carried, "shared.weight": torch.zeros(2, 2)}, path)
    else:
        path = tmp_path / "spiece.model"
        path.write_bytes(model)
        path = tmp_path if place == "folder" else path
    tokenizer = load_tokenizer(path)
    expected = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in TEXTS:
        assert tokenizer(text).input_ids == [*expected.encode(text), expected.eos_id()], text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_damaged_models_are_one_sentence(model: bytes, tmp_path: Path) -> None:
    for cut in (1, 7, 100, len(model) // 2):
        with pytest.raises(CheckpointError, match="SentencePiece model is damaged"):
            parse(model[:cut] + b"\xff" * 3, tmp_path)


def test_a_checkpoint_with_everything_inside(
    model: bytes,
    shrunken_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAGEWAN_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = shrunken_folder("wan2.1-t2v-14b")
    found = {
        "model.diffusion_model." + original_name(name): weight
        for name, weight in weights(folder / "transformer").items()
    }
    vae = part_writers.vae_original(weights(folder / "vae"), res_blocks=1)
    found |= {"first_stage_model." + name: weight for name, weight in vae.items()}
    prefix = "text_encoders.umt5xxl."
    for name, weight in weights(folder / "text_encoder").items():
        found[f"{prefix}transformer.{name}"] = weight
    found[f"{prefix}spiece_model"] = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    path = tmp_path / "all_in_one.safetensors"
    save_file({name: weight.contiguous() for name, weight in found.items()}, path)
    parts = find_model(str(path)).parts
    assert set(parts) == {"transformer", "vae", "text_encoder", "tokenizer"}
    assert set(parts.values()) == {path}
