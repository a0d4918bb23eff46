"""A folder of made-up packages for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fakes


@pytest.fixture
def install(tmp_path: Path) -> Iterator[fakes.Install]:
    """Call it with a row and a body of ``fakes.BODIES``."""
    folder = tmp_path / "packages"
    folder.mkdir()
    contexts = []

    def installed(row: fakes.Implementation, body: str) -> None:
        fakes.install(folder, row, body)
        context = fakes.importable(folder)
        context.__enter__()
        contexts.append(context)

    yield installed
    for context in reversed(contexts):
        context.__exit__(None, None, None)
