"""Whether starts of a run, and its hosts, agree in what makes the run."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from openvla_jax.checkpoint.contract import CONFIG_FILE, CheckpointError, read_json
from openvla_jax.checkpoint.reading import open_checkpoint
from openvla_jax.settings import Settings

# Changing these between starts of one run would make another run of it.
FIXED = (
    "model", "tokenizer", "seed", "data.dataset", "data.text_length", "train.batch_size", "trainable", "lora",
    "quantize", "frozen_dtype", "observation", "action", "optimizer.ema",
)  # fmt: skip
LATER = ("trainable", "lora", "quantize", "frozen_dtype", "observation", "action")  # that old checkpoints do not know


def check_same_run(workdir: epath.Path, config: Settings) -> None:
    """Raises CheckpointError if the config differs from that of the run in `workdir` in what makes the run."""
    saved = read_json(open_checkpoint(workdir) / "contract" / CONFIG_FILE).get("training") or {}
    now = config.to_dict()
    differences = []
    for name in FIXED:
        before: Any = saved
        after: Any = now
        for part in name.split("."):
            before, after = (before or {}).get(part), after.get(part)
        if before != after and (before is not None or name not in LATER):
            differences.append(f"{name} was {before!r}, is {after!r}")
    if differences:
        raise CheckpointError(
            f"{workdir} holds checkpoints of another config: {'; '.join(differences)}; "
            "use another --workdir or that config"
        )


def run_fingerprint(config: Settings, workdir: epath.Path, start: int, iterator: Any) -> dict[str, Any]:
    """Returns what must be the same on all hosts, by name. If hosts differ, names and values are the message."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        sources.update(path.read_bytes())
    statistics = {
        f"statistics of {name}": hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()[:12]
        for name, one in iterator.statistics.items()
    }
    versions = {
        f"{name} version": importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")
    }
    stream = {key: value for key, value in getattr(iterator, "identity", {}).items() if key != "process_index"}
    settings = {f"config.{name}": str(value) for name, value in flat_items(config.to_dict())}
    return (
        settings
        | versions
        | statistics
        | {
            "code (sha256 of openvla_jax)": sources.hexdigest()[:12],
            "workdir": os.fspath(workdir),
            "step to resume from": start,
            "datasets": list(iterator.dataset_names),
            "stream": stream,
            "devices": [jax.device_count(), jax.devices()[0].device_kind],
        }
    )


def flat_items(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """("a.b", value) for every leaf of nested dicts."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += flat_items(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found
