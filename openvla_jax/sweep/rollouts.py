"""Closed-loop success of a sweep's finished points in the embedded tabletop world, kept beside their metrics."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

from openvla_jax.storage import atomic_write
from openvla_jax.sweep.points import SweepError
from openvla_jax.sweep.runner import SWEEP_FILE, saved_step

ROLLOUTS_FILE = "rollouts.json"
SUCCESS = "rollout/success"
BOUNDS = ("rollout/success_low", "rollout/success_high")  # of its Wilson 95% interval


def measured(directory: Path) -> list[dict[str, float]]:
    """What `measure` found in a point's directory, as a line of its metrics; nothing if it has not been there."""
    file = directory / ROLLOUTS_FILE
    return [json.loads(file.read_text())["metrics"]] if file.exists() else []


def measure(workdir: Path, episodes: int, world: str = "tabletop", log: Callable[[str], None] = print) -> None:
    """Runs the latest checkpoint of every point on the same unseen scenes of `world`; skips what is known."""
    if episodes < 1:
        raise SweepError(f"--rollouts {episodes}: run 1 scene at least")
    file = workdir / SWEEP_FILE
    if not file.exists():
        raise SweepError(f"{workdir} holds no sweep ({SWEEP_FILE} is missing)")
    for name in json.loads(file.read_text())["points"]:
        step, kept = saved_step(workdir / name), workdir / name / ROLLOUTS_FILE
        settings = {"step": step, "episodes": episodes, "world": world}
        if not step or (kept.exists() and json.loads(kept.read_text())["settings"] == settings):
            continue
        rate, bounds = _success(workdir / name, episodes, world)
        row = {"step": step, SUCCESS: rate} | dict(zip(BOUNDS, bounds, strict=True))
        atomic_write(kept, json.dumps({"settings": settings, "metrics": row}) + "\n")
        log(f"{name}: {rate:.1%} of {episodes} scenes at step {step}")


def _success(checkpoint: Path, episodes: int, world: str) -> tuple[float, tuple[float, float]]:
    import jax

    from openvla_jax.evaluation.rollouts import evaluate
    from openvla_jax.inference.policy import Policy

    policy = Policy.from_checkpoint(checkpoint, check_images=False)  # one that learnt nothing is a result too
    rollouts = evaluate(policy, episodes, record=0, world=world)["policy"]
    del policy
    gc.collect()
    jax.clear_caches()  # compiled programs hold on to weights
    return rollouts.rate, rollouts.interval
