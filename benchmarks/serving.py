"""Throughput and correctness of the server under load: many clients at once, with and without batching.

  python benchmarks/serving.py --seconds 60 --clients 32

Serves a model of random weights (or --checkpoint) in a process of its own, once with batches of 1 and once with
batches, and lets clients, threads of this process, ask without pause; each answer is compared with the local policy's.
Also prints the time from the start of the process to the first action, with a cold and with a warm compilation cache.
Fails if a request fails or an answer differs.

What batching gains depends on the device: an accelerator reads its weights once for a whole batch, two CPU cores that
a single request keeps busy, and that the clients share, gain little.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

from openvla_jax.config import model_config  # noqa: E402
from openvla_jax.inference.client import Client, ServerError  # noqa: E402
from openvla_jax.inference.load import save_model  # noqa: E402
from openvla_jax.inference.policy import Policy  # noqa: E402
from openvla_jax.models.openvla import OpenVLA  # noqa: E402
from openvla_jax.tokens import load_tokenizer  # noqa: E402
from openvla_jax.training.checkpoint import PREPROCESSING, Contract  # noqa: E402

INSTRUCTIONS = ("pick up the red cube", "push the blue ball to the left", "put the green block into the bowl")


def make_checkpoint(directory: Path) -> None:
    tokenizer = load_tokenizer("tiny")
    config = model_config({"preset": "tiny", "base_vocab_size": tokenizer.vocab_size})
    model = OpenVLA(config, jax.random.key(1))
    for linear in (model.llama.head, model.llama.blocks.attention.v, model.llama.blocks.attention.o):
        linear.kernel[...] = linear.kernel[...] * 4  # spread out, so that inputs choose different tokens
    statistics = {"arm": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}
    save_model(model, Contract(config, tokenizer, statistics, PREPROCESSING | {"text_length": 40}), directory)


@contextlib.contextmanager
def serving(checkpoint: Path, cache: Path, max_batch: int) -> Iterator[tuple[str, float]]:
    """(url, seconds until it was ready) of a server process, which is asked to stop at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "openvla_jax.serve", "--checkpoint", str(checkpoint), "--port", str(port)]
    command += ["--max_batch", str(max_batch), "--compilation_cache", str(cache)]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            client = Client(f"http://127.0.0.1:{port}")
            client.wait_until_ready()
            yield client.url, time.perf_counter() - began
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        finally:
            process.kill()


def load(url: str, cases: list[tuple], clients: int, seconds: float) -> tuple[np.ndarray, int, int]:
    """(latencies, failed requests, wrong answers) of `clients` asking without pause."""
    stop = time.perf_counter() + seconds
    latencies: list[float] = []
    failed, wrong = [0] * clients, [0] * clients

    def ask(number: int) -> None:
        client, rng = Client(url), np.random.default_rng(number)
        while time.perf_counter() < stop:
            image, instruction, expected = cases[rng.integers(len(cases))]
            began = time.perf_counter()
            try:
                action = client.predict_action(image, instruction)
            except ServerError as error:
                failed[number] += 1
                print(f"failed: {error}")
                continue
            latencies.append(time.perf_counter() - began)
            wrong[number] += not np.array_equal(action, expected)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return np.asarray(latencies), sum(failed), sum(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="default: the tiny model with random weights")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--max_batch", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or Path(folder) / "checkpoint"
        if args.checkpoint is None:
            make_checkpoint(checkpoint)
        policy, rng = Policy.from_checkpoint(checkpoint), np.random.default_rng(0)
        size, cases = policy.contract.model.image_size, []
        for i in range(64):
            image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            instruction = INSTRUCTIONS[i % len(INSTRUCTIONS)]
            cases.append((image, instruction, policy.predict_action(image, instruction)))
        cache, rates, bad = Path(folder) / "cache", {}, 0
        print("| batches of up to | clients | actions/s | latency ms p50 / p95 | failed | wrong | ready after s |")
        print("| --- " * 7 + "|")
        for max_batch in (1, args.max_batch):
            with serving(checkpoint, cache, max_batch) as (url, ready):
                latencies, failed, wrong = load(url, cases, args.clients, args.seconds)
            rates[max_batch] = len(latencies) / args.seconds
            p50, p95 = 1e3 * np.quantile(latencies, [0.5, 0.95])
            bad += failed + wrong
            print(
                f"| {max_batch} | {args.clients} | {rates[max_batch]:.0f} | {p50:.1f} / {p95:.1f} | {failed} | {wrong} "
                f"| {ready:.1f} |",
                flush=True,
            )
        began = time.perf_counter()
        with serving(checkpoint, cache, args.max_batch) as (url, ready):
            Client(url).predict_action(*cases[0][:2])
            print(f"start to first action from a warm compilation cache: {time.perf_counter() - began:.1f} s")
    print(f"batching: {rates[args.max_batch] / rates[1]:.1f}x the throughput")
    if bad:
        sys.exit(f"failed: {bad} requests failed or were answered wrong")


if __name__ == "__main__":
    main()
