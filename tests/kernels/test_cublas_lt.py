"""What cuBLASLt is not asked for, and what is said where it is not there; its products run on a GPU
alone (``tests/gpu/test_linear_gpu``)."""

import ctypes
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sagewan.errors import ShapeError
from sagewan.kernels import cublas_lt
from sagewan.kernels.cublas_lt import CublasError, add_product
from sagewan.kernels.fp8_rows import Fp8Rows


def given(
    sides: tuple[int, int, int] = (4, 32, 48),
) -> tuple[Fp8Rows, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K], weight [N, K], its scales, and what the product is added to."""
    m, n, k = sides
    weight = torch.zeros(n, k).to(torch.float8_e4m3fn)
    rows = Fp8Rows.empty(m, k, device=torch.device("cpu"))
    return rows, weight, torch.ones(n), torch.zeros(m, n, dtype=torch.bfloat16)


@pytest.mark.parametrize("sides", [(4, 24, 48), (4, 32, 40)])
def test_sides_that_the_hardware_does_not_take_are_refused(sides: tuple[int, int, int]) -> None:
    x, weight, scale, into = given(sides)
    with pytest.raises(ShapeError, match="multiples of 16"):
        add_product(x, weight, scale, None, into)


def test_what_lies_apart_is_refused() -> None:
    x, weight, scale, _ = given()
    with pytest.raises(ShapeError, match="contiguous"):
        add_product(x, weight, scale, None, torch.zeros(32, 4, dtype=torch.bfloat16).t())


def test_what_does_not_fit_together_is_refused() -> None:
    x, weight, scale, into = given()
    narrow, other = weight[:, :32].contiguous(), torch.zeros(4, 16, dtype=torch.bfloat16)
    for arguments in ((narrow, scale, None, into), (weight, scale, None, other)):
        with pytest.raises(ShapeError, match="K"):
            add_product(x, *arguments)
    with pytest.raises(ShapeError, match="K"):
        add_product(x, weight, torch.ones(1), None, into)
    with pytest.raises(ShapeError, match="float16: give bfloat16"):
        add_product(x, weight, scale, None, into.half())
    with pytest.raises(ShapeError, match="give bfloat16"):
        add_product(x, weight, scale, torch.ones(32), into)


def test_a_torch_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "9.9")
    cublas_lt._library.cache_clear()
    try:
        with pytest.raises(CublasError, match=r"cublasLt\S*9\S* was not found"):
            cublas_lt._library()
    finally:
        cublas_lt._library.cache_clear()


def test_what_it_tells_of_an_algorithm_has_the_size_that_it_writes() -> None:
    assert ctypes.sizeof(cublas_lt._Found) == 96


class Recording:
    """A library that writes down what it is asked for, and takes its time."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            time.sleep(0.0005)
            self.calls.append((name.removeprefix("cublasLt"), threading.get_ident()))
            if name.endswith("GetHeuristic"):
                arguments[-1]._obj.value = 1
            return 0

        return call


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recording]:
    library = Recording()
    monkeypatch.setattr(cublas_lt, "_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    cublas_lt._handle.cache_clear()
    yield library
    cublas_lt._handle.cache_clear()


def product() -> cublas_lt._Product:
    return cublas_lt._Product(0, cublas_lt._Shape(4, 32, 48, bias=True, alignment=16))


def test_what_is_made_to_choose_by_is_destroyed(recorded: Recording) -> None:
    product()
    made = [name for name, _ in recorded.calls if "Preference" in name and "Set" not in name]
    assert made == ["MatmulPreferenceCreate", "MatmulPreferenceDestroy"]


def test_a_threads_pointers_are_those_it_is_run_with(recorded: Recording) -> None:
    own = product()
    recorded.calls.clear()
    x, weight, scale, into = given()
    pointers = {cublas_lt._A_SCALE: scale, cublas_lt._B_SCALE: x.scale, cublas_lt._BIAS: scale}

    def run() -> None:
        for _ in range(3):
            own.run(weight, x.data, into, pointers)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorded.calls) == 3 * 3 * 4
    for start in range(0, len(recorded.calls), 4):
        names, owners = zip(*recorded.calls[start : start + 4], strict=True)
        assert names == ("MatmulDescSetAttribute",) * 3 + ("Matmul",)
        assert len(set(owners)) == 1
