import pytest
import torch

from sagewan.memory import upload as module
from sagewan.memory.upload import upload


def test_every_tensor_arrives_whole_in_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UPLOAD", 1000)
    monkeypatch.setattr(module, "_LEAST", 100)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(37, 53, generator=generator),
        torch.randn(4, 250, generator=generator).bfloat16(),
        torch.randn(3, 5, generator=generator),
        torch.randn((), generator=generator),
        torch.randn(8, 16, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last_3d),
        torch.randint(0, 256, (1000,), generator=generator).byte(),
        torch.randn(9, 40, generator=generator).to(torch.float8_e4m3fn),
    ]
    arrived = upload(tensors, "cpu")
    for one, wanted in zip(arrived, tensors, strict=True):
        assert one.dtype == wanted.dtype
        assert one.stride() == wanted.stride()
        assert one.data_ptr() != wanted.data_ptr()
        assert torch.equal(one.float(), wanted.float())


def test_nothing_of_an_inference_mode_is_left_in_weights() -> None:
    with torch.inference_mode():
        (arrived,) = upload([torch.zeros(1 << 19)], "cpu")
    assert not arrived.is_inference()
