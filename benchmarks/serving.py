"""Throughput and correctness of the server under load: many clients at once, with and without batching.

  python benchmarks/serving.py --seconds 60 --clients 32

Serves a model of random weights (or --checkpoint) in two processes, one with batches of 1 and one with batches; lets
clients ask them in turns without pause, and compares each answer with the local policy's. Also prints what the policy
alone gains from batches, and the time from the start of the process to the first action with a warm compilation cache.
Fails if a request fails or an answer differs.

The clients share the machine with the server. They are threads of this process that send requests which were encoded
before, each over its own connection, and take as little time as they can.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

from openvla_jax.checkpoint.contract import Contract  # noqa: E402
from openvla_jax.checkpoint.load import save_model  # noqa: E402
from openvla_jax.config import model_config  # noqa: E402
from openvla_jax.inference.client import Client  # noqa: E402
from openvla_jax.inference.policy import Policy  # noqa: E402
from openvla_jax.inference.wire import decode_array, dumps  # noqa: E402
from openvla_jax.models.openvla import OpenVLA  # noqa: E402
from openvla_jax.tokens.tokenizer import load_tokenizer  # noqa: E402
from openvla_jax.types import Preprocessing  # noqa: E402

TURNS = 5
INSTRUCTIONS = ("pick up the red cube", "push the blue ball to the left", "put the green block into the bowl")


def make_checkpoint(directory: Path) -> None:
    tokenizer = load_tokenizer("tiny")
    config = model_config({"preset": "tiny", "base_vocab_size": tokenizer.vocab_size})
    model = OpenVLA(config, jax.random.key(1))
    for linear in (model.llama.head, model.llama.blocks.attention.v, model.llama.blocks.attention.o):
        linear.kernel[...] = linear.kernel[...] * 4  # spread out, so that inputs choose different tokens
    statistics = {"arm": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}
    save_model(model, Contract(config, tokenizer, statistics, preprocessing=Preprocessing(text_length=40)), directory)


class Serving(NamedTuple):
    url: str
    process: psutil.Process

    @property
    def cpu_seconds(self) -> float:
        return sum(self.process.cpu_times()[:2])


@contextlib.contextmanager
def serving(checkpoint: Path, cache: Path, max_batch: int) -> Iterator[Serving]:
    """A server process, which is asked to stop at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "openvla_jax.serve", "--checkpoint", str(checkpoint), "--port", str(port)]
    command += ["--max_batch", str(max_batch), "--compilation_cache", str(cache)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            client = Client(f"http://127.0.0.1:{port}")
            client.wait_until_ready()
            yield Serving(client.url, psutil.Process(process.pid))
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        finally:
            process.kill()


def encoded(image: np.ndarray, instruction: str) -> bytes:
    """A whole HTTP request."""
    body = dumps({"image": image, "instruction": instruction}).encode()
    return b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def answer(connection: socket.socket) -> tuple[bytes, bytes]:
    """(status line, body) of the next response."""
    data = b""
    while (end := data.find(b"\r\n\r\n")) < 0:
        data += received(connection)
    head = data[:end].lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(data) < end + 4 + length:
        data += received(connection)
    return head.partition(b"\r\n")[0], data[end + 4 :]


def received(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise ConnectionError("the server closed the connection")
    return data


def load(url: str, cases: list[tuple], clients: int, seconds: float) -> tuple[list[float], int, int]:
    """(latencies, failed requests, wrong answers) of `clients` asking without pause; a case is (request, action)."""
    place = urllib.parse.urlsplit(url)
    connections = [socket.create_connection((place.hostname, place.port)) for _ in range(clients)]
    latencies: list[float] = []
    failed, wrong = [0] * clients, [0] * clients

    def ask(number: int) -> None:
        order = np.random.default_rng(number).integers(len(cases), size=4096).tolist()
        with connections[number] as connection:
            for case in itertools.cycle(order):
                began = time.perf_counter()
                if began > stop:
                    return
                request, expected = cases[case]
                try:
                    connection.sendall(request)
                    status, body = answer(connection)
                except OSError as error:
                    status, body = b"", str(error).encode()
                if b" 200 " not in status:
                    failed[number] += 1
                    print(f"failed: {status!r}: {body!r}")
                    if not status:
                        return
                    continue
                latencies.append(time.perf_counter() - began)
                wrong[number] += not np.array_equal(decode_array(json.loads(body), "action"), expected)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    stop = time.perf_counter() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, sum(failed), sum(wrong)


def alone(policy: Policy, batch: int) -> float:
    """Best seconds of one action in batches of that size, without a server."""
    rng, size = np.random.default_rng(0), policy.contract.model.image_size
    pixels = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    texts = [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(batch)]
    requests = [policy.prepare(policy.observe(*row)) for row in zip(pixels, texts, strict=True)]
    took = []
    for _ in range(TURNS + 1):  # the first one compiles
        began = time.perf_counter()
        for _ in range(-(-512 // batch)):
            policy.act(requests)
        took.append((time.perf_counter() - began) / -(-512 // batch) / batch)
    return min(took)


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
        first = (np.zeros((size, size, 3), np.uint8), INSTRUCTIONS[0])
        for i in range(64):
            image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            instruction = INSTRUCTIONS[i % len(INSTRUCTIONS)]
            cases.append((encoded(image, instruction), policy.predict_action(image, instruction)))
        one, many = alone(policy, 1), alone(policy, args.max_batch)
        print(
            f"the policy alone: {1e3 * one:.2f} ms an action one by one, {1e3 * many:.2f} ms in batches of "
            f"{args.max_batch}: {one / many:.1f}x",
            flush=True,
        )
        cache, sizes = Path(folder) / "cache", (1, args.max_batch)
        latencies: dict[int, list[float]] = {size: [] for size in sizes}
        cpu, failed, wrong = (dict.fromkeys(sizes, 0) for _ in range(3))
        with contextlib.ExitStack() as stack:
            servers = {size: stack.enter_context(serving(checkpoint, cache, size)) for size in sizes}
            for _ in range(TURNS):
                for size, server in servers.items():
                    cpu[size] -= server.cpu_seconds
                    found = load(server.url, cases, args.clients, args.seconds / TURNS)
                    cpu[size] += server.cpu_seconds
                    latencies[size] += found[0]
                    failed[size] += found[1]
                    wrong[size] += found[2]
        print(
            "| batches of up to | clients | actions/s | latency ms p50 / p95 | server's CPU ms each | failed | wrong |"
        )
        print("| --- " * 7 + "|")
        for size in sizes:
            count, (p50, p95) = len(latencies[size]), 1e3 * np.quantile(latencies[size], [0.5, 0.95])
            print(
                f"| {size} | {args.clients} | {count / args.seconds:.0f} | {p50:.1f} / {p95:.1f} "
                f"| {1e3 * cpu[size] / count:.2f} | {failed[size]} | {wrong[size]} |"
            )
        rates = {size: len(values) for size, values in latencies.items()}
        print(f"batching: {rates[args.max_batch] / rates[1]:.1f}x the throughput", flush=True)
        began = time.perf_counter()
        with serving(checkpoint, cache, args.max_batch) as server:
            Client(server.url).predict_action(*first)
            print(f"start to first action from a warm compilation cache: {time.perf_counter() - began:.1f} s")
    bad = sum(failed.values()) + sum(wrong.values())
    if bad:
        sys.exit(f"failed: {bad} requests failed or were answered wrong")


if __name__ == "__main__":
    main()
