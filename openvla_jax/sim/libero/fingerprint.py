"""A simulator's fingerprint: whether it draws and computes what the benchmark's numbers were made with.

`fingerprints/` holds, per suite, the frames of both cameras and the joint positions of 20 fixed actions from state 0
of task 0, with the versions that made them. MuJoCo 3.3.3 draws 80% of LIBERO-Object's pixels otherwise than 3.3.2 does;
a policy trained before then fails for no fault of its own.

Frames and trace are compared; the digest is stored with results and never judged, because one pixel changes it.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openvla_jax.errors import InputError, reading
from openvla_jax.sim.libero.conventions import CAMERAS, base_suite
from openvla_jax.sim.libero.process import Simulator
from openvla_jax.storage import atomic_write

FOLDER = Path(__file__).with_name("fingerprints")
LEVELS = 8  # grey levels by which a pixel may differ
SHARE = 0.01  # of the pixels that may differ by more
TRACE = 1e-4  # radians and metres
TRACE_DIGITS = 9  # as stored
INSTALL = "make libero-env installs the versions that agree"


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a simulator draws and computes for one suite.

    frames: uint8 [256, 256, 3] by camera. trace: float64 [20, D]. versions: by package, and the renderer.
    """

    suite: str
    frames: Mapping[str, np.ndarray]
    trace: np.ndarray
    versions: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of all pixels and numbers."""
        parts = [self.frames[camera].tobytes() for camera in CAMERAS]
        return hashlib.sha256(b"".join([*parts, self.trace.round(TRACE_DIGITS).tobytes()])).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a fingerprint is from the stored one: shares of pixels by camera, and the largest of the trace."""

    pixels: Mapping[str, float]
    trace: float

    @property
    def agrees(self) -> bool:
        """Whether both are the same benchmark."""
        return max(self.pixels.values()) <= SHARE and self.trace <= TRACE

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.1%} of {camera}'s pixels" for camera, share in self.pixels.items())
        return f"{shares} differ by more than {LEVELS} levels, joints by up to {self.trace:.1e}"


def measure(simulator: Simulator, suite: str) -> Fingerprint:
    """Returns the fingerprint of a simulator for the suite that `suite` is or perturbs. Task 0 stays loaded."""
    name = base_suite(suite)
    simulator.ask("load", suite=name, task=0, hard_reset=True)
    found = simulator.ask("fingerprint")
    return Fingerprint(name, {camera: found[camera] for camera in CAMERAS}, found["trace"], found["versions"])


def compare(found: Fingerprint, stored: Fingerprint) -> Difference:
    """Returns how far two fingerprints of one suite are apart."""
    pixels = {camera: _share(found.frames[camera], stored.frames[camera]) for camera in CAMERAS}
    same = found.trace.shape == stored.trace.shape and np.isfinite(found.trace).all()
    return Difference(pixels, float(np.abs(found.trace - stored.trace).max()) if same else float("inf"))


def check(found: Fingerprint, allow_other: bool = False) -> dict[str, Any]:
    """Compares a fingerprint with the stored one; returns what results record of it.

    Raises InputError, with the versions and the fix, if they differ and `allow_other` is False.
    """
    stored = load(found.suite)
    difference = compare(found, stored)
    if not difference.agrees and not allow_other:
        raise InputError(
            f"this simulator is not the benchmark's: {found.suite}: {difference}; it has {_listed(found.versions)}, "
            f"the benchmark {_listed(stored.versions)}: {INSTALL}, --allow_other_simulator goes on and records it"
        )
    return {
        "suite": found.suite,
        "agrees": difference.agrees,
        "pixels": dict(difference.pixels),
        "trace": difference.trace,
        "digest": found.digest,
        "versions": dict(found.versions),
    }


def check_training(simulators: Mapping[str, Mapping[str, Any]], record: Mapping[str, Any], allow_other: bool) -> None:
    """Checks that a policy trained on simulated data meets the simulator that drew them.

    Args:
        simulators: What `check` returned when each of its datasets was written, by dataset.
        record: What `check` returned now.
        allow_other: Whether another simulator is accepted.

    Raises:
        InputError: names the dataset and the versions.
    """
    for dataset, trained in simulators.items():
        same = (trained["agrees"] and record["agrees"]) or trained["digest"] == record["digest"]
        if not same and not allow_other:
            raise InputError(
                f"the policy was trained on {dataset!r}, drawn by {_listed(trained['versions'])}, this simulator has "
                f"{_listed(record['versions'])}: write the data again, or go on with --allow_other_simulator"
            )


def load(suite: str, folder: Path = FOLDER) -> Fingerprint:
    """Returns the stored fingerprint of a suite. Raises InputError if there is none, or it is damaged."""
    path = folder / f"{suite}.json"
    with reading(path, "restore it from the repository"):
        content = json.loads(path.read_text())
        frames = {camera: np.asarray(Image.open(folder / f"{suite}_{camera}.png")) for camera in CAMERAS}
        return Fingerprint(suite, frames, np.array(content["trace"], np.float64), content["versions"])


def store(found: Fingerprint, folder: Path = FOLDER) -> None:
    """Writes what `load` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for camera, frame in found.frames.items():
        data = io.BytesIO()
        Image.fromarray(frame).save(data, "PNG", optimize=True)
        atomic_write(folder / f"{found.suite}_{camera}.png", data.getvalue())
    rows = ",\n".join(json.dumps([round(float(value), TRACE_DIGITS) for value in row]) for row in found.trace)
    text = f'{{"versions": {json.dumps(dict(found.versions))},\n"trace": [\n{rows}]}}\n'
    atomic_write(folder / f"{found.suite}.json", text)


def _share(found: np.ndarray, stored: np.ndarray) -> float:
    if found.shape != stored.shape:
        return 1.0
    return float((np.abs(found.astype(int) - stored).max(-1) > LEVELS).mean())


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in versions if name != "python")
