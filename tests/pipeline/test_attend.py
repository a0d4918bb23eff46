"""``sagewan.attend``: what it refuses, what it decides, and how it goes on after a failure."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sagewan
from sagewan.errors import RequestError, ShapeError, UnsupportedError
from sagewan.pipeline import attend as module
from sagewan.plan import catalogue
from sagewan.plan.catalogue import Implementation, Problem
from sagewan.plan.evidence import SelfTest
from sagewan.plan.hardware import Device
from sagewan.reference.attention import attention_with_lse, relative_error
from tests import fakes
from tests.inputs import bias, normal

SDPA = catalogue.row_named("torch.sdpa")
FLASH = fakes.on_cpu("flash_attn", layout="BHND")


@pytest.fixture(autouse=True)
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> module.Session:
    """A process that knows nothing yet."""
    monkeypatch.setenv("SAGEWAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module.Session, "hardware", None)
    monkeypatch.setattr(module.Session, "evidence", {})
    monkeypatch.setattr(module, "_session", module.Session())
    return module._session


@pytest.fixture
def flash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, float], list[str]]]:
    """Install flash_attn with a body and let its self-test say this time; → rows tested."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setattr(catalogue, "ROWS", (SDPA, FLASH))
    contexts = []

    def installed(body: str, milliseconds: float) -> list[str]:
        fakes.install(folder, FLASH, body)
        contexts.append(fakes.importable(folder))
        contexts[-1].__enter__()
        tested: list[str] = []

        def self_test(row: Implementation, device: Device, problem: Problem) -> SelfTest:
            tested.append(row.name)
            time = 1.0 if row is SDPA else milliseconds
            return SelfTest(implementation=row.name, error=0.002, limit=0.01, milliseconds=time)

        monkeypatch.setattr("sagewan.attention.self_test.self_test", self_test)
        return tested

    yield installed
    for context in contexts:
        context.__exit__(None, None, None)


def ran(session: module.Session) -> dict[object, object]:
    return {row["implementation"]: row["calls"] for row in session.launcher.ran()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_sdpa_in_both_layouts_with_grouped_heads(layout: str, dtype: torch.dtype) -> None:
    q, k, v = (normal(2, h, n, 64, seed=h).to(dtype) for h, n in ((4, 21), (2, 30), (2, 30)))
    reference, expected = attention_with_lse(q, k, v, scale=0.2)
    if layout == "BNHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output, lse = sagewan.attend(q, k, v, mode="sdpa", layout=layout, scale=0.2, return_lse=True)
    assert output.shape == q.shape
    assert output.dtype == dtype
    output = output.transpose(1, 2) if layout == "BNHD" else output
    assert relative_error(output, reference) < 0.004
    torch.testing.assert_close(lse.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_mode_falls_back_or_is_refused_under_strict(session: module.Session) -> None:
    q, k, v = bias(40)
    sagewan.attend(q, k, v, mode="sageattn_3_fp4")
    assert ran(session) == {"torch.sdpa": 1}
    with pytest.raises(UnsupportedError, match="strict: no fallback"):
        sagewan.attend(q, k, v, mode="sageattn_3_fp4", strict=True)


def test_a_step_down_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = bias(9)
    for _ in range(3):
        sagewan.attend(q, k, v, mode="sageattn")
    (said,) = [line for line in caplog.messages if "sageattn gives way to sdpa" in line]
    assert "needs an NVIDIA GPU" in said


def test_emulation_computes_the_mode_itself(session: module.Session) -> None:
    q, k, v = bias(64)
    output = sagewan.attend(q, k, v, mode="sageattn_3_fp4", emulate=True, strict=True)
    assert isinstance(output, Tensor)
    assert ran(session) == {"emulated.sageattn_3_fp4": 1}
    assert 0.02 < relative_error(output, attention_with_lse(q, k, v)[0]) < 0.2


@pytest.mark.parametrize(("milliseconds", "chosen"), [(0.5, "flash_attn"), (2.0, "torch.sdpa")])
def test_auto_times_all_that_are_good_enough_once_and_takes_the_fastest(
    session: module.Session,
    flash: Callable[[str, float], list[str]],
    milliseconds: float,
    chosen: str,
) -> None:
    tested = flash("good", milliseconds)
    for _ in range(2):
        sagewan.attend(*bias(40), mode="auto")
    assert sorted(tested) == ["flash_attn", "torch.sdpa"]
    assert ran(session) == {chosen: 2}


def test_the_next_process_finds_what_was_proved(
    flash: Callable[[str, float], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = flash("good", 0.5)
    sagewan.attend(*bias(40), mode="flash_attn")
    monkeypatch.setattr(module.Session, "hardware", None)
    monkeypatch.setattr(module.Session, "evidence", {})
    monkeypatch.setattr(module, "_session", module.Session())
    sagewan.attend(*bias(40), mode="flash_attn")
    assert tested == ["flash_attn"]


def test_a_row_that_fails_in_use_is_left_and_not_tried_again(
    session: module.Session, flash: Callable[[str, float], list[str]]
) -> None:
    flash("crash", 0.5)
    q, k, v = bias(40)
    for _ in range(2):
        output = sagewan.attend(q, k, v, mode="flash_attn")
        assert isinstance(output, Tensor)
        assert relative_error(output, attention_with_lse(q, k, v)[0]) < 1e-5
    assert ran(session) == {"torch.sdpa": 2}
    with pytest.raises(UnsupportedError, match="no kernel image"):
        sagewan.attend(q, k, v, mode="flash_attn", strict=True)


Q = normal(1, 2, 8, 64)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ((Q[0], Q, Q), "give 4 dimensions each"),
        ((Q, Q, Q[:, :, :5]), "k and v must have the same shape"),
        ((Q, Q[..., :32], Q[..., :32]), "batch and head size must be equal"),
        ((Q, Q[:, :, :0], Q[:, :, :0]), "no dimension may be empty"),
        ((normal(1, 3, 8, 64), Q, Q), "must be a multiple"),
        ((Q, Q.half(), Q), "give all in float16, bfloat16 or float32"),
        ((Q.double(), Q.double(), Q.double()), "give all in float16, bfloat16 or float32"),
        ((Q, Q.to("meta"), Q.to("meta")), "put all on one CPU or CUDA device"),
    ],
)
def test_tensors_it_does_not_take(tensors: tuple[Tensor, Tensor, Tensor], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        sagewan.attend(*tensors, mode="sdpa")


def test_other_wrong_arguments() -> None:
    with pytest.raises(RequestError, match="did you mean sageattn"):
        sagewan.attend(Q, Q, Q, mode="sageatn")
    with pytest.raises(RequestError, match="use BHND or BNHD"):
        sagewan.attend(Q, Q, Q, mode="sdpa", layout="HND")
    with pytest.raises(ShapeError, match="scale=nan"):
        sagewan.attend(Q, Q, Q, mode="sdpa", scale=float("nan"))
    for absent in ("attn_mask", "is_causal", "dropout_p"):
        with pytest.raises(TypeError, match=absent):
            sagewan.attend(Q, Q, Q, mode="sdpa", **{absent: None})  # type: ignore[call-arg]


def test_inputs_stay_as_they_are() -> None:
    inputs = bias(20)
    before = [x.clone() for x in inputs]
    sagewan.attend(*inputs, mode="sageattn", emulate=True)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_a_padding_row_serves_only_lengths_where_it_does_not_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = replace(FLASH, key_block=64)
    assert row.padding_share(32_760) < catalogue.MAX_PADDING_SHARE < row.padding_share(333)
    assert row.padding_share(320) == 0


@pytest.mark.parametrize("mode", ["sdpa", "sageattn"])
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_a_compiled_program_has_no_break(mode: str, layout: str, session: module.Session) -> None:
    shape = (lambda x: x.transpose(1, 2)) if layout == "BNHD" else (lambda x: x)

    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = shape(q), shape(k), shape(v)
        out, lse = sagewan.attend(
            q, k, v, mode=mode, layout=layout, return_lse=True, emulate=True, scale=0.1
        )
        return out * 2 + sagewan.attend(q, k, v, mode=mode, layout=layout, emulate=True), lse

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for tokens in (40, 50):  # the second compiles for any length
        q, k, v = bias(tokens)
        out, lse = compiled(q, k, v)
        expected, expected_lse = program(q, k, v)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)
    assert sum(int(str(calls)) for calls in ran(session).values()) == 8


def test_a_compiled_program_is_refused_in_words() -> None:
    q, k, v = bias(40)
    compiled = torch.compile(sagewan.attend, backend="aot_eager")
    with pytest.raises(UnsupportedError, match="strict"):
        compiled(q, k, v, mode="sageattn_3_fp8", strict=True)
