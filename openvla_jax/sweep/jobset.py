"""Kubernetes JobSet manifests for TPU slices on GKE: one JobSet per point, one pod per host of a slice.

A preempted slice restarts the same command, which resumes from its latest checkpoint: `maxRestarts` counts those.
Fields: jobset.sigs.k8s.io (API jobset.x-k8s.io/v1alpha2); chips and hosts come from `parallel/tpu.py`.
"""

import argparse
import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openvla_jax.parallel.tpu import Slice, parse_slice
from openvla_jax.storage import atomic_write
from openvla_jax.sweep.points import Point, SweepError

_NAME_LIMIT = 40  # JobSet appends job and pod suffixes to it, within Kubernetes' 63 characters
_NO_RESTARTS_LEFT = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--launcher jobset (Kubernetes JobSets on GKE; --workdir is then a bucket)")
    group.add_argument("--topology", help="the slice of each point, v5p:4x4x4, or v5p:4x4x4*2 for two")
    group.add_argument("--image", help="container image with this repository as working directory")
    group.add_argument("--queue", help="Kueue's LocalQueue")
    group.add_argument("--namespace", default="default")
    group.add_argument("--max_restarts", type=int, default=_NO_RESTARTS_LEFT, help="preemptions and crashes survived")
    group.add_argument("--out", type=Path, default=Path("jobsets"), help="folder for the manifests")


def write(points: Sequence[Point], options: argparse.Namespace) -> list[Path]:
    """One YAML file per point in `options.out`; the paths. Files of other points there are left alone."""
    import yaml

    missing = [flag for flag in ("topology", "image") if not getattr(options, flag)]
    if missing:
        raise SweepError(f"--launcher jobset needs {' and '.join('--' + flag for flag in missing)}")
    if not re.match(r"[a-z]+://", options.workdir):
        raise SweepError(f"--workdir {options.workdir}: pods share no disk; name a bucket, gs://BUCKET/sweep")
    if options.max_restarts < 0:
        raise SweepError(f"--max_restarts {options.max_restarts} must be >= 0")
    try:
        tpu = parse_slice(options.topology)
    except ValueError as error:
        raise SweepError(f"--topology: {error}") from error
    options.out.mkdir(parents=True, exist_ok=True)
    paths = []
    for point in points:
        manifest = job_set(
            point, tpu, image=options.image, workdir=f"{options.workdir.rstrip('/')}/{point.name}",
            queue=options.queue, namespace=options.namespace, max_restarts=options.max_restarts,
        )  # fmt: skip
        path = options.out / f"{manifest['metadata']['name']}.yaml"
        atomic_write(path, yaml.safe_dump(manifest, sort_keys=False))
        paths.append(path)
    return paths


def job_set(
    point: Point, tpu: Slice, *, image: str, workdir: str, queue: str | None = None,
    namespace: str = "default", max_restarts: int = _NO_RESTARTS_LEFT,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of one point: a job for each slice, of one pod per host, restarted together when any pod fails."""
    tpus = {"google.com/tpu": tpu.chips_per_host}
    container = {
        "name": "run",
        "image": image,
        "command": ["bash", "-c", "exec " + shlex.join(["python", *point.arguments(workdir)])],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # TPU runtime; jax.distributed's coordinator
        "securityContext": {"privileged": True},  # what the TPU driver of v5e and earlier needs
        "resources": {"requests": tpus, "limits": tpus},
    }
    pod = {
        "restartPolicy": "Never",  # a host alone cannot go on: the JobSet restarts all of them
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": 300,  # SIGTERM: save, then end
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": tpu.facts.accelerator,
            "cloud.google.com/gke-tpu-topology": tpu.topology,
        },
        "containers": [container],
    }
    job = {"parallelism": tpu.hosts, "completions": tpu.hosts, "backoffLimit": 0, "template": {"spec": pod}}
    metadata: dict[str, Any] = {"name": _name(point.name), "namespace": namespace}
    if queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": queue}
    # One slice per job, never two jobs on the nodes of one slice.
    metadata["annotations"] = {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
        "openvla_jax/point": point.name,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": max_restarts},
            "replicatedJobs": [{"name": "slice", "replicas": tpu.slices, "template": {"spec": job}}],
        },
    }


def _name(text: str) -> str:
    """A Kubernetes name: lower case letters, digits and dashes, with a digest, since other characters fold."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[: _NAME_LIMIT - 7].strip("-")
    return f"{plain if plain[:1].isalpha() else 'point-' + plain}"[: _NAME_LIMIT - 7].strip("-") + f"-{digest}"
