import argparse
import shlex

import pytest
import yaml

from openvla_jax.sweep import jobset
from openvla_jax.sweep.points import Point, SweepError

POINT = Point("learning_rate=1e-05,seed=1", "configs/openvla_7b.py", {"seed": 1, "optimizer.learning_rate": 1e-5}, 9)


def options(tmp_path, **changes):
    return argparse.Namespace(**{
        "topology": "v5p:4x4x4*2", "image": "pkg.dev/p/openvla:1", "queue": "robots", "namespace": "default",
        "max_restarts": 7, "out": tmp_path / "out", "workdir": "gs://bucket/sweep/",
    } | changes)  # fmt: skip


def test_a_manifest_runs_the_point_on_every_host_of_every_slice(tmp_path):
    (path,) = jobset.write([POINT], options(tmp_path))
    manifest = yaml.safe_load(path.read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "robots"}
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 7}
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16 and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert container["command"][:2] == ["bash", "-c"]
    assert shlex.split(container["command"][2]) == [
        "exec", "python", *POINT.arguments("gs://bucket/sweep/learning_rate=1e-05,seed=1")
    ]  # fmt: skip


def test_names_are_kubernetes_names_and_distinct(tmp_path):
    texts = ["a=1e-05", "a=1e.05", "a=1e_05", "A=1e-05", "7" * 200, "x" * 200, "x" * 201, "é"]
    names = [jobset._name(text) for text in texts]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) <= 40 and name[0].isalpha() and name[-1].isalnum()
        assert all(c.isdigit() or c.islower() or c == "-" for c in name) and name.isascii()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": None, "image": None}, "needs --topology and --image"),
        ({"workdir": "runs/sweep"}, "name a bucket"),
        ({"max_restarts": -1}, "must be >= 0"),
        ({"topology": "v5:4x4"}, "unknown TPU 'v5'"),
    ],
)
def test_what_is_missing_is_told(tmp_path, changes, message):
    with pytest.raises(SweepError, match=message):
        jobset.write([POINT], options(tmp_path, **changes))
    assert not (tmp_path / "out").exists()
