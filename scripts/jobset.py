"""Writes the Kubernetes JobSet of one run on TPU slices of GKE, to standard output.

    python scripts/jobset.py v5p:4x4x4 IMAGE gs://BUCKET/run configs/openvla_7b.py:v5p-128 \
        data.data_dir=gs://BUCKET/oxe init_from=gs://BUCKET/vlm > run.yaml

`v5p:4x4x4*2` is two slices. The image has this repository as working directory (scripts/Dockerfile).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from openvla_jax.parallel.tpu import parse_slice
from openvla_jax.sweep.jobset import job_set
from openvla_jax.sweep.points import Point


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology")
    parser.add_argument("image")
    parser.add_argument("workdir")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--queue", help="Kueue's LocalQueue")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--max_restarts", type=int, default=100)
    options = parser.parse_args()
    try:
        tpu = parse_slice(options.topology)
        if "://" not in options.workdir:
            raise ValueError(f"workdir {options.workdir}: pods share no disk; name a bucket, gs://BUCKET/run")
        bad = [text for text in options.overrides if "=" not in text]
        if bad:
            raise ValueError(f"override {bad[0]!r}: give KEY=VALUE, as data.data_dir=gs://BUCKET/oxe")
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    overrides = dict(text.split("=", 1) for text in options.overrides)
    name = options.workdir.rstrip("/").rsplit("/", 1)[1]
    manifest = job_set(
        Point(name, options.config, overrides, 0), tpu, image=options.image, workdir=options.workdir,
        queue=options.queue, namespace=options.namespace, max_restarts=options.max_restarts,
    )  # fmt: skip
    print(yaml.safe_dump(manifest, sort_keys=False), end="")


if __name__ == "__main__":
    main()
