"""Whole runs of the bundled model, as small as it goes; and what becomes of runs that go wrong."""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.find import demo_folder
from sagewan.errors import Cancelled, RejectedError, RequestError, UnsupportedError
from sagewan.pipeline import Result, decode, generate
from sagewan.pipeline.export import KEY, read_settings
from sagewan.pipeline.progress import Event, Watch
from sagewan.plan.catalogue import Implementation
from sagewan.plan.evidence import SelfTest
from sagewan.plan.lora import Lora
from sagewan.plan.request import Request
from sagewan.plan.serialize import request_from_json
from sagewan.reference import emulation
from tests.loras import pairs, write

LAYERS = 8
STEPS = 4
FORWARDS = 2 * STEPS  # one with the prompt and one without, each step


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def small(folder: Path, **fields: object) -> Request:
    values: dict[str, object] = {
        "prompt": "a red ball rolls to the right",
        "output": folder / "ball.mp4",
        "size": (64, 64),
        "frames": 5,
        "steps": STEPS,
        "seed": 3,
        "device": "cpu",
    }
    return Request(**{**values, **fields})  # type: ignore[arg-type]


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_a_run_writes_a_video_and_tells_what_ran(tmp_path: Path) -> None:
    report_path = tmp_path / "report.json"
    result = generate(small(tmp_path, report=report_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ball.mp4", "report.json"]
    assert frames_of(result.path).shape == (5, 64, 64, 3)
    report = json.loads(report_path.read_text())
    assert report == json.loads(json.dumps(result.report))
    assert set(report) == {
        "requested",
        "plan",
        "attention",
        "cache",
        "weights",
        "blocks",
        "memory",
        "timings",
        "output",
        "software",
    }
    assert report["attention"]["ran"] == [
        {
            "mode": "sdpa",
            "implementation": "torch.sdpa",
            "torch_backend": report["attention"]["ran"][0]["torch_backend"],
            "calls": LAYERS * FORWARDS,
        }
    ]
    assert report["attention"]["fallbacks"] == []
    assert not report["attention"]["emulated"]
    assert report["output"]["frames"] == 5
    assert report["output"]["size"] == [64, 64]
    assert len(report["timings"]["steps"]) == STEPS
    assert list(report["timings"]["stages"]) == ["decide", "load", "encode", "denoise", "decode"]
    # The demo model's weights in float32.
    assert report["weights"]["bytes"] == report["plan"]["weight_bytes"]


def test_a_video_made_again_from_itself_is_the_same_to_the_byte(tmp_path: Path) -> None:
    first = generate(small(tmp_path, seed=None))
    settings = read_settings(first.path)
    assert settings["seed"] == first.plan.seed
    request = request_from_json({**settings, "output": str(tmp_path / "again.mp4")})
    again = generate(request)
    assert again.path.read_bytes() == first.path.read_bytes()
    other = generate(small(tmp_path, seed=first.plan.seed + 1, output=tmp_path / "other.mp4"))
    assert not np.array_equal(frames_of(other.path), frames_of(first.path))


def test_no_metadata_leaves_nothing_behind(tmp_path: Path) -> None:
    result = generate(small(tmp_path, metadata=False))
    with av.open(str(result.path)) as container:
        assert KEY not in container.metadata
        assert "comment" not in container.metadata
    assert b"red ball" not in result.path.read_bytes()


def test_a_size_off_the_grid_is_cropped(tmp_path: Path) -> None:
    result = generate(small(tmp_path, size=(72, 50)))
    assert result.report["output"]["size"] == [72, 50]
    assert frames_of(result.path).shape == (5, 50, 72, 3)


def test_a_fallback_is_told_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = generate(small(tmp_path, attention="sageattn_3_fp4"))
    fallbacks = result.report["attention"]["fallbacks"]
    assert [(step["from"], step["to"]) for step in fallbacks] == [
        ("sageattn_3_fp4", "sageattn_3"),
        ("sageattn_3", "sageattn"),
        ("sageattn", "sdpa"),
    ]
    for step in fallbacks:
        said = [line for line in caplog.messages if f"{step['from']} gives way" in line]
        assert len(said) == 1
        assert step["why"] in said[0]


def test_strict_refuses_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagewan.pipeline.build.build", None)
    with pytest.raises(UnsupportedError, match="sageattn_3_fp4"):
        generate(small(tmp_path, attention="sageattn_3_fp4", strict=True))
    assert list(tmp_path.iterdir()) == []


def test_an_emulated_run_says_so(tmp_path: Path) -> None:
    result = generate(small(tmp_path, attention="sageattn_3_fp8", emulate=True))
    assert result.report["attention"]["emulated"]
    assert result.report["attention"]["ran"][0]["implementation"] == "emulated.sageattn_3_fp8"
    assert result.report["attention"]["ran"][0]["calls"] == LAYERS * FORWARDS


def nan_from(step: int, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, whose result is NaN from a step (from 0) on."""
    calls = 0

    @functools.wraps(function)
    def spoilt(*args: object, **options: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        result = function(*args, **options)
        return result * float("nan") if calls > 2 * LAYERS * step else result

    return spoilt


def test_nan_is_resumed_from_before_it_in_a_more_precise_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(emulation, "sageattn_3", nan_from(2, emulation.sageattn_3))
    result = generate(small(tmp_path, attention="sageattn_3", emulate=True))
    assert result.path.exists()
    (step,) = result.report["attention"]["fallbacks"]
    assert (step["from"], step["to"]) == ("sageattn_3", "sdpa")
    assert "stopped being finite at step 3" in step["why"]
    assert sum("stopped being finite" in line for line in caplog.messages) == 1
    calls = {row["mode"]: row["calls"] for row in result.report["attention"]["ran"]}
    # Steps 1 to 3 in the first mode, and 3 and 4 in the other.
    assert calls == {"sageattn_3": 3 * 2 * LAYERS, "sdpa": 2 * 2 * LAYERS}


def test_the_resumed_run_goes_on_from_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode that is exact up to its failure leaves the video of a run that never failed."""
    monkeypatch.setattr(
        emulation, "sageattn_3", nan_from(2, torch.nn.functional.scaled_dot_product_attention)
    )
    plain = generate(small(tmp_path, attention="sdpa"))
    other = tmp_path / "resumed.mp4"
    resumed = generate(small(tmp_path, attention="sageattn_3", emulate=True, output=other))
    assert np.array_equal(frames_of(resumed.path), frames_of(plain.path))


def test_nan_under_strict_is_rejected_kept_aside_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulation, "sageattn_3", nan_from(1, emulation.sageattn_3))
    kept, report_path = tmp_path / "ball.rejected.mp4", tmp_path / "report.json"
    request = small(tmp_path, attention="sageattn_3", emulate=True, strict=True, report=report_path)
    with pytest.raises(RejectedError, match=r"at step 2 of 4 .*ball\.rejected\.mp4"):
        generate(request)
    assert sorted(p.name for p in tmp_path.iterdir()) == [kept.name, report_path.name]
    assert frames_of(kept).shape == (5, 64, 64, 3)
    told_as_rejected(kept, report_path)
    report = json.loads(report_path.read_text())
    assert [row["mode"] for row in report["attention"]["ran"]] == ["sageattn_3"]
    assert report["attention"]["ran"][0]["calls"] == LAYERS * 2 * 2


def told_as_rejected(kept: Path, report: Path) -> None:
    """The report and the video itself say what ran, and that it is no result."""
    output = json.loads(report.read_text())["output"]
    assert (output["rejected"], output["path"], output["frames"]) == (True, str(kept), 5)
    assert output["sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()
    assert read_settings(kept)["seed"] == 3


def test_nan_of_exact_attention_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launcher, "attend", lambda self, q, *_, **__: q * float("nan"))
    with pytest.raises(RejectedError, match="at step 1 of 4"):
        generate(small(tmp_path))
    assert not (tmp_path / "ball.mp4").exists()


def test_the_run_is_repeated_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Launcher.attend

    def spoilt(self: Launcher, q: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        return attend(self, q, *rest, **options) * float("nan")  # type: ignore[arg-type]

    monkeypatch.setattr(Launcher, "attend", spoilt)
    events: list[Event] = []
    with pytest.raises(RejectedError):
        generate(
            small(tmp_path, attention="sageattn_3_fp4", emulate=True), watch=Watch(events.append)
        )
    assert sum(event.stage == "denoise" and event.done == 0 for event in events) <= 3
    assert sum(event.plan is not None for event in events) == 2


@pytest.mark.parametrize("calls_before", [LAYERS - 3, 2 * 2 * LAYERS + 3, (2 * 2 + 1) * LAYERS + 3])
def test_a_row_that_fails_in_use_is_replaced_from_that_step_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls_before: int
) -> None:
    from dataclasses import replace

    from sagewan.plan import catalogue

    rows = tuple(
        replace(row, trusted=False) if row.name == "emulated.sageattn_3" else row
        for row in catalogue.ROWS
    )
    monkeypatch.setattr(catalogue, "ROWS", rows)
    monkeypatch.setattr("sagewan.attention.self_test.self_test", _passed)
    calls = 0

    @functools.wraps(emulation.sageattn_3)
    def failing(*args: object, **options: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > calls_before:
            raise RuntimeError("no kernel image is available")
        return torch.zeros_like(args[0])  # type: ignore[call-overload]

    monkeypatch.setattr(emulation, "sageattn_3", failing)
    result = generate(small(tmp_path, attention="sageattn_3", emulate=True))
    (step,) = result.report["attention"]["fallbacks"]
    assert (step["from"], step["to"]) == ("sageattn_3", "sageattn")
    assert "no kernel image is available" in step["why"]
    # Whole steps in the first mode, the broken one and the rest in the other.
    whole = calls_before // (2 * LAYERS)
    ran = {row["mode"]: row["calls"] for row in result.report["attention"]["ran"]}
    expected = {"sageattn_3": whole * 2 * LAYERS, "sageattn": (STEPS - whole) * 2 * LAYERS}
    assert ran == {mode: calls for mode, calls in expected.items() if calls}
    assert sum(ran.values()) == LAYERS * FORWARDS
    assert len(result.report["timings"]["steps"]) == STEPS


def _passed(row: Implementation, device: object, problem: object) -> SelfTest:
    return SelfTest(implementation=row.name, error=0.0, limit=1.0, milliseconds=1.0)


def test_a_failure_of_our_own_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> torch.Tensor:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(emulation, "sageattn_3", broken)
    with pytest.raises(ZeroDivisionError):
        generate(small(tmp_path, attention="sageattn_3", emulate=True))
    assert list(tmp_path.iterdir()) == []


def test_a_black_video_is_kept_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def black(*_: object) -> object:
        yield from np.zeros((5, 64, 64, 3), np.uint8)

    (tmp_path / "ball.mp4").write_text("the last success")
    monkeypatch.setattr(decode, "decode", black)
    kept, report = tmp_path / "ball.rejected.mp4", tmp_path / "report.json"
    with pytest.raises(RejectedError, match=r"is black: kept as .*ball\.rejected\.mp4"):
        generate(small(tmp_path, report=report))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ball.mp4", kept.name, report.name]
    assert (tmp_path / "ball.mp4").read_text() == "the last success"
    told_as_rejected(kept, report)


def test_a_video_that_is_partly_not_a_number_is_kept_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = decode.decode_pieces

    def spoilt(*arguments: object) -> object:
        for index, piece in enumerate(pieces(*arguments)):  # type: ignore[arg-type]
            piece[..., 0, 0] = float("nan") if index else 0
            yield piece

    monkeypatch.setattr(decode, "decode_pieces", spoilt)
    with pytest.raises(RejectedError, match=r"is not finite .*ball\.rejected\.mp4"):
        generate(small(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["ball.rejected.mp4"]


@pytest.mark.parametrize("stage", ["load", "encode", "denoise", "decode"])
def test_cancel_leaves_nothing(tmp_path: Path, stage: str) -> None:
    def stop(event: Event) -> None:
        if event.stage == stage:
            watch.cancel()

    watch = Watch(stop)
    with pytest.raises(Cancelled):
        generate(small(tmp_path), watch=watch)
    assert list(tmp_path.iterdir()) == []


def test_cancel_ends_within_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Launcher.attend
    calls = 0

    def counted(self: Launcher, *args: object, **options: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            watch.cancel()
        return attend(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Launcher, "attend", counted)
    watch = Watch()
    with pytest.raises(Cancelled):
        generate(small(tmp_path), watch=watch)
    assert calls == 3


def test_a_wrong_picture_is_refused_before_the_self_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagewan.pipeline.run.decide", None)
    with pytest.raises(RequestError, match="no such file"):
        generate(small(tmp_path, image=tmp_path / "missing.png"))


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 21474836480 bytes, 20 GiB."
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`, 20 GiB."),
    MemoryError("20 GiB."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["CUDA", "CPU", "cuBLAS", "Python"])
@pytest.mark.parametrize("place", ["attention", "decoder"])
def test_out_of_memory_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    if place == "attention":
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", full)
    else:
        monkeypatch.setattr(decode, "decode_pieces", full)
        monkeypatch.setattr(decode, "decode_tiles", full)
    # The first attention is the text encoder's, which a shorter video would not help.
    advice = "close other programs" if place == "attention" else "--frames"
    with pytest.raises(UnsupportedError, match=rf"ran out of memory .*20 GiB\..*{advice}"):
        generate(small(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_memory_can_really_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launcher, "attend", lambda *_, **__: torch.empty(1 << 60))
    with pytest.raises(
        UnsupportedError, match=r"the host ran out of memory in denoising \(RuntimeError: .*"
    ):
        generate(small(tmp_path))


def test_pictures_make_a_video(tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "first.png"
    Image.new("RGB", (64, 64), (200, 40, 30)).save(picture)
    result: Result = generate(small(tmp_path, image=picture))
    assert result.plan.task == "i2v"


def test_a_lora_changes_the_video_and_is_in_the_report(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    folder = demo_folder() / "transformer"
    model = WanTransformer3DModel.from_pretrained(folder, local_files_only=True)
    path = write(tmp_path / "style.safetensors", pairs(model, size=0.05))
    plain = generate(small(tmp_path, steps=5))
    named = {"steps": 5, "output": tmp_path / "b.mp4", "lora": (Lora(path=path, strength=0.8),)}
    changed = generate(small(tmp_path, **named))
    assert not np.array_equal(frames_of(plain.path), frames_of(changed.path))
    (told,) = changed.report["weights"]["lora"]
    assert (told["layers"], told["unmatched"], told["strength"]) == (64, [], 0.8)
    again = request_from_json({**read_settings(changed.path), "output": str(tmp_path / "c.mp4")})
    assert generate(again).path.read_bytes() == changed.path.read_bytes()
    none = {"steps": 5, "output": tmp_path / "d.mp4", "lora": (Lora(path=path, strength=0),)}
    assert np.array_equal(frames_of(generate(small(tmp_path, **none)).path), frames_of(plain.path))
