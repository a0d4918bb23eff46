"""What cuBLASLt is not asked for, and what is said where it is not there; its products run on a GPU
alone (``tests/gpu/test_linear_gpu``)."""

import ctypes

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
