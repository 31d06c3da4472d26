"""What a machine without a network needs beside the checkout: files of the smoke test, and pure-Python wheels."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from measure import ROOT

PACK = ROOT / ".gpu"
FILES = ("goldens/openvla_tiny", "data/llama2_tokenizer")  # of the shared folder
WHEELS = ("ml_collections", "beartype")
LIMIT = 64 * 2**20


def make_pack() -> None:
    """Writes the folder .gpu anew. ValueError if the shared folder is missing, a wheel is not pure Python, or it is
    all too large.
    """
    shared = shared_folder(packed=False)
    for name in FILES:
        if not (shared / name).is_dir():
            raise ValueError(f"no {name}: {shared}; set OPENVLA_SHARED to the folder that holds goldens/ and data/")
    shutil.rmtree(PACK, ignore_errors=True)
    for name in FILES:
        shutil.copytree(
            shared / name, PACK / "shared" / name, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("lora")
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), "-d", str(PACK / "wheels"), *WHEELS], check=True)
    wheels = sorted((PACK / "wheels").iterdir())
    for wheel in wheels:
        if not wheel.name.endswith("-none-any.whl"):
            raise ValueError(f"{wheel.name} is built for one platform: {PACK}; pack pure Python only")
    size = sum(path.stat().st_size for path in PACK.rglob("*") if path.is_file())
    if size > LIMIT:
        raise ValueError(f"{size / 2**20:.1f} MiB are more than {LIMIT / 2**20:.0f}: {PACK}; pack less")
    print(f"{PACK}: {size / 2**20:.1f} MiB; {', '.join(FILES)}; {', '.join(wheel.name for wheel in wheels)}")


def shared_folder(packed: bool = True) -> Path:
    """The pack's if there is one (and `packed`), else $OPENVLA_SHARED, or `shared` beside the repository."""
    if packed and (PACK / "shared").is_dir():
        return PACK / "shared"
    return Path(os.environ.get("OPENVLA_SHARED") or ROOT.parent / "shared")


def missing_wheels(hidden: frozenset[str]) -> list[Path]:
    """The packed wheels of packages that this Python lacks, or that are hidden from it."""
    found = lambda name: name not in hidden and importlib.util.find_spec(name) is not None
    wheels = sorted((PACK / "wheels").glob("*.whl"))
    return [wheel for wheel in wheels if not found(wheel.name.split("-")[0])]
