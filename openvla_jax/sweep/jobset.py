"""Kubernetes JobSet manifests for TPU slices on GKE: one JobSet per point, one pod per host of a slice.

A preempted slice restarts the same command, which resumes from its latest checkpoint: `maxRestarts` counts those.
Facts: accelerator labels and chips per VM, cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus; fields,
jobset.sigs.k8s.io (API jobset.x-k8s.io/v1alpha2).
"""

import argparse
import hashlib
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openvla_jax.config import nearest
from openvla_jax.sweep.points import Point, SweepError

_NAME_LIMIT = 40  # JobSet appends job and pod suffixes to it, within Kubernetes' 63 characters
_NO_RESTARTS_LEFT = 20


class Generation(NamedTuple):
    """A TPU generation on GKE."""

    accelerator: str  # the node label
    chips_per_host: int  # of a slice with several hosts
    dimensions: int  # of a topology
    single_host: tuple[int, ...]  # chips that one VM may hold as a whole slice


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", 4, 3, (4,)),
    "v5e": Generation("tpu-v5-lite-podslice", 4, 2, (1, 4, 8)),
    "v5p": Generation("tpu-v5p-slice", 4, 3, (4,)),
    "v6e": Generation("tpu-v6e-slice", 4, 2, (1, 4, 8)),
}


class Slice(NamedTuple):
    """One TPU slice as GKE sees it."""

    generation: str
    topology: str  # 4x4x4
    chips: int
    hosts: int

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts


def parse_topology(text: str) -> Slice:
    """`v5p:4x4x4` -> the slice; SweepError with the mend for anything else."""
    name, _, topology = text.partition(":")
    if name not in GENERATIONS:
        raise SweepError(f"unknown TPU {name!r} in {text!r}; {nearest(name, GENERATIONS)}")
    generation = GENERATIONS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{generation.dimensions - 1}}}", topology):
        example = "x".join(["4"] * generation.dimensions)
        raise SweepError(f"topology {topology!r} of {name}: give {generation.dimensions} sizes, as {name}:{example}")
    chips = math.prod(map(int, topology.split("x")))
    if chips in generation.single_host:
        return Slice(name, topology, chips, 1)
    if chips % generation.chips_per_host:
        raise SweepError(f"{text} has {chips} chips, which hosts of {generation.chips_per_host} do not make up")
    return Slice(name, topology, chips, chips // generation.chips_per_host)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--launcher jobset (Kubernetes JobSets on GKE; --workdir is then a bucket)")
    group.add_argument("--topology", help="the slice of each point: v5p:4x4x4")
    group.add_argument("--slices", type=int, default=1, help="slices per point (multislice)")
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
    if options.slices < 1 or options.max_restarts < 0:
        raise SweepError(f"--slices {options.slices} and --max_restarts {options.max_restarts} must be >= 1 and >= 0")
    tpu = parse_topology(options.topology)
    options.out.mkdir(parents=True, exist_ok=True)
    paths = []
    for point in points:
        manifest = job_set(
            point, tpu, image=options.image, workdir=f"{options.workdir.rstrip('/')}/{point.name}",
            slices=options.slices, queue=options.queue, namespace=options.namespace, max_restarts=options.max_restarts,
        )  # fmt: skip
        path = options.out / f"{manifest['metadata']['name']}.yaml"
        new = path.with_suffix(".new")
        new.write_text(yaml.safe_dump(manifest, sort_keys=False))
        new.replace(path)
        paths.append(path)
    return paths


def job_set(
    point: Point, tpu: Slice, *, image: str, workdir: str, slices: int = 1, queue: str | None = None,
    namespace: str = "default", max_restarts: int = _NO_RESTARTS_LEFT,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of one point: `slices` jobs of one pod per host, restarted together when any pod fails."""
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
            "cloud.google.com/gke-tpu-accelerator": GENERATIONS[tpu.generation].accelerator,
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
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }


def _name(text: str) -> str:
    """A Kubernetes name: lower case letters, digits and dashes, with a digest, since other characters fold."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[: _NAME_LIMIT - 7].strip("-")
    return f"{plain if plain[:1].isalpha() else 'point-' + plain}"[: _NAME_LIMIT - 7].strip("-") + f"-{digest}"
