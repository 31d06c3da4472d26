"""One process of a run for tests: `loop.run` on a stream of random batches that is the same whatever the processes.

    python pod_worker.py WORKDIR PROCESSES INDEX PORT [--die STEP] [--full STEP] [--kill MOMENT COUNT SECONDS]
        [--set key=value ...]

The stream stands in for `openvla_jax.data.batches`: each process gets its rows of one global batch, and the position is
a number, so that a curve can be compared between one, two and four processes. TensorFlow is not imported.
"""

import argparse
import json
import os
import resource
import signal
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax

from openvla_jax.config import VLAConfig, tiny
from openvla_jax.data import DataError
from openvla_jax.types import Batch

STATISTICS = {"toy": {"action": {"q01": [-1.0], "q99": [1.0], "mask": [True]}, "num_transitions": 3}}


saved: Path  # the first checkpoint, which must be whole before the disk is full
accidents: dict[str, int] = {}  # what is to happen to this process, before which batch


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.is_dir():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear within {seconds} s")
        time.sleep(0.05)


class Stream:
    dataset_names = ("toy", "other")
    statistics = STATISTICS
    num_examples, state_bytes, summary, simulators = 1000, 8, "data: random", {}

    def __init__(self, model: VLAConfig, batch_size: int, process_index: int, process_count: int):
        self._model, self._shard, self._rows = model, (process_index, process_count), batch_size
        self._position = 0
        self.identity = {"process_index": process_index, "seed": 0}

    def __next__(self) -> Batch:
        from training.batches import random_batch

        if self._position == accidents.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._position == accidents.get("full"):  # from now on no file grows, as on a full disk
            wait_for(saved)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        index, count = self._shard
        batch = random_batch(self._rows * count, seed=self._position, model=self._model)
        self._position += 1
        rows = slice(index * self._rows, (index + 1) * self._rows)
        return jax.tree.map(lambda x: x[rows], batch)

    def save(self, directory: str) -> None:
        if self._shard[0] == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            (Path(directory) / "position").write_text(str(self._position))

    def restore(self, directory: str) -> None:
        path = Path(directory) / "position"
        if not path.exists():
            raise DataError(f"{path} is missing")
        self._position = int(path.read_text())


def install() -> None:
    """Puts the stream where the loop looks for the data pipeline."""

    def make_train_iterator(data, tokenizer, *, batch_size, image_size, process_index, process_count, **_):
        model = tiny(base_vocab_size=tokenizer.vocab_size, image_size=image_size)
        return Stream(model, batch_size, process_index, process_count)

    def make_eval_batches(data, tokenizer, *, batch_size, image_size, num_batches, process_index, process_count, **_):
        model = tiny(base_vocab_size=tokenizer.vocab_size, image_size=image_size)
        stream = Stream(model, batch_size, process_index, process_count)
        stream._position = 10_000
        return [next(stream) for _ in range(num_batches)]

    module = types.ModuleType("openvla_jax.data.batches")
    module.make_train_iterator, module.make_eval_batches = make_train_iterator, make_eval_batches
    module.resident_memory_gb = lambda: 0.0
    sys.modules["openvla_jax.data.batches"] = module


def settings():
    """The debug config with 16 rows, 12 steps and a model of one tower and one layer, which compiles fast."""
    from configs import debug

    config = debug.get_config()
    size = {"width": 16, "heads": 2, "mlp_dim": 32}
    config.model = {
        "preset": "siglip-vit-so400m+llama2-7b-pure",
        "towers": {"siglip": {"image_size": 28, "depth": 2} | size},
        "llama": {"depth": 1, "kv_heads": 2} | size,
    }
    config.train.update(dict(steps=12, batch_size=16, checkpoint_every=4, eval_every=6, log_every=1))
    return config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("place", nargs=3)
    parser.add_argument("--die", type=int)
    parser.add_argument("--full", type=int)
    parser.add_argument("--kill", nargs=3)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    processes, index, port = options.place
    global saved
    saved = Path(options.workdir) / "checkpoints" / "4"
    accidents.update({"die": options.die, "full": options.full})
    install()
    if options.kill:
        from benchmarks.kills import arm

        arm(options.kill[0], int(options.kill[1]), float(options.kill[2]))
    from openvla_jax.train import train

    config = settings()
    for text in options.set:
        name, _, value = text.partition("=")
        config.update_from_flattened_dict({name: json.loads(value)})
    place = (f"localhost:{port}", int(processes), int(index)) if int(processes) > 1 else (None, None, None)
    train(config, options.workdir, place)


if __name__ == "__main__":
    main()
