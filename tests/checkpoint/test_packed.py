import pytest
import torch

from sagewan.checkpoint import kitchen
from sagewan.checkpoint.packed import FP8_DTYPES, Packed, unpack
from sagewan.errors import CheckpointError
from sagewan.reference.formats import nvfp4


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(40, 72, generator=torch.Generator().manual_seed(0)) * 0.03


def nvfp4_of(weight: torch.Tensor) -> Packed:
    data, scale, tensor_scale = kitchen.quantize_nvfp4(weight)
    return Packed(
        format="nvfp4",
        shape=(weight.shape[0], weight.shape[1]),
        data=data,
        scale=scale,
        tensor_scale=tensor_scale,
    )


@pytest.mark.parametrize("name", FP8_DTYPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_fp8_is_data_times_scale(name: str, per_channel: bool) -> None:
    data = torch.tensor([[1.0, -2.0], [0.5, 4.0]]).to(FP8_DTYPES[name])
    scale = torch.tensor([[2.0], [4.0]]) if per_channel else torch.tensor(2.0)
    packed = Packed(format=name, shape=(2, 2), data=data, scale=scale)
    second = 2.0 if per_channel else 1.0
    expected = torch.tensor([[2.0, -4.0], [second, 8.0 * second]])
    assert unpack(packed, torch.bfloat16).equal(expected.bfloat16())


def test_nvfp4_is_the_format_of_the_reference(weight: torch.Tensor) -> None:
    packed = nvfp4_of(weight)
    expected = nvfp4(weight).value()
    assert unpack(packed, torch.float32).shape == weight.shape
    assert (unpack(packed, torch.float32) - expected).norm() / expected.norm() < 1e-6
    # 16 rows and columns are the padding of its tensors, 128 and 4 of their scales.
    assert packed.data.shape == (48, 40)
    assert packed.scale is not None
    assert packed.scale.shape == (128, 8)


def test_nvfp4_has_the_high_nibble_first() -> None:
    weight = torch.zeros(16, 16)
    weight[0, 0], weight[0, 1] = 6.0, 0.5
    assert nvfp4_of(weight).data[0, 0] == 0x71  # e2m1: 6 is 0b111, ½ is 0b001


def test_mxfp8_multiplies_groups_by_powers_of_two() -> None:
    data = torch.ones(32, 64).to(torch.float8_e4m3fn)
    powers = torch.full((32, 2), 127, dtype=torch.uint8)
    powers[3, 1] = 130
    packed = Packed(format="mxfp8", shape=(32, 64), data=data, scale=kitchen.swizzle(powers))
    weight = unpack(packed, torch.float32)
    assert weight[3, 32:].eq(8).all()
    assert weight[3, :32].eq(1).all()
    assert weight[:3].eq(1).all()


def test_swizzled_scales_come_back() -> None:
    scale = torch.arange(40 * 9, dtype=torch.float32).reshape(40, 9)
    assert kitchen.unswizzle(kitchen.swizzle(scale), 40, 9).equal(scale)


def test_the_input_factor_is_part_of_the_weight() -> None:
    data = torch.ones(2, 3).to(torch.float8_e4m3fn)
    packed = Packed(
        format="float8_e4m3fn",
        shape=(2, 3),
        data=data,
        scale=torch.tensor(1.0),
        pre_scale=torch.tensor([1.0, 2.0, 3.0]),
    )
    assert unpack(packed, torch.float32).equal(torch.tensor([[1.0, 2.0, 3.0]] * 2))
    assert packed.nbytes == 6 + 4 + 12


def test_weights_of_zeros_stay_zeros() -> None:
    assert unpack(nvfp4_of(torch.zeros(16, 32)), torch.float32).eq(0).all()


def test_a_missing_scale_is_refused() -> None:
    packed = Packed(format="int8", shape=(1, 1), data=torch.ones(1, 1, dtype=torch.int8))
    with pytest.raises(CheckpointError, match="has no scale"):
        unpack(packed, torch.float32)


def test_an_unknown_format_is_refused() -> None:
    packed = Packed(format="int3", shape=(1, 1), data=torch.ones(1, 1))
    with pytest.raises(CheckpointError, match="int3"):
        unpack(packed, torch.float32)


@pytest.mark.parametrize("name", [*FP8_DTYPES, "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 40])
def test_sixteen_bits_are_rounded_once(
    name: str, dtype: torch.dtype, rows: int, weight: torch.Tensor
) -> None:
    kind = FP8_DTYPES.get(name, torch.int8)
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(rows, 1, generator=generator) / 100
    data = (weight * 1000).clamp(-120, 120).to(kind)
    packed = Packed(
        format=name, shape=(40, 72), data=data, scale=scale if rows > 1 else scale.view(())
    )
    assert unpack(packed, dtype).equal((data.float() * scale).to(dtype))
