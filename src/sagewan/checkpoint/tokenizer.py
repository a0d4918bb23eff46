"""UMT5's tokenizer: from a folder, or from the SentencePiece model that text encoders in ComfyUI's
layout carry in a tensor ``spiece_model``."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagewan.checkpoint.files import tensor_files
from sagewan.checkpoint.source import Source
from sagewan.checkpoint.tensors import Stored, TensorFile
from sagewan.errors import CheckpointError

_TENSOR = "spiece_model"
_UNKNOWN, _BYTE = 2, 6
_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def has_tokenizer(source: Source) -> bool:
    """Whether the files of a text encoder carry its tokenizer."""
    return _carried(source.files) is not None


def load_tokenizer(path: Path) -> Any:
    """transformers' tokenizer from a folder, a SentencePiece model, or weights that carry one.

    Raises CheckpointError if there is none; what a library makes of a damaged one is its own.
    """
    spiece = path / "spiece.model" if path.is_dir() else path
    if path.is_dir() and ((path / "tokenizer.json").is_file() or not spiece.is_file()):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    elif spiece.suffix == ".model":
        tokenizer = _from_pieces(parse(spiece.read_bytes(), spiece))
    else:
        carried = _carried(tuple(tensor_files(path)))
        if carried is None:
            raise CheckpointError(f"{path} carries no tokenizer: choose the folder of UMT5's")
        tokenizer = _from_pieces(parse(carried.head(), path))
    if tokenizer.pad_token is None:
        raise CheckpointError(f"{path} names no padding token: fetch its files again")
    return tokenizer


def _carried(files: tuple[TensorFile, ...]) -> Stored | None:
    for file in files:
        for name, stored in file.tensors.items():
            if name.rpartition(".")[2] == _TENSOR and stored.dtype == "uint8":
                return stored
    return None


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A SentencePiece model of the unigram kind: (piece, score) by id, and its normalisation."""

    pieces: tuple[tuple[str, float], ...]
    unknown: int
    has_bytes: bool
    charsmap: bytes


def parse(model: bytes, path: Path) -> Pieces:
    """A ``spiece.model``, which is a protobuf (github.com/google/sentencepiece,
    src/sentencepiece_model.proto). CheckpointError if it is none."""
    pieces: list[tuple[str, float]] = []
    kinds: list[int] = []
    charsmap = b""
    try:
        for field, value in _fields(model):
            if field == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
                pieces.append((piece[1].decode("utf-8"), score))
                kinds.append(piece.get(3, 1))
            elif field == 3:
                charsmap = dict(_fields(value)).get(2, b"")
        unknown = kinds.index(_UNKNOWN)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error):
        raise CheckpointError(
            f"{path}: its SentencePiece model is damaged: fetch it again"
        ) from None
    return Pieces(
        pieces=tuple(pieces), unknown=unknown, has_bytes=_BYTE in kinds, charsmap=charsmap
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and integer or bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}[wire]
        if at + size > len(message):
            raise ValueError(size)
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at


def _from_pieces(found: Pieces) -> Any:
    """As transformers makes T5's tokenizer of the same model: pieces begin with ▁ for a space, and
    ``</s>`` ends the text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    unigram = models.Unigram(list(found.pieces), found.unknown, found.has_bytes)
    tokenizer = Tokenizer(unigram)
    steps: list[Any] = [normalizers.Precompiled(found.charsmap)] if found.charsmap else []
    steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)
