"""Loading a row's function, and telling by its own account whether it is the one named."""

import functools
from dataclasses import replace

import pytest
import torch

from sagewan.attention.resolve import ImplementationError, load, name_of, one_line
from sagewan.plan.catalogue import ROWS, row_named
from tests.fakes import Install, on_cpu

SAGE = on_cpu("sageattention.sageattn_1")


def refusal(install: Install, body: str) -> tuple[str, str]:
    install(SAGE, body)
    with pytest.raises(ImplementationError) as caught:
        load(SAGE)
    assert caught.value.implementation == SAGE.name
    return caught.value.objection.code, caught.value.objection.sentence()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import error", "ImportError: libcudart.so.11"),
        ("import assertion", "AssertionError: built for another torch"),
        ("import exit", "SystemExit: no GPU found"),
    ],
)
def test_any_failure_of_an_import_is_an_objection(install: Install, body: str, words: str) -> None:
    code, sentence = refusal(install, body)
    assert code == "import-failed"
    assert "sageattention" in sentence
    assert words in sentence


def test_a_missing_function_is_named(install: Install) -> None:
    code, sentence = refusal(install, "function missing")
    assert code == "function-missing"
    assert "sageattention.sageattn" in sentence


def test_a_package_that_is_not_there_is_an_objection() -> None:
    with pytest.raises(ImplementationError, match="No module named 'sageattn3'"):
        load(row_named("sageattn3.blackwell"))


def test_rows_of_our_own_load_and_know_their_name() -> None:
    own = [row for row in ROWS if row.package is None]
    assert len(own) >= 5
    for row in own:
        assert name_of(load(row), row) == row.name


def test_a_function_of_the_named_package_has_the_rows_name(install: Install) -> None:
    install(SAGE, "good")
    assert name_of(load(SAGE), SAGE) == SAGE.name


def test_another_function_is_called_what_it_is() -> None:
    row = row_named("torch.sdpa")

    def planted() -> None: ...

    same_package = torch.nn.functional.softmax
    assert name_of(planted, row).endswith(
        "test_resolve.test_another_function_is_called_what_it_is.<locals>.planted"
    )
    assert name_of(same_package, row) == "torch.nn.functional.softmax"
    assert row.name not in name_of(functools.partial(planted), row)


def test_an_emulation_in_place_of_our_kernel_is_called_what_it_is() -> None:
    emulation = row_named("emulated.sageattn_3")
    kernel = replace(emulation, name="kernel", call="sagewan.kernels.some_file:sageattn_3")
    assert name_of(load(emulation), emulation) == "emulated.sageattn_3"
    assert name_of(load(emulation), kernel) == "sagewan.reference.emulation.sageattn_3"


def test_an_error_is_told_in_one_line() -> None:
    assert (
        one_line(RuntimeError("\n  CUDA error: bad\nTraceback …"))
        == "RuntimeError: CUDA error: bad"
    )
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 999))) == 200
