"""The OpenVLA-OFT goldens as checkpoints of this project: one import per case, shared by the tests of a process."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from conftest import goldens_dir, shared_dir

from openvla_jax.convert.exporter import export_weights
from openvla_jax.convert.importer import import_weights
from openvla_jax.convert.oft import PLATFORMS, OftOptions

FOLDER = goldens_dir() / "oft_tiny"


def names(**options: Any) -> list[str]:
    """Cases that act, with these settings; their sizes, seeds and options are read from their files."""
    found = sorted(p.parent.name for p in FOLDER.glob("*/settings.json") if (p.parent / "expected.npz").exists())
    chosen = [name for name in found if all(settings(name).get(key) == value for key, value in options.items())]
    return [name for name in chosen if (np.load(FOLDER / name / "expected.npz").files[0])[0] != "l"]


def settings(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / "settings.json").read_text())


def reference_folder(name: str, folder: Path) -> Path:
    """The checkpoint directory of a case, as the reference writes it: the base's files and the case's."""
    folder.mkdir(parents=True)
    whole = (FOLDER / name / "model.safetensors").exists()
    for source in (*(() if whole else (base_folder(name),)), FOLDER / name):
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".npz":
                (folder / file.name).unlink(missing_ok=True)
                (folder / file.name).symlink_to(file)
    if settings(name)["use_film"] and not (folder / "vision_backbone--1_checkpoint.pt").exists():
        (folder / "vision_backbone--1_checkpoint.pt").symlink_to(FOLDER / "film" / "vision_backbone--1_checkpoint.pt")
    return folder


def base_folder(name: str) -> Path:
    """The files of the model that a case's components belong to, rounded to bfloat16 if the case is."""
    if settings(name)["float32"]:
        return FOLDER / "base"
    rounded = scratch() / f"{name}-bfloat16"
    if not rounded.exists():
        export_weights(imported_base(name), rounded, dtype="bfloat16")
    return rounded


@functools.cache
def scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="oft"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def import_case(name: str, source: Path, target: Path, **options: Any) -> Path:
    """Imports a folder with the heads of the case's towers, which no file states."""
    heads = {part: {"heads": sizes["heads"]} for part, sizes in settings(name)["towers"].items()}
    import_weights(
        source,
        target,
        tokenizer=shared_dir() / "data" / "llama2_tokenizer",
        model_config={"llama": heads.pop("llama"), "towers": heads},
        **options,
    )
    return target


@functools.cache
def imported(name: str) -> Path:
    """The case imported as a policy."""
    options, folder = settings(name), scratch() / name
    return import_case(
        name,
        reference_folder(name, folder / "reference"),
        folder / "imported",
        oft=OftOptions(options["platform"], PLATFORMS[options["platform"]].cameras[: options["num_images_in_input"]]),
    )


@functools.cache
def imported_base(name: str) -> Path:
    """The checkpoint that a case's training starts from."""
    return import_case(name, FOLDER / "base", scratch() / f"{name}-base")
