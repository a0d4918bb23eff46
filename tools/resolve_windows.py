"""Resolve a wheel's dependencies as pip on Windows would, from any system, downloading nothing.

``pip install --platform win_amd64`` chooses Windows wheels, but reads environment markers such as
``platform_system == 'Windows'`` for the machine it runs on; so those are set here too.

    python tools/resolve_windows.py dist/sagewan-*.whl 3.11 [pip options]
"""

import sys
import tempfile

from pip._internal.cli.main import main as pip
from pip._vendor.packaging import markers

wheel, version, *options = sys.argv[1:]
this_machine = markers.default_environment()
markers.default_environment = lambda: {
    **this_machine,
    "os_name": "nt",
    "platform_machine": "AMD64",
    "platform_system": "Windows",
    "sys_platform": "win32",
    "python_version": version,
    "python_full_version": f"{version}.0",
}
with tempfile.TemporaryDirectory() as target:
    how = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--target", target]
    platform = ["--platform", "win_amd64", "--python-version", version, "--implementation", "cp"]
    sys.exit(pip(["install", *how, *platform, *options, wheel]))
