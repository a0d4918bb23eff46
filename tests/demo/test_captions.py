"""Every caption is made of words the tokenizer and the vocabulary know."""

import itertools
import random

import captions
import dit
import models
import pytest
import sample
import train_dit
import world
from transformers import AutoTokenizer

UNKNOWN = 2
ALL_LABELS = [
    dict(zip(train_dit.NAMES, names, strict=True))
    for names in itertools.product(*train_dit.NAMES.values())
]


@pytest.fixture(scope="module")
def tokenizer():
    return models.build_tokenizer()


def test_every_caption_is_known_and_short_enough(tokenizer):
    rng = random.Random(0)
    texts = [captions.describe(labels, rng) for labels in ALL_LABELS]
    texts += [captions.canonical(x, lang) for x in ALL_LABELS[::7] for lang in ("en", "zh")]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert UNKNOWN not in ids, text
        assert len(ids) < dit.TEXT_LENGTH, text


@pytest.mark.parametrize(
    "text",
    [
        "a red ball rolls to the right",
        "A small blue star grows on a grey background.",
        "一个红色的球向右滚动",
        "灰色背景上，一颗蓝色的小星星变大",
    ],
)
def test_promised_prompts_are_known(tokenizer, text):
    assert UNKNOWN not in tokenizer(text)["input_ids"]


def test_an_unknown_word_is_seen(tokenizer):
    assert UNKNOWN in tokenizer("a red dragon rolls")["input_ids"]
    assert UNKNOWN in tokenizer("一个红色的龙")["input_ids"]


def test_canonical_names_every_label_apart():
    for language in ("en", "zh"):
        texts = {captions.canonical(labels, language) for labels in ALL_LABELS}
        assert len(texts) == len(ALL_LABELS)


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["a red ball", "一个红色的球", ""]
    assert sample.token_ids(again, texts).equal(sample.token_ids(tokenizer, texts))
    assert again("").input_ids == [1]


def test_vocabulary_lists_every_attribute():
    for words in captions.vocabulary().values():
        assert set(words) == {*world.COUNTS, "other"}
