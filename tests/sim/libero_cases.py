"""What tests of LIBERO share: a fake simulator in the place of the real one."""

import sys
from pathlib import Path

FAKE = Path(__file__).with_name("fake_libero.py")


def fake_python(folder: Path) -> Path:
    """Returns a program to name as the simulator's Python: whatever it is given, it runs the fake simulator."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}"\n')
    path.chmod(0o755)
    return path
