import gguf
import numpy as np
import pytest
import torch

from sagewan.checkpoint.gguf_header import TYPES
from sagewan.checkpoint.gguf_unpack import unpack_gguf
from sagewan.checkpoint.packed import Packed, unpack

PACKED = {name: (numbers, size) for name, numbers, size in TYPES.values() if numbers > 1}


def packed_bytes(kind: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random bytes whose float16 factors are finite, as any file's are."""
    _, size = PACKED[kind]
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    # The exponent's upper bits lie in the odd byte of a factor; wherever the type has factors,
    # this keeps them below 2.
    starts = {"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}
    doubled = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
    for start in starts.get(kind, (0, 2) if kind in doubled else (0,)):
        data[:, :, start + 1] &= 0xBF
    return data.reshape(rows, -1)


def test_the_types_are_those_of_the_package() -> None:
    for number, (name, numbers, size) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name
        assert gguf.GGML_QUANT_SIZES[kind] == (numbers, size)


@pytest.mark.parametrize("kind", PACKED)
def test_every_type_unpacks_as_the_package_does_bit_for_bit(kind: str) -> None:
    data = packed_bytes(kind, rows=7, blocks=5, seed=1)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    found = unpack_gguf(torch.from_numpy(data), kind)
    assert found.shape == (7, 5 * PACKED[kind][0])
    assert np.isfinite(expected).all()
    assert torch.equal(found, torch.from_numpy(expected))


def test_a_packed_weight_is_rounded_once() -> None:
    data = torch.from_numpy(packed_bytes("Q5_K", rows=3, blocks=2, seed=2))
    weight = Packed(format="gguf:Q5_K", shape=(3, 512), data=data)
    assert torch.equal(unpack(weight, torch.bfloat16), unpack_gguf(data, "Q5_K").bfloat16())
    assert weight.nbytes == 3 * 2 * 176
