"""What the launchers refuse, each in one sentence, and how the rows lead to them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sagewan.attention.resolve import load, name_of
from sagewan.errors import ShapeError
from sagewan.kernels import fp8_attention, hopper_attention, int8_attention
from sagewan.kernels import launch as launching
from sagewan.kernels.launch import Repeated, Schedule, block_of, check, copied
from sagewan.kernels.prepared import Prepared, Rows
from sagewan.plan.catalogue import Problem, row_named, rows_of
from sagewan.plan.hardware import Device, Hardware

MODES = ("sageattn", "sageattn_3", "sageattn_3_fp8", "sageattn_3_fp4")


def tensors(**changes: object) -> tuple[Tensor, Tensor, Tensor]:
    options = {"shape": (1, 4, 16, 64), "keys": (1, 2, 20, 64), "dtype": torch.float16}
    options.update(changes)
    q, k, v = (
        torch.empty(options[name], dtype=options["dtype"], device="meta")
        for name in ("shape", "keys", "keys")
    )
    return q, k, v


def test_what_the_kernels_take_passes() -> None:
    check(*tensors())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": torch.float32}, "bfloat16 or as float16"),
        ({"shape": (4, 16, 64)}, "give \\[batch, heads, tokens, size\\]"),
        ({"keys": (2, 2, 20, 64)}, "do not fit together"),
        ({"keys": (1, 2, 20, 32)}, "do not fit together"),
        ({"keys": (1, 2, 0, 64)}, "none may be empty"),
        ({"keys": (1, 3, 20, 64)}, "4 query heads can't share 3 key heads"),
        ({"shape": (1, 4, 16, 100), "keys": (1, 2, 20, 100)}, "multiple of 8 up to 256"),
        ({"shape": (1, 4, 16, 264), "keys": (1, 2, 20, 264)}, "multiple of 8 up to 256"),
    ],
)
def test_what_they_do_not_take_is_refused_with_the_fix(
    changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ShapeError, match=sentence):
        check(*tensors(**changes))


def test_mixed_dtypes_gradients_and_the_cpu_are_refused() -> None:
    q, k, v = tensors()
    with pytest.raises(ShapeError, match="float16, float16, bfloat16"):
        check(q, k, v.bfloat16())
    with pytest.raises(ShapeError, match="no_grad"):
        check(q.requires_grad_(), k, v)
    with torch.no_grad():
        check(q, k, v)
    with pytest.raises(ShapeError, match="need an NVIDIA GPU"):
        check(*(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)))


@pytest.mark.parametrize(("size", "block"), [(8, 32), (64, 64), (72, 128), (128, 128), (136, 256)])
def test_head_sizes_are_padded_to_powers_of_two(size: int, block: int) -> None:
    assert block_of(size) == block


@pytest.mark.parametrize("mode", MODES)
def test_our_row_comes_first_and_leads_to_its_launcher(mode: str) -> None:
    first, *others = rows_of(mode)
    portable = f"sagewan.{mode}"
    # What is made for one architecture stands before what runs on all.
    assert first.name == portable or (first.name, others[0].name) == (
        f"{portable}_hopper",
        portable,
    )
    assert name_of(load(first), first) == first.name


@pytest.mark.parametrize(
    ("system", "package"), [("Linux", "triton"), ("Windows", "triton-windows")]
)
def test_the_package_goes_by_the_systems_name(system: str, package: str) -> None:
    row = row_named("sagewan.sageattn")
    device = Device(name="a GPU", sm=89)
    problem = Problem(head_dim=128, dtype="bfloat16")
    hardware = Hardware(cpu=Device(name="a CPU"), system=system, packages={package: "3.6.0"})
    assert row.objection(problem, device, hardware) is None
    missing = Hardware(cpu=Device(name="a CPU"), system=system)
    objection = row.objection(problem, device, missing)
    assert objection is not None
    assert f"the package {package} is not installed" in objection.sentence()
    old = Hardware(cpu=Device(name="a CPU"), system=system, packages={package: "3.5.1"})
    objection = row.objection(problem, device, old)
    assert objection is not None
    assert objection.code == "package-version"


@pytest.mark.parametrize(
    ("sm", "found", "code"),
    [(121, "3.7.1", "package-version"), (121, "3.8.0", None), (120, "3.6.0", None)],
)
def test_fp4_wants_a_newer_triton_on_12_1(sm: int, found: str, code: str | None) -> None:
    problem = Problem(head_dim=128, dtype="bfloat16")
    hardware = Hardware(cpu=Device(name="a CPU"), system="Linux", packages={"triton": found})
    row = row_named("sagewan.sageattn_3_fp4")
    objection = row.objection(problem, Device(name="a GPU", sm=sm), hardware)
    assert (objection.code if objection else None) == code
    if objection:
        assert "3.8 or newer" in objection.sentence()


def test_what_the_first_launch_compiled_is_called_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, object]] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: calls.append(("kept", (grid, *arguments)))

    def first(_: object, grid: object, __: object, arguments: object, ___: object) -> Compiled:
        calls.append(("looked up", grid))
        return Compiled()

    monkeypatch.setattr(launching, "launch", first)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    launch = Repeated(object(), Schedule(warps=4))
    x = torch.zeros(64, dtype=torch.uint8)
    here = x.device

    def once(kind: int, x: Tensor) -> str:
        launch(kind, (2, 1, 1), here, {"x": x, "N": 3})
        return calls[-1][0]

    assert once(1, x) == "looked up"
    assert once(1, x) == "kept"
    assert calls[-1][1] == ((2, 1, 1), x, 3)
    assert once(2, x) == "looked up", "another kind is another program"
    assert once(1, x[1:]) == "looked up", "an address that the program was not compiled for"
    assert once(1, x) == "kept"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert once(1, x) == "looked up", "another device is the current one"


def test_what_the_memory_accelerator_copies_is_told_from_what_it_cannot() -> None:
    x = torch.empty(2, 3, 40, 64, dtype=torch.float16)
    for one in (x, x.transpose(1, 2), x[:, :, 5:, 8:]):
        made = copied(one, (1, 1, 16, 64))
        assert made is not None
        assert (made.shape, made.strides) == (list(one.shape), list(one.stride()))
    # Channels apart, no multiple of 16 bytes from row to row, a first byte between, and one row
    # again and again.
    odd = torch.empty(2, 3, 40, 68, dtype=torch.float16)[..., :64]
    for other in (x.mT, odd, x[..., 4:], x[:, :, :1].expand_as(x)):
        assert copied(other, (1, 1, 16, 64)) is None


@pytest.mark.parametrize(
    ("attend", "queries", "keys"),
    [
        (int8_attention.attend, 64, 64),  # the Hopper kernel's
        (fp8_attention.attend, 64, 128),
        (hopper_attention.attend, 32, 64),
        (hopper_attention.attend, 64, 32),
    ],
)
def test_scales_finer_than_a_kernels_are_refused(
    attend: Callable[..., object], queries: int, keys: int
) -> None:
    data = torch.zeros(1, 1, 128, 128, dtype=torch.int8)
    rows = [Rows(data=data, scale=data[..., 0].float(), rows_per_scale=n) for n in (queries, keys)]
    v = data.half()
    prepared = Prepared(
        q=rows[0], k=rows[1], v=v, queries=128, keys=128, head_dim=128, dtype=v.dtype
    )
    with pytest.raises(ShapeError, match=f"{queries} queries and {keys} keys share a scale"):
        attend(prepared)
