"""Evaluates a checkpoint in closed loop.

python -m openvla_jax.evaluate rollout --checkpoint WORKDIR --episodes 100 --controls --out DIR
"""

import argparse
import time
from pathlib import Path

from openvla_jax.evaluation import figures
from openvla_jax.evaluation.rollouts import FIRST_SEED, evaluate


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m openvla_jax.evaluate", description="Evaluate a checkpoint.")
    commands = parser.add_subparsers(dest="command", required=True)
    rollout = commands.add_parser(
        "rollout", help="success in the embedded tabletop world, on scenes that no training saw"
    )
    rollout.add_argument("--checkpoint", type=Path, required=True, help="a training run's workdir, or one checkpoint")
    rollout.add_argument("--episodes", type=int, default=200, help="scenes, all run in parallel")
    rollout.add_argument(
        "--first-seed", type=int, default=FIRST_SEED, help="scenes have this seed and the following ones"
    )
    rollout.add_argument(
        "--controls", action="store_true", help="also with another object named, without image, at random"
    )
    rollout.add_argument("--out", type=Path, required=True, help="folder for report.md and figures")
    args = parser.parse_args(argv)
    try:
        run_rollout(args.checkpoint, args.episodes, args.first_seed, args.controls, args.out)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


def run_rollout(checkpoint: Path, episodes: int, first_seed: int, controls: bool, out: Path) -> None:
    """Evaluates, prints the table, and writes out/report.md with its figures (the training curves where
    `checkpoint` is a workdir with metrics)."""
    from openvla_jax.inference.policy import Policy
    from openvla_jax.training.metrics import METRICS_FILE, read_metrics

    policy = Policy.from_checkpoint(checkpoint)
    began = time.perf_counter()
    results = evaluate(policy, episodes, controls=controls, first_seed=first_seed)
    print(f"{episodes} scenes, {time.perf_counter() - began:.0f} s\n{figures.success_table(results)}")
    out.mkdir(parents=True, exist_ok=True)
    made = []
    if (checkpoint / METRICS_FILE).is_file():
        made.append(figures.training_curves(read_metrics(checkpoint), out / "training_curves.png"))
    made.append(figures.rollout_strip(results["policy"], out / "rollouts.png"))
    made.append(figures.rollout_animation(results["policy"], out / "rollouts.gif"))
    title = f"Tabletop: {checkpoint} on {episodes} unseen scenes"
    for path in (figures.write_report(results, out / "report.md", title, made), *made):
        print(path)


if __name__ == "__main__":
    main()
