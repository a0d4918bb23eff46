"""Runs of one process, one after the other, so that a second video starts at once."""

from types import TracebackType

from sagewan.pipeline.loaded import Loaded
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.run import Prepared, Result, execute, prepare
from sagewan.plan.request import Request


class Session(Loaded):
    """Runs requests one after the other, and keeps what they share, as :class:`Loaded` says. Use it
    on one thread.

    >>> with Session() as session:  # doctest: +SKIP
    ...     for seed in range(4):
    ...         session.generate(Request(prompt="a red ball", seed=seed, output=...))
    """

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def generate(self, request: Request, *, watch: Watch | None = None) -> Result:
        """As :func:`sagewan.generate`. After an error the session can go on."""
        watch = watch or Watch()
        return self.execute(self.prepare(request, watch), watch)

    def prepare(self, request: Request, watch: Watch) -> Prepared:
        """As :func:`sagewan.pipeline.run.prepare`."""
        return prepare(request, watch, loaded=self)

    def execute(self, prepared: Prepared, watch: Watch) -> Result:
        """As :func:`sagewan.pipeline.run.execute`."""
        return execute(prepared, watch, loaded=self)
