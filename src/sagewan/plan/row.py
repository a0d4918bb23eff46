"""What every row of a table of implementations says: what it calls, and what it needs for that."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from packaging.version import Version

from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.objection import Objection

# Distributions that are called otherwise on Windows.
_ON_WINDOWS = {"triton": "triton-windows"}
SIXTEEN_BIT = ("bfloat16", "float16")
ANY_FLOAT = (*SIXTEEN_BIT, "float32")
AMPERE_UP = (80, 86, 87, 89, 90, 100, 103, 120, 121)
ADA_UP = (89, 90, 100, 103, 120, 121)
BLACKWELL = (100, 103, 120, 121)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One function of ours, of torch, or of a package.

    ``call`` is ``"module:function"``; ``sms`` the compute capabilities it runs on (empty: any, CPU
    included), ``dtypes`` those of its 16-bit inputs, ``package`` the distribution it needs and
    ``versions`` the half-open range of versions, which begins later on the compute capabilities in
    ``sm_versions``. ``quiet`` are UserWarnings of the package that
    mean nothing, as patterns of how they begin. ``emulated`` marks the formats of hardware computed
    in others; ``trusted`` rows need no self-test: torch's own, and emulations.
    """

    name: str
    call: str
    sms: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = SIXTEEN_BIT
    package: str | None = None
    versions: tuple[str, str] | None = None
    sm_versions: tuple[tuple[int, str], ...] = ()
    install: str = ""
    systems: tuple[str, ...] = ("Linux", "Windows", "Darwin")
    quiet: tuple[str, ...] = ()
    emulated: bool = False
    trusted: bool = False

    def needs(self, dtype: str, device: Device, hardware: Hardware) -> Iterator[Objection]:
        """What of these the machine has not, the most lasting first."""
        if self.sms and not device.is_cuda:
            yield Objection("needs-cuda", {"device": device.name})
        elif self.sms and device.sm not in self.sms:
            yield Objection(
                "compute-capability",
                {
                    "needed": _capabilities(self.sms),
                    "device": device.name,
                    "found": f"{device.sm // 10}.{device.sm % 10}",
                },
            )
        if hardware.system not in self.systems:
            yield Objection(
                "platform", {"needed": ", ".join(self.systems), "found": hardware.system}
            )
        if dtype not in self.dtypes:
            yield Objection("dtype", {"needed": " or ".join(self.dtypes), "found": dtype})
        if self.package:
            windows = hardware.system == "Windows"
            package = _ON_WINDOWS.get(self.package, self.package) if windows else self.package
            yield from self._package_objections(package, hardware.packages.get(package), device)

    def _package_objections(
        self, package: str, found: str | None, device: Device
    ) -> Iterator[Objection]:
        if found is None:
            yield Objection("package-missing", {"package": package, "install": self.install})
        elif self.versions and not _within(found, versions := self._versions_on(device)):
            needed = f"{versions[0]} or newer, below {versions[1]}"
            yield Objection(
                "package-version", {"package": package, "needed": needed, "found": found}
            )

    def _versions_on(self, device: Device) -> tuple[str, str]:
        first, last = self.versions or ("0", "0")
        return dict(self.sm_versions).get(device.sm, first), last


def listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


def _within(found: str, versions: tuple[str, str]) -> bool:
    return Version(versions[0]) <= Version(found) < Version(versions[1])


def _capabilities(sms: tuple[int, ...]) -> str:
    lowest = f"{min(sms) // 10}.{min(sms) % 10}"
    if min(sms) >= 100:
        return f"{lowest} or newer (Blackwell)"
    return f"{lowest} or newer" if max(sms) >= 100 else listed(f"{sm / 10:.1f}" for sm in sms)
