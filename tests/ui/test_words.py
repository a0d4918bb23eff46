"""Both languages say everything: no key is missing, no English is left in the Chinese."""

import re
import string
from pathlib import Path

import pytest

import sagewan
from sagewan.plan.modes import MODES, PRESETS
from sagewan.plan.objection import SENTENCES, Objection
from sagewan.ui.form import names
from sagewan.ui.words import TABLES, Words, language_of
from sagewan.ui.words.messages import filled, pattern, templates, unread
from sagewan.ui.words.zh_sentences import ZH_SENTENCES

PACKAGE = Path(sagewan.__file__).parent
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# The same in every language: names of formats, of things, and plain signs.
UNIVERSAL = {
    "app.title",
    "app.other_language",
    "section.lora",
    "list.joint",
    "list.subject",
    "doctor.cpu",
    "doctor.formats",
    "compare.head.ssim",
    "compare.head.psnr",
    "info.device",
}
# Only a terminal shows what these commands say.
LAYERS = sorted(
    path.name
    for path in PACKAGE.iterdir()
    if path.is_dir() and path.name not in ("cli", "bench", "evaluate")
)
# Sentences that consist of values alone.
PLAIN = "{}: {}"
# Errors that pass on a sentence which is made, and found, elsewhere.
PASSED_ON = {
    "run.py: wrong",
    "uploads.py: str(error).replace(f'{field}={real}', f'{field}={real.name}')",
    "whole.py: problem",
}


def holes(text: str) -> list[str]:
    return sorted(
        name or "" for _, name, _, _ in string.Formatter().parse(text) if name is not None
    )


def test_every_language_has_every_key_with_the_same_values() -> None:
    english, chinese = TABLES["en"], TABLES["zh"]
    assert set(english) == set(chinese)
    for key, text in english.items():
        assert holes(text) == holes(chinese[key]), key


def test_no_english_is_left_in_the_chinese() -> None:
    for key, text in TABLES["zh"].items():
        bare = re.sub(r"\{\w*\}", "", text)
        if key not in UNIVERSAL and re.search("[a-zA-Z]", bare):
            assert CHINESE.search(bare), (key, text)


def test_every_key_that_is_used_is_there_and_every_key_is_used() -> None:
    sources = [*(PACKAGE / "ui").rglob("*.py"), *(PACKAGE / "ui").rglob("*.html")]
    text = "\n".join(
        file.read_text(encoding="utf-8") for file in sources if "words" not in file.parts
    )
    pattern = rf"""["']((?:{"|".join(kinds())})\.[a-z_.-]+)["']"""
    used = set(re.findall(pattern, text))
    used = {key for key in used if not key.endswith(".")}
    assert used - set(TABLES["en"]) - {"compare.html"} == set()
    families = (
        "field.",
        "info.",
        "mode.",
        "quantization.",
        "stage.",
        "state.",
        "compare.head.",
        "time.",
        "list.",
        "choice.",
    )
    # What is said of one thing stands beside what is said of many.
    used |= {f"{key}.one" for key in used}
    unused = {key for key in TABLES["en"] if key not in used and not key.startswith(families)}
    assert unused == set()


def test_one_is_no_plural() -> None:
    assert Words("en")("job.steps", count=1) == "1 step"
    assert Words("en")("job.steps", count=2) == "2 steps"
    assert Words("en")("job.seed", seed=1) == "seed 1"


def kinds() -> list[str]:
    return sorted({key.partition(".")[0] for key in TABLES["en"]})


def test_every_widget_and_mode_has_its_words() -> None:
    for name in names():
        assert f"field.{name}" in TABLES["en"], name
        if name not in ("image", "last_image"):
            assert f"info.{name}" in TABLES["en"], name
    assert {f"mode.{name}" for name in MODES} <= set(TABLES["en"])


def test_every_objection_has_a_sentence_with_the_same_values_in_every_language() -> None:
    assert set(SENTENCES) == set(TABLES)
    for code, english in SENTENCES["en"].items():
        assert holes(english) == holes(SENTENCES["zh"][code]), code
        assert CHINESE.search(SENTENCES["zh"][code]), code


@pytest.mark.parametrize("code", SENTENCES["en"])
def test_an_objection_in_a_report_is_translated(code: str) -> None:
    values = {name: f"V{at}" for at, name in enumerate(holes(SENTENCES["en"][code]))}
    objection = Objection(code, values)
    assert Words("zh").sentence(objection.sentence()) == objection.sentence("zh")
    assert Words("en").sentence(objection.sentence()) == objection.sentence()


@pytest.mark.parametrize("layer", LAYERS)
def test_every_error_and_note_is_translated(layer: str) -> None:
    missing = [
        text
        for text in templates(PACKAGE / layer)
        # Charts are made of markup, piece by piece.
        if text not in ZH_SENTENCES and text != PLAIN and not text.startswith("<")
    ]
    assert missing == []


def test_no_sentence_is_raised_in_a_way_that_is_not_found() -> None:
    assert {code for layer in LAYERS for code in unread(PACKAGE / layer)} == PASSED_ON


@pytest.mark.parametrize(
    "code",
    [
        'raise CheckpointError(f"{path} is wet: dry it")',
        'raise CheckpointError("no {} is wet: dry it" if x else f"{path} is wet: dry it")',
        'def why(path):\n  return f"{path} is wet: dry it"\nraise CheckpointError(why(path))',
        'def notes(path):\n  yield f"{path} is wet: dry it"',
        'notes = (f"{path} is wet: dry it",)',
        'self.refusal = f"{path} is wet: dry it"',
    ],
)
def test_a_new_sentence_is_found_however_it_is_said(tmp_path: Path, code: str) -> None:
    (tmp_path / "new.py").write_text(code)
    assert "{} is wet: dry it" in set(templates(tmp_path))
    assert list(unread(tmp_path)) == []
    (tmp_path / "new.py").write_text("raise CheckpointError(text.title())")
    assert list(unread(tmp_path)) == ["new.py: text.title()"]


# What stays as it is in a sentence about files: their names, those of weights, and of commands.
AS_IT_IS = re.compile(
    r"/\S+?(?=[：，；]|\s|$)|\w+[._]\w[\w.]*|--\w+|\d+x\d+|"
    r"sagewan download|model=|lora=|models/|Wan|Hugging Face"
)


FILE = "/m/a.safetensors"


@pytest.mark.parametrize(
    "sentence",
    [
        f"{FILE} lacks 3 of its weights, such as blocks.0.ffn.2.weight: fetch it again",
        f"{FILE}: blocks.0.ffn.2.weight is quantised and is no matrix: fetch it again",
        "/my models/a.gguf has 5 of 9 bytes: its download is not complete; fetch it again",
        f"{FILE} is a vae of Wan, not a text encoder",
        (
            "H100 ran out of memory in decoding (CUDA): 9.50 GiB were planned and 8.25 GiB free; "
            "choose --frames 33 or --size 480x320, or close other programs"
        ),
        (
            f"lora={FILE}: none of its 3 layers fits demo_1 (a.b is [1, 2] there, and [3, 2] in "
            "the model); choose one made for this model"
        ),
        (
            "LoRA a.safetensors at 0.8, rank 8: changes 48 layers of the high-noise expert, by its "
            "name; 2 of its names fit nothing here (a.b, …)"
        ),
        (
            f"model={FILE}: its text encoder (UMT5 of 512 features) is missing; looked for beside "
            "it in /m, in /n, and in the Hugging Face cache: put it there, or fetch a whole model "
            "with sagewan download"
        ),
    ],
)
def test_sentences_about_files_are_whole_in_chinese(sentence: str) -> None:
    said = Words("zh").sentence(sentence)
    assert not re.search("[a-z]{2,}", AS_IT_IS.sub("", said)), said


def test_a_translation_keeps_every_value() -> None:
    for english, chinese in ZH_SENTENCES.items():
        count = english.count("{}")
        values = tuple(f"V{at}" for at in range(count))
        assert pattern(english).fullmatch(filled(english, values)), english
        text = filled(chinese, values)
        assert all(value in text for value in values), english


def test_the_values_of_an_objection_are_translated_too() -> None:
    values = {"needed": "10.0 or newer (Blackwell)", "device": "H100", "found": "9.0"}
    said = Words("zh").sentence(Objection("compute-capability", values).sentence())
    assert said == "需要计算能力 10.0 或更新（Blackwell），而 H100 是 9.0"


def test_a_sentence_within_a_sentence_is_translated_too() -> None:
    text = "attention=flash_attn can't run here: needs an NVIDIA GPU, and X is not one "
    text += "(strict: no fallback)"
    said = Words("zh").sentence(text)
    assert "需要 NVIDIA 显卡，而 X 不是" in said
    assert Words("zh").sentence("nobody ever said this") == "nobody ever said this"


def test_presets_are_described_in_chinese() -> None:
    for preset in PRESETS.values():
        assert not re.search(r"\b(and|more)\b", Words("zh").sentence(preset.memory))


@pytest.mark.parametrize(
    ("accept", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        ("de,zh;q=0.5,en;q=0.4", "zh"),
        ("fr", "en"),
        ("", "en"),
        ("zh;q=bad, en", "en"),
    ],
)
def test_the_browser_chooses_the_language(accept: str, language: str) -> None:
    assert language_of(accept) == language


def test_durations_are_said_in_words() -> None:
    words = Words("zh")
    said = [words.seconds(x) for x in (9.84, 125, 3720)]
    assert said == ["9.8 秒", "2 分 05 秒", "1 小时 02 分"]
    assert words.stage("denoise") == "去噪"
    assert words.stage("self-test of sagewan.sageattn") == "正在测试 sagewan.sageattn"
