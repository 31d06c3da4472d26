"""Wheels for a machine without a network: pure-Python packages that the tests need and that it may lack."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from measure import ROOT

PACK = ROOT / ".gpu"
WHEELS = ("ml_collections", "beartype")


def make_pack() -> None:
    """Replaces the folder .gpu. Raises ValueError if a wheel is not pure Python."""
    shutil.rmtree(PACK, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "-d", str(PACK), *WHEELS], check=True)
    for wheel in sorted(PACK.iterdir()):
        if not wheel.name.endswith("-none-any.whl"):
            raise ValueError(f"{wheel.name} is built for one platform: {PACK}; pack pure Python only")
        print(wheel)


def missing_wheels(hidden: frozenset[str]) -> list[Path]:
    """Returns the packed wheels of packages that this Python lacks, or that are hidden from it."""
    found = lambda name: name not in hidden and importlib.util.find_spec(name) is not None
    return [wheel for wheel in sorted(PACK.glob("*.whl")) if not found(wheel.name.split("-")[0])]
