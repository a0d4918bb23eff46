"""GGUF's packed types are unpacked on the GPU as on the CPU, bit for bit, and fast enough to be
unpacked anew for each layer."""

from collections.abc import Callable

import pytest
import torch

from sagewan.checkpoint.gguf_unpack import unpack_gguf
from tests.checkpoint.test_gguf_unpack import PACKED, packed_bytes

pytestmark = pytest.mark.gpu

OWN = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("kind", PACKED)
def test_the_gpu_unpacks_what_the_cpu_does(kind: str) -> None:
    data = torch.from_numpy(packed_bytes(kind, rows=64, blocks=20, seed=3))
    assert torch.equal(unpack_gguf(data.cuda(), kind).cpu(), unpack_gguf(data, kind))


@pytest.mark.parametrize("kind", OWN)
def test_a_layer_of_14b_is_unpacked_in_little_of_its_products_time(kind: str) -> None:
    numbers, size = PACKED[kind]
    rows, columns = 13824, 5120
    data = torch.zeros(rows, columns // numbers * size, dtype=torch.uint8, device="cuda")
    x = torch.zeros(32768, columns, dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    product = _milliseconds(lambda: torch.nn.functional.linear(x, weight))
    unpacking = _milliseconds(lambda: unpack_gguf(data, kind).bfloat16())
    assert unpacking < 0.5 * product, f"{unpacking:.2f} ms beside {product:.2f} ms"


def _milliseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        run()
    start.record()
    for _ in range(10):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 10
