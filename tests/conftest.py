"""What every test stands on: eight CPU devices, checked signatures, and the shared reference files."""

import atexit
import functools
import os
import shutil
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before the first import of jax, here and in every process that a test starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here are compiled more often than run: little optimisation takes a third less time in all, and the older way
# of making code for fusions, where there still is one, half of what remains.
COMPILE_FLAGS = {"--xla_backend_optimization_level": "0"}
if version("jaxlib").startswith("0.10."):
    COMPILE_FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
OPTIMISED = {"xla_backend_optimization_level": 2}  # compiler_options of programs that a test runs often


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process that sees so many devices."""
    flags = {"--xla_force_host_platform_device_count": devices} | COMPILE_FLAGS
    return " ".join(f"{name}={value}" for name, value in flags.items())


if os.environ["JAX_PLATFORMS"] == "cpu":  # a GPU's compiler keeps its own defaults
    # The last of equal flags counts: what is given overrides.
    os.environ["XLA_FLAGS"] = f"{xla_flags(8)} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("PJRT_NPROC", "64")  # as train.py: threads enough for devices that wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch beside workers: its waiting threads would take their cores
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # which is not installed: importing TensorFlow then imports no Keras
# Programs compiled once are shared by the workers, by processes of the tests, and by the next run. A size limit makes
# jax lock the folder; without it, one worker can read what another has written by half.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 1024**3))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import hypothesis
from goldens.unpack import unpack
from jaxtyping import install_import_hook

# Shapes and types of every annotated function of the package are checked while tests run.
install_import_hook("openvla_jax", "typecheck.check")

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("long"))
    whole_runs = ROOT / "tests" / "integration"
    items.sort(key=lambda item: (whole_runs not in item.path.parents, -slow[item.path]))


def on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process take one device: programs for eight take longer to compile."""
    import jax

    from openvla_jax.training import setup

    one = functools.partial(setup.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(setup, "make_mesh", one)


NEEDS = "needs reference files:"  # how a skip begins that the summary counts


def shared_dir() -> Path:
    """The folder of reference outputs and sample data: $OPENVLA_SHARED, or `shared` beside the repository."""
    return Path(os.environ.get("OPENVLA_SHARED") or ROOT.parent / "shared")


@functools.cache
def goldens_dir() -> Path:
    """`goldens` of the shared folder if there is one, else this repository's copy, unpacked for this process."""
    folder = shared_dir() / "goldens"
    return folder if folder.is_dir() else unpacked_goldens()


def unpacked_goldens() -> Path:
    """Returns a temporary folder with the goldens of tests/goldens."""
    folder = Path(tempfile.mkdtemp(prefix="goldens"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    unpack(folder)
    return folder


def golden(name: str) -> Path:
    """The path `name` in `goldens_dir()`; skips the running test, by name, if it is absent."""
    path = goldens_dir() / name
    if not path.exists():
        pytest.skip(f"{NEEDS} {shared_dir() / 'goldens' / name}")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """`shared_dir()`; skips if it is absent."""
    path = shared_dir()
    if not path.is_dir():
        pytest.skip(f"{NEEDS} {path}")
    return path


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    """The folder that `gs://` paths lie in during the test: gs://b/run is its b/run."""
    from etils.epath import backend, gpath

    root = tmp_path / "buckets"
    root.mkdir()

    def local(argument):
        text = os.fspath(argument) if isinstance(argument, os.PathLike) else argument
        return f"{root}/{text[5:]}" if isinstance(text, str) and text.startswith("gs://") else argument

    def mapped(method):
        return lambda self, *arguments, **options: method(self, *map(local, arguments), **options)

    class Bucket(backend._OsPathBackend):
        def walk(self, top, **_):
            for folder, *names in os.walk(local(top)):
                yield f"gs://{os.path.relpath(folder, root)}", *names

    changes = ("makedirs", "mkdir", "rmtree", "remove", "replace", "copy")
    for name in ("open", "exists", "isdir", "listdir", "stat", *changes):
        setattr(Bucket, name, mapped(getattr(backend._OsPathBackend, name)))
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    fake = Bucket()
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", fake)
    monkeypatch.setattr(gpath, "_GCS_BACKENDS", (fake,))
    return root


def pytest_terminal_summary(terminalreporter) -> None:
    """One line that cannot be overlooked if tests were skipped for want of reference files."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NEEDS in str(report.longrepr) for report in skipped)
    if count:
        message = (
            f"{count} PARITY TESTS WERE SKIPPED: {shared_dir()} is not there or incomplete; set OPENVLA_SHARED to the "
            "folder of reference files (tests/goldens/README.md)"
        )
        terminalreporter.write_line(message, red=True, bold=True)
