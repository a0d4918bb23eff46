"""On a real GPU: every row that can run here against float64, and what torch truly picked."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from sagewan.attention.launch import Launcher
from sagewan.attention.problems import LIMITS
from sagewan.attention.self_test import examine, self_test
from sagewan.pipeline.probe import probe
from sagewan.plan.attention import Choice
from sagewan.plan.catalogue import ROWS, Implementation, Problem, row_named
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.modes import MODES
from sagewan.reference.attention import attention, attention_with_lse, relative_error
from tests.inputs import bias, local

pytestmark = pytest.mark.gpu

PROBLEM = Problem(head_dim=128, dtype="bfloat16")
BOTH = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
OPERATORS = {
    "flash": "aten::_scaled_dot_product_flash_attention",
    "cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "efficient": "aten::_scaled_dot_product_efficient_attention",
    "math": "aten::_scaled_dot_product_attention_math",
}


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return probe()


@pytest.fixture(scope="module")
def device(hardware: Hardware) -> Device:
    return hardware.device("cuda")


def usable(row: Implementation, device: Device, hardware: Hardware) -> Implementation:
    """The row, or a skip with what it objects to here."""
    objection = row.objection(PROBLEM, device, hardware)
    if objection:
        pytest.skip(objection.sentence())
    if row.name == "comfy_kitchen.int8_attention":
        pytest.importorskip("comfy_kitchen.backends.cuda._C", reason="without its CUDA extension")
    return row


def on_gpu(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.to("cuda", torch.bfloat16) for x in inputs)
    return q, k, v


def run(row: Implementation, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Launcher().attend(q, k, v, Choice(row.mode, row))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_that_can_run_here_passes_its_self_test(
    row: Implementation,
    device: Device,
    hardware: Hardware,
    record_property: Callable[[str, object], None],
) -> None:
    test = self_test(usable(row, device, hardware), device, PROBLEM)
    assert test.passed, f"{row.name}: {test.objection.sentence() if test.objection else ''}"
    assert test.milliseconds is not None
    record_property("error", test.error)
    record_property("milliseconds", test.milliseconds)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_strided_inputs_are_taken_and_not_changed(
    row: Implementation, device: Device, hardware: Hardware
) -> None:
    usable(row, device, hardware)
    # As the transformer hands them over: [B, N, H, D] in memory, seen as [B, H, N, D].
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in on_gpu(local(1024)))
    before = [x.clone() for x in (q, k, v)]
    error = relative_error(run(row, q, k, v), attention(q, k, v))
    assert error < LIMITS["local"][MODES[row.mode].quality]
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_whole_sequence_of_170_000_tokens(
    row: Implementation, device: Device, hardware: Hardware
) -> None:
    usable(row, device, hardware)
    if row.emulated:
        pytest.skip("the emulation of so many rows takes minutes")
    q, k, v = on_gpu(bias(170_048, heads=1))
    rows = torch.linspace(0, 170_047, 64, device="cuda").long()
    error = relative_error(run(row, q, k, v)[:, :, rows], attention(q[:, :, rows], k, v))
    assert error < LIMITS["bias"][MODES[row.mode].quality]


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.key_block > 1], ids=lambda row: row.name
)
def test_rows_that_take_padding_for_keys_do_so(
    row: Implementation, device: Device, hardware: Hardware
) -> None:
    # If this fails, the package was mended: take key_block out of its row.
    usable(row, device, hardware)
    q, k, v = on_gpu(bias(row.key_block + 1))
    assert relative_error(run(row, q, k, v), attention(q, k, v)) > 0.05


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_log_sum_exp_of_rows_that_have_one(
    row: Implementation, device: Device, hardware: Hardware
) -> None:
    usable(row, device, hardware)
    if not row.log_sum_exp:
        pytest.skip("it has none")
    q, k, v = on_gpu(bias(512))
    _, lse = Launcher().attend_with_lse(q, k, v, Choice(row.mode, row))
    assert relative_error(lse, attention_with_lse(q, k, v)[1]) < 0.02


@pytest.mark.parametrize("tokens", [320, 1001, 32_760])
@pytest.mark.parametrize(
    "allowed",
    [None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
)
def test_the_backend_is_the_one_that_a_trace_shows(tokens: int, allowed: SDPBackend | None) -> None:
    if allowed is SDPBackend.MATH and tokens > 10_000:
        pytest.skip("the scores would fill the memory")
    q, k, v = on_gpu(bias(tokens))
    every = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    launcher = Launcher()
    row = row_named("torch.sdpa")
    with sdpa_kernel([allowed] if allowed else every, set_priority=False):
        launcher.attend(q, k, v, Choice("sdpa", row))
        with profile(activities=BOTH, acc_events=True) as trace:
            launcher.attend(q, k, v, Choice("sdpa", row))
    (ran,) = launcher.ran()
    operators = {event.key for event in trace.key_averages()} & set(OPERATORS.values())
    assert operators == {OPERATORS[str(ran["torch_backend"])]}
    assert ran["calls"] == 2


def test_the_count_of_calls_is_that_of_the_trace() -> None:
    q, k, v = on_gpu(bias(320))
    launcher = Launcher()
    with profile(activities=BOTH, acc_events=True) as trace:
        for _ in range(7):
            launcher.attend(q, k, v, Choice("sdpa", row_named("torch.sdpa")))
    calls = {event.key: event.count for event in trace.key_averages()}
    assert calls["aten::scaled_dot_product_attention"] == 7
    assert sum(int(str(ran["calls"])) for ran in launcher.ran()) == 7


def test_out_of_memory_in_a_self_test_is_not_held_against_the_row(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", full)
    test = examine(row_named("torch.sdpa"), device, PROBLEM)
    assert test.objection is not None
    assert test.objection.code == "self-test-no-memory"
