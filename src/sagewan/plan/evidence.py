"""What trying things has taught: self-test results and failures, as values a plan reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sagewan.plan.objection import Objection
from sagewan.plan.step_cache import Magnitudes


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """One implementation compared with float64 on one device, in one head size and dtype.

    ``error`` is ‖out − ref‖ / ‖ref‖, the worst of its problems; ``limit`` the most its quality
    class allows; ``milliseconds`` the time of the timed problem. An objection means it failed.
    """

    implementation: str
    error: float | None
    limit: float
    milliseconds: float | None
    objection: Objection | None = None

    @property
    def passed(self) -> bool:
        return self.objection is None


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Memory ran out in a stage ("text", "picture", "denoise", "decode"), with so many blocks
    swapped and this tile; ``what`` is the error in one line."""

    stage: str
    block_swap: int
    tile: tuple[int, int] | None
    what: str


@dataclass(frozen=True)
class Evidence:
    """Everything learnt on one device in one head size and dtype, those of the plan's problem;
    immutable, so a plan can be made again from it. ``magnitudes`` are what a step cache goes by,
    measured for the plan's model and steps."""

    tests: Mapping[str, SelfTest] = field(default_factory=dict)
    failures: Mapping[str, Objection] = field(default_factory=dict)
    shortages: tuple[Shortage, ...] = ()
    magnitudes: Magnitudes | None = None

    def objection(self, implementation: str) -> Objection | None:
        """The reason not to use this implementation, if anything was learnt against it."""
        if implementation in self.failures:
            return self.failures[implementation]
        test = self.tests.get(implementation)
        return test.objection if test else None

    def with_test(self, test: SelfTest) -> "Evidence":
        return replace(self, tests={**self.tests, test.implementation: test})

    def with_shortage(self, shortage: Shortage) -> "Evidence":
        """Evidence that also holds that memory ran out, so that the next plan takes less."""
        return replace(self, shortages=(*self.shortages, shortage))

    def with_failure(self, implementation: str, objection: Objection) -> "Evidence":
        """Evidence that also holds a failure at run time, which outweighs a passed self-test."""
        return replace(self, failures={**self.failures, implementation: objection})
