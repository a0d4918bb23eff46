"""The launcher: arguments as each row takes them, inputs untouched, and an honest count."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from sagewan.attention.launch import Launcher, torch_backend
from sagewan.attention.resolve import ImplementationError
from sagewan.kernels.nvrtc import CudaError
from sagewan.plan.attention import Choice
from sagewan.plan.catalogue import Implementation, row_named
from sagewan.reference.attention import attention_with_lse, relative_error
from tests.fakes import Install, on_cpu
from tests.inputs import bias, normal

SDPA = row_named("torch.sdpa")
sdpa = torch.nn.functional.scaled_dot_product_attention


def choice(row: Implementation) -> Choice:
    return Choice(row.mode, row)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Implementation]:
    """A row whose function is the one given."""

    def row(function: Callable[..., object], **fields: object) -> Implementation:
        module = ModuleType("made_up_package")
        function.__module__, function.__qualname__ = "made_up_package", "attend"
        module.attend = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "made_up_package", module)
        base = replace(SDPA, name="made_up", call="made_up_package:attend", grouped_option=None)
        return replace(base, **fields)  # type: ignore[arg-type]

    return row


def test_each_call_is_counted_by_mode_implementation_and_backend() -> None:
    launcher = Launcher()
    q, k, v = bias(40)
    for _ in range(3):
        launcher.attend(q, k, v, choice(SDPA))
    launcher.attend(q, k, v, choice(row_named("emulated.sageattn")))
    assert launcher.ran() == [
        {"mode": "sdpa", "implementation": "torch.sdpa", "torch_backend": "flash", "calls": 3},
        {
            "mode": "sageattn",
            "implementation": "emulated.sageattn",
            "torch_backend": None,
            "calls": 1,
        },
    ]


def test_calls_that_leave_out_blocks_are_counted_and_only_some_rows_take_them() -> None:
    launcher, mask = Launcher(), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    emulated = choice(row_named("emulated.sageattn"))
    launcher.attend(*bias(40), emulated)
    launcher.attend(*bias(40), emulated, block_mask=mask)
    assert (launcher.calls, launcher.masked_calls) == (2, 1)

    def broken_off() -> None:
        with launcher.whole():
            launcher.attend(*bias(40), emulated, block_mask=mask)
            launcher.attend(*bias(40), choice(SDPA), block_mask=mask)

    with pytest.raises(ImplementationError, match="can't leave out blocks of keys"):
        broken_off()
    assert (launcher.calls, launcher.masked_calls) == (2, 1)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_exact_attention_past_blocks_is_the_formula(shape: tuple[int, int]) -> None:
    q, k, v = normal(2, 4, 300, 32), normal(2, 2, 270, 32, seed=1), normal(2, 2, 270, 32, seed=2)
    mask = torch.rand(*shape, 3, 3, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[:, :, 1] = False
    out = Launcher().attend(q, k, v, choice(row_named("sagewan.sdpa_blocks")), block_mask=mask)
    expected = attention_with_lse(q, k, v, block_mask=mask)[0]
    assert relative_error(out, expected) < 1e-6


def test_a_planted_substitution_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q

    monkeypatch.setattr("sagewan.reference.emulation.sageattn", planted)
    launcher = Launcher()
    launcher.attend(*bias(8), choice(row_named("emulated.sageattn")))
    (ran,) = launcher.ran()
    assert ran["implementation"] != "emulated.sageattn"
    assert "planted" in str(ran["implementation"])


def test_a_substitution_of_torch_shows_and_has_no_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: q)
    launcher = Launcher()
    launcher.attend(*bias(8), choice(SDPA))
    (ran,) = launcher.ran()
    assert ran["implementation"] != "torch.sdpa"
    assert "lambda" in str(ran["implementation"])


def test_sdpa_is_bit_for_bit_torchs_own() -> None:
    q, k, v = bias(77)
    assert torch.equal(Launcher().attend(q, k, v, choice(SDPA)), sdpa(q, k, v))


def test_layout_and_strides_are_arranged(made_up: Callable[..., Implementation]) -> None:
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.shape, q.stride(-1), k.stride(-1), v.stride(-1)))
        return sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    q, k, v = bias(33)
    odd = [x.mT.contiguous().mT for x in (q, k, v)]
    output = Launcher().attend(*odd, choice(made_up(attend, layout="BNHD")))
    assert seen == [((1, 33, 2, 128), 1, 1, 1)]
    torch.testing.assert_close(output, sdpa(q, k, v))


def test_a_function_that_changes_k_gets_its_own(install: Install) -> None:
    row = on_cpu("sageattention.sageattn_1")
    assert row.changes_key
    install(row, "changes key")
    q, k, v = bias(64)
    before = k.clone()
    output = Launcher().attend(q, k, v, choice(row))
    assert torch.equal(k, before)
    torch.testing.assert_close(output, sdpa(q, k, v), atol=1e-4, rtol=1e-4)


def test_scale_by_its_keyword_or_in_q(made_up: Callable[..., Implementation]) -> None:
    q, k, v = bias(30)
    expected = sdpa(q, k, v, scale=0.2)

    def named(q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None = None) -> Tensor:
        assert sm_scale == 0.2
        return sdpa(q, k, v, scale=sm_scale)

    def without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v)

    for row in (made_up(named, scale="sm_scale"),):
        torch.testing.assert_close(Launcher().attend(q, k, v, choice(row), scale=0.2), expected)
    row = made_up(without, scale=None)
    torch.testing.assert_close(Launcher().attend(q, k, v, choice(row), scale=0.2), expected)


@pytest.mark.parametrize("name", ["torch.sdpa", "emulated.sageattn"])
def test_log_sum_exp_and_grouped_heads(name: str) -> None:
    q, k, v = normal(2, 4, 21, 64), normal(2, 2, 30, 64, seed=1), normal(2, 2, 30, 64, seed=2)
    output, lse = Launcher().attend_with_lse(q, k, v, choice(row_named(name)), scale=0.1)
    reference, expected = attention_with_lse(q, k, v, scale=0.1)
    assert lse.dtype == torch.float32
    assert relative_error(output, reference) < 0.02
    assert relative_error(lse, expected) < 0.002


def test_the_first_of_several_results_is_the_output(
    made_up: Callable[..., Implementation],
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return sdpa(q, k, v), None

    q, k, v = bias(9)
    torch.testing.assert_close(Launcher().attend(q, k, v, choice(made_up(attend))), sdpa(q, k, v))


@pytest.mark.parametrize(
    ("body", "words"), [("crash", "RuntimeError: no kernel image"), ("wrong shape", "(1, 2, 7, ")]
)
def test_a_failure_carries_the_row_and_the_reason(install: Install, body: str, words: str) -> None:
    row = on_cpu("sageattention.sageattn_1")
    install(row, body)
    launcher = Launcher()
    with pytest.raises(ImplementationError) as caught:
        launcher.attend(*bias(8), choice(row))
    assert caught.value.implementation == row.name
    assert caught.value.objection.code == "run-failed"
    assert words in caught.value.objection.sentence()
    assert launcher.ran() == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        CudaError("loading hopper_attention.cu: CUDA_ERROR_OUT_OF_MEMORY"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_not_the_rows_fault(
    made_up: Callable[..., Implementation], error: Exception
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error)) as caught:
        Launcher().attend(*bias(8), choice(made_up(attend)))
    assert caught.value is error


def test_what_a_failing_row_breaks_off_is_not_counted(
    made_up: Callable[..., Implementation],
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise ValueError("broken")

    launcher = Launcher()
    with launcher.whole():
        launcher.attend(*bias(8), choice(SDPA))
    broken = choice(made_up(attend))

    def broken_off() -> None:
        with launcher.whole():
            launcher.attend(*bias(8), choice(SDPA))
            launcher.attend(*bias(8), broken)

    with pytest.raises(ImplementationError):
        broken_off()
    assert [ran["calls"] for ran in launcher.ran()] == [1]


def test_nor_is_what_memory_that_ran_out_breaks_off() -> None:
    launcher = Launcher()

    def broken_off() -> None:
        with launcher.whole():
            launcher.attend(*bias(8), choice(SDPA))
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        broken_off()
    assert launcher.ran() == []


AUX_DATA = (
    "Argument aux_data (position 17) cannot be converted to a JitArgument for function 'f'. Its "
    "type `<class 'NoneType'>` is not supported."
)


@pytest.mark.parametrize(
    ("message", "kind", "shown"),
    [
        (AUX_DATA, UserWarning, False),
        (AUX_DATA.replace("aux_data", "mask"), UserWarning, True),
        (AUX_DATA, DeprecationWarning, True),
        ("something else", UserWarning, True),
    ],
)
def test_only_the_warning_that_a_row_names_is_silent(
    made_up: Callable[..., Implementation], message: str, kind: type[Warning], shown: bool
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        warnings.warn(message, kind, stacklevel=1)
        return q

    row = made_up(attend, quiet=row_named("flash_attn.cute").quiet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Launcher().attend(*bias(8), choice(row))
    assert len(caught) == shown


OPERATORS = {
    "flash": "aten::_scaled_dot_product_flash_attention_for_cpu",
    "math": "aten::_scaled_dot_product_attention_math",
}


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_the_backend_is_the_one_that_a_trace_shows(backend: SDPBackend) -> None:
    q, k, v = bias(16)
    with sdpa_kernel(backend), profile(activities=[ProfilerActivity.CPU]) as trace:
        launcher = Launcher()
        launcher.attend(q, k, v, choice(SDPA))
    name = str(launcher.ran()[0]["torch_backend"])
    assert {event.key for event in trace.key_averages()} & set(OPERATORS.values()) == {
        OPERATORS[name]
    }


def test_switching_a_backend_off_is_noticed_by_the_same_launcher() -> None:
    q, k, v = bias(16)
    launcher = Launcher()
    launcher.attend(q, k, v, choice(SDPA))
    with sdpa_kernel(SDPBackend.MATH):
        launcher.attend(q, k, v, choice(SDPA))
        assert torch_backend(q, k, v) == "math"
    assert [ran["torch_backend"] for ran in launcher.ran()] == ["flash", "math"]


def test_what_is_prepared_already_is_attended_and_counted_as_its_row() -> None:
    row = replace(row_named("torch.sdpa"), name="made.up", call="tests.attention.halves:whole")
    choice, launcher = Choice("sdpa", row), Launcher()
    q = torch.randn(1, 2, 5, 8)
    out = torch.empty_like(q)
    assert launcher.attend_prepared((q, q, q), out, choice) is out
    assert torch.allclose(out, q.mean(2, keepdim=True).expand_as(q))
    masked = launcher.attend_prepared((q, q, q), out, choice, block_mask=torch.ones(1, 1, 1, 1))
    assert torch.allclose(masked, q[:, :, :1].expand_as(q))
    launcher.attend(q, q, q, choice)
    assert [(ran["implementation"], ran["calls"]) for ran in launcher.ran()] == [("made.up", 3)]
    assert launcher.masked_calls == 1
    with pytest.raises(ImplementationError, match="invalid argument"), launcher.whole():
        launcher.attend_prepared(None, out, choice)
    assert launcher.calls == 3
