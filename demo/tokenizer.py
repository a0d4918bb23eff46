"""The demo model's tokenizer: English words and single Chinese characters, </s> at the end."""

from __future__ import annotations

from typing import Any

import captions
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2


def _walk(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        return [text for branch in tree.values() for text in _walk(branch)]
    return list(tree)


def known_words() -> list[str]:
    """Every token the captions can contain, in a fixed order."""
    return sorted({word for text in _walk(captions.vocabulary()) for word in captions.words(text)})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A WordLevel tokenizer; a word that the model was never taught becomes <unk> (id 2)."""
    table = {word: number for number, word in enumerate((*SPECIAL, *known_words()))}
    core = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    punctuation = Regex(r"[\p{P}\p{S}]+")
    core.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(punctuation, " "),
            normalizers.BertNormalizer(handle_chinese_chars=True, lowercase=True),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )
