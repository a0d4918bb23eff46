"""Wrong input: one sentence with the fix, exit 2, nothing written, at once."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sagewan.jobs.records import default_path
from sagewan.pipeline.export import write_video
from tests.cli.conftest import Said, seconds_of_children

Run = Callable[..., Said]
PROMPT = "a red ball rolls to the right"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, holding all kinds of wrong inputs."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "text.png").write_text("not a picture")
    Image.new("RGB", (1, 1)).save(inputs / "tiny.png")
    Image.new("1", (10_000, 10_000)).save(inputs / "huge.png")
    Image.new("RGB", (64, 64), "red").save(inputs / "good.png")
    (inputs / "empty").mkdir()
    (inputs / "flux").mkdir()
    (inputs / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (inputs / "broken").mkdir()
    (inputs / "broken" / "model_index.json").write_text("{")
    (inputs / "text.mp4").write_text("not a video")
    write_video(inputs / "plain.mp4", [np.zeros((32, 32, 3), np.uint8)], fps=12)
    work = tmp_path / "work"
    work.mkdir()
    (work / "folder.mp4").mkdir()
    monkeypatch.chdir(work)
    return work


IN = Path("..") / "inputs"
WRONG = {
    "no prompt": ([], "prompt is missing"),
    "empty prompt": (["  "], "prompt is empty"),
    "untaught word": (["a red dragon"], "never taught 'dragon'; it knows shape: ball"),
    "untaught Chinese word": (["红色的龙"], "never taught"),
    "untaught negative word": ([PROMPT, "--negative", "blurry"], "never taught 'blurry'"),
    "frames": ([PROMPT, "--frames", "18"], "try 17"),
    "size below the grid": ([PROMPT, "--size", "16x16"], "the smallest is"),
    "size absurd": ([PROMPT, "--size", "999999x2"], "size=999999"),
    "size of nothing": ([PROMPT, "--size", "0x0"], "size=0"),
    "too many tokens": ([PROMPT, "--size", "4096x4096", "--frames", "1001"], "smaller size"),
    "mode": ([PROMPT, "--attention", "sageattn3"], "did you mean sageattn_3"),
    "preset": ([PROMPT, "--preset", "fast"], "choose from low-vram"),
    "scheduler": ([PROMPT, "--scheduler", "ddim"], "choose from unipc"),
    "device": ([PROMPT, "--device", "tpu"], "use auto, cpu, cuda"),
    "absent device": ([PROMPT, "--device", "cuda:77"], "this machine has"),
    "no model": ([PROMPT, "--model", "nowhere"], "there is no such folder"),
    "model not here": ([PROMPT, "--model", "wan2.1-t2v-14b"], "sagewan download"),
    "folder without index": ([PROMPT, "--model", IN / "empty"], "model_index.json"),
    "other pipeline": ([PROMPT, "--model", IN / "flux"], "Flux"),
    "broken index": ([PROMPT, "--model", IN / "broken"], "model_index.json"),
    "no image": ([PROMPT, "--image", IN / "none.png"], "there is no such file"),
    "not an image": ([PROMPT, "--image", IN / "text.png"], "is not a picture"),
    "tiny image": ([PROMPT, "--image", IN / "tiny.png"], "at least 16x16"),
    "huge image": ([PROMPT, "--image", IN / "huge.png"], "million pixels"),
    "folder as image": ([PROMPT, "--image", IN], "is a folder"),
    "last image": (
        [PROMPT, "--image", IN / "good.png", "--last-image", IN / "good.png"],
        "takes only a first picture",
    ),
    "last image alone": ([PROMPT, "--last-image", IN / "good.png"], "needs image as well"),
    "output folder missing": ([PROMPT, "-o", "none/a.mp4"], "does not exist; create it"),
    "output is a folder": ([PROMPT, "-o", "folder.mp4"], "is a folder"),
    "output suffix": ([PROMPT, "-o", "a.gif"], "use a.mp4"),
    "report folder missing": ([PROMPT, "--report", "none/r.json"], "does not exist"),
    "report is output": ([PROMPT, "-o", "a.mp4", "--report", "a.mp4"], "name two files"),
    "from nothing": (["--from", "none.mp4"], "there is no such file"),
    "from text": (["--from", IN / "text.mp4"], "is not a video"),
    "from a picture": (["--from", IN / "good.png"], "no settings"),
    "from a plain video": (["--from", IN / "plain.mp4"], "no settings"),
    "second guidance": ([PROMPT, "--cfg-2", "3"], "two experts"),
    "ends without attention": ([PROMPT, "--attention-ends", "sdpa:1,1"], "choose one with"),
    "layers without ends": (
        [PROMPT, "--attention", "sdpa", "--attention-keep-layers", "0"],
        "needs attention_ends",
    ),
    "layers beyond the model": (
        [
            PROMPT,
            "--attention",
            "sdpa",
            "--attention-ends",
            "sdpa:0,0",
            "--attention-keep-layers",
            "99",
        ],
        "layers are 0 to",
    ),
    "unknown flag": ([PROMPT, "--stepz", "3"], "--stepz"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str, place: Path, sagewan: Run) -> None:
    words, sentence = WRONG[case]
    began = time.process_time()
    said = sagewan("generate", *words)
    took = time.process_time() - began
    assert said.code == 2, said.err
    assert sentence in said.err
    (line,) = said.err.splitlines()
    assert line.startswith("sagewan: ")
    assert said.out == ""
    assert [path.name for path in place.iterdir()] == ["folder.mp4"]
    assert not default_path().exists(), "not even the database of the jobs"
    assert took < 2, f"{took:.1f} s"


def test_a_folder_where_nothing_can_be_written(place: Path, sagewan: Run) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    said = sagewan("generate", PROMPT, "-o", "/proc/a.mp4")
    assert said.code == 2
    assert "can't be written" in said.err


def test_a_disk_that_is_full(place: Path, sagewan: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    said = sagewan("generate", PROMPT)
    assert said.code == 2
    assert "free some space" in said.err


def test_strict_exits_3_before_loading(place: Path, sagewan: Run) -> None:
    said = sagewan(
        "generate", PROMPT, "--attention", "sageattn_3_fp4", "--strict", "--device", "cpu"
    )
    assert said.code == 3
    assert "needs an NVIDIA GPU" in said.err


def test_nothing_at_all_is_answered_with_the_help(sagewan: Run) -> None:
    said = sagewan()
    assert said.code == 2
    assert "make a video from a prompt" in said.out


@pytest.mark.parametrize("words", [["generat"], ["--model", "demo"]])
def test_no_command_is_one_sentence(words: list[str], sagewan: Run) -> None:
    said = sagewan(*words)
    assert said.code == 2
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("case", ["untaught word", "no image", "folder without index"])
def test_a_refusal_takes_no_torch_and_no_time(case: str, place: Path) -> None:
    """As a user starts it: a process of its own, two seconds with all its imports."""
    words, sentence = WRONG[case]
    program = (
        "import sys\nfrom sagewan.cli import main\ncode = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)\n"
    )
    with seconds_of_children() as spent:
        done = subprocess.run(
            [sys.executable, "-c", program, "generate", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert spent() < 2, f"{spent():.1f} s"


def test_the_plain_video_is_a_video(place: Path) -> None:
    with av.open(str(IN / "plain.mp4")) as container:
        assert container.streams.video
