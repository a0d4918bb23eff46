"""Every caption is made of words the tokenizer and the vocabulary know, and says what it should."""

import random

import captions
import data
import dit
import models
import pytest
import sample
import torch
import world
from transformers import AutoTokenizer

from sagewan.evaluate.prompts import plain

UNKNOWN = 2


def labels(objects, count=600):
    generator = torch.Generator().manual_seed(objects)
    return data.labels_of(world.sample_scene(count, generator, objects=objects))


@pytest.fixture(scope="module")
def tokenizer():
    return models.build_tokenizer()


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [captions.describe(*clip, rng) for n in (1, 2) for clip in labels(n) for _ in range(3)]


def test_every_caption_is_known_and_short_enough(tokenizer, texts):
    texts = texts + [plain(*clip, lang) for n in (1, 2) for clip in labels(n, 200)
                     for lang in ("en", "zh")]  # fmt: skip
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert UNKNOWN not in ids, text
        assert len(ids) < dit.TEXT_LENGTH, text


def test_quick_ids_are_the_tokenizers(tokenizer, texts):
    quick = torch.from_numpy(data.token_ids(texts, tokenizer.get_vocab()))
    assert quick.long().equal(sample.token_ids(tokenizer, texts))


def test_ids_of_many_processes_belong_to_their_clips(tokenizer):
    scene = world.sample_scene(600, torch.Generator().manual_seed(0))
    ids = data.caption_ids(scene, 2, 1, tokenizer.get_vocab())
    assert ids.shape == (600, 2, dit.TEXT_LENGTH)
    for clip in (0, 299, 300, 599):
        colour = list(world.COLOURS)[scene.colour[clip, 0]]
        said = tokenizer.decode(ids[clip, 0].tolist(), skip_special_tokens=True)
        words = captions.ENGLISH["colour"][colour] + captions.CHINESE["colour"][colour]
        assert any(w in said or w in said.replace(" ", "") for w in words), (said, colour)


@pytest.mark.parametrize(
    "text",
    [
        "a red ball rolls to the right",
        "A small blue star grows on a grey background.",
        "a green ring bounces and a red heart moves in a circle",
        "一个红色的球向右滚动",
        "灰色背景上，一颗蓝色的小星星变大",
        "左边一个红色的球弹跳，右边一个蓝色的方块转圈",
    ],
)
def test_promised_prompts_are_known(tokenizer, text):
    assert UNKNOWN not in tokenizer(text)["input_ids"]


def test_an_unknown_word_is_seen(tokenizer):
    assert UNKNOWN in tokenizer("a red dragon rolls")["input_ids"]
    assert UNKNOWN in tokenizer("一个红色的龙")["input_ids"]


def test_sides_are_told_whenever_the_right_one_comes_first():
    rng = random.Random(1)
    (first, second), ground = next(
        (things, ground) for things, ground in labels(2)
        if things[0]["shape"] == "star" and things[1]["shape"] == "heart"
    )  # fmt: skip
    turned = 0
    for _ in range(200):
        text = captions.english([first, second], ground, rng)
        if text.index("heart") < text.index("star"):
            turned += 1
            assert "on the right" in text
            assert "on the left" in text
    assert 10 < turned < 90


def test_plain_prompts_name_every_label_apart():
    for language in ("en", "zh"):
        clips = {str(clip): plain(*clip, language) for clip in labels(1) + labels(2)}
        assert len(set(clips.values())) == len(clips)


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["a red ball", "一个红色的球", ""]
    assert sample.token_ids(again, texts).equal(sample.token_ids(tokenizer, texts))
    assert again("").input_ids == [1]


def test_vocabulary_lists_every_attribute():
    for words in captions.vocabulary().values():
        assert set(words) == {*world.NAMES, "other"}
