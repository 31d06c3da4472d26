"""Where metrics go: what Weights & Biases is told, and that a resumed run goes on in its page."""

import json
import sys
from types import SimpleNamespace

import jax

from openvla_jax.settings import WandbSettings
from openvla_jax.training.metrics import MetricLog, device_memory, read_metrics


def test_wandb_gets_the_group_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    calls, logged = [], []

    def init(**settings):
        calls.append(settings)
        return SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    settings = WandbSettings(project="P", group="lr")
    for workdir, step in ((tmp_path / "a", 0), (tmp_path / "a", 1), (tmp_path / "b", 0)):
        workdir.mkdir(exist_ok=True)
        log = MetricLog(workdir, step, settings, {"seed": 3})
        log.write(step + 1, {"train/loss": 0.5, "train/x/loss": float("nan")})
        log.close()
    assert [call["id"] for call in calls[:2]] == [(tmp_path / "a" / "wandb_id").read_text()] * 2
    assert calls[2]["id"] != calls[0]["id"]
    for call, name in zip(calls, "aab", strict=True):
        assert (call["project"], call["group"], call["name"], call["resume"]) == ("P", "lr", name, "allow")
        assert call["config"] == {"seed": 3} and call["entity"] is None
    assert logged == [(1, {"train/loss": 0.5}), "end", (2, {"train/loss": 0.5}), "end", (1, {"train/loss": 0.5}), "end"]
    assert [row["step"] for row in read_metrics(tmp_path / "a")] == [1, 2]
    MetricLog(tmp_path / "b", 0, WandbSettings(), {}).close()
    assert len(calls) == 3
    assert json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])["train/loss"] == 0.5


def test_the_fullest_device_counts(monkeypatch):
    devices = [
        SimpleNamespace(memory_stats=lambda size=size: size and {"peak_bytes_in_use": size}) for size in (3, 7, 0)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert device_memory() == {"device_peak_gb": 7e-9}
    monkeypatch.setattr(jax, "local_devices", lambda: devices[2:])  # a CPU's say nothing
    assert device_memory() == {}
