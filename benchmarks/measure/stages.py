"""The stages of benchmarks/gpu.py. Each records rows as soon as they are measured."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from measure import ROOT

Record = Callable[..., None]  # (table, **cells)


class SkippedError(Exception):
    """A stage cannot run here. The message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Context:
    record: Record
    small: bool  # whether to run tiny models in float32, on a CPU
    folder: Path  # shared by all stages
    seconds: float  # that the stage may take

    @property
    def dtype(self) -> str:
        return "float32" if self.small else "bfloat16"

    @property
    def runs(self) -> tuple[int, float]:
        """(most runs of a part, most seconds of them)"""
        return (3, 1.0) if self.small else (200, self.seconds / 20)


# ---------------------------------------------------------------------------------------------------------------------
# Smoke test
# ---------------------------------------------------------------------------------------------------------------------


def smoke(context: Context) -> None:
    """Records the golden's differences in float32, the card's own rates, and the result of the tests marked gpu."""
    tests = _start_tests(context)
    _golden(context.record)
    if not context.small:
        _card(context.record)
    output = tests.communicate(timeout=context.seconds)[0]
    for line in output.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            context.record("tests marked gpu", result=line[:200])
    context.record("tests marked gpu", result=output.strip().splitlines()[-1].strip("= "))
    if tests.returncode:
        raise RuntimeError(f"tests marked gpu: pytest's exit code is {tests.returncode}")


def _start_tests(context: Context) -> subprocess.Popen:
    """Collects only the files that have the mark: others import packages that a bare machine does not have."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, marked)]
    command += ["--collect-only"] if context.small else []  # the ordinary suite runs them on a CPU
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _golden(record: Record) -> None:
    import jax
    import jax.numpy as jnp
    from goldens.unpack import unpack

    from openvla_jax import load_model
    from openvla_jax.convert import import_weights

    jax.config.update("jax_default_matmul_precision", "highest")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(folder)
        golden, imported = folder / "openvla_tiny", folder / "imported"
        expected = dict(np.load(golden / "expected.npz", allow_pickle=False))
        pixels = np.load(golden / "pixel_values.npy").transpose(0, 2, 3, 1)
        import_weights(golden, imported)
        model, _ = load_model(imported, dtype="float32")
    leaves, structure = jax.tree.flatten(model)

    @jax.jit
    def logits(leaves, pixels, ids):
        return jax.tree.unflatten(structure, leaves)(pixels, ids)

    @jax.jit
    def decode(leaves, pixels, ids):
        model, lengths = jax.tree.unflatten(structure, leaves), jnp.full(len(ids), ids.shape[1])
        logits, cache = model.prefill(pixels, ids, lengths, steps)
        tokens = [logits.argmax(-1)]
        for step in range(steps - 1):
            logits, cache = model.decode_step(tokens[-1], lengths + step, cache)
            tokens.append(logits.argmax(-1))
        return jnp.stack(tokens, axis=1)

    steps = expected["action_tokens"].shape[1]
    got = np.asarray(logits(leaves, pixels, expected["input_ids"].astype(np.int32)))
    difference = float(np.abs(got[:, 256:, ::29] - expected["logits_text"]).max())
    same = int((got.argmax(-1) == expected["argmax"]).sum())
    record("golden", what="logits, float32", difference=difference, equal=f"{same}/{expected['argmax'].size}")
    rows = np.array([0, 2])  # the reference appends the lone space to the whole row
    ids = np.concatenate([expected["input_ids"][rows], np.full((2, 1), 29871)], axis=1).astype(np.int32)
    same = int((np.asarray(decode(leaves, pixels[rows], ids)) == expected["action_tokens"]).sum())
    record("golden", what="action tokens", equal=f"{same}/{expected['action_tokens'].size}")


def _card(record: Record) -> None:
    """Records what the card reaches: a copy that reads and writes 4 GiB, a product of 8192 x 8192 matrices."""
    import jax
    import jax.numpy as jnp

    from measure.timing import sample

    x = jnp.ones(2**31, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    times = sample(lambda: jax.block_until_ready(copy(x)), 20, 2.0).seconds
    record("card", what="copy, read and written, TB/s", value=2 * x.nbytes / np.median(times) / 1e12)
    del x
    x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    times = sample(lambda: jax.block_until_ready(product(x, x)), 50, 2.0).seconds
    record("card", what="bfloat16 product of 8192 x 8192, TFLOP/s", value=2 * 8192**3 / np.median(times) / 1e12)


# ---------------------------------------------------------------------------------------------------------------------
# Actions
# ---------------------------------------------------------------------------------------------------------------------

LENGTH = 25  # tokens of the prompt


def actions(context: Context, batch: int, quantize: str | None = None) -> None:
    """Records our latency by part, with attention by XLA and by cuDNN.

    A CPU has no cuDNN: jax.nn's formula, with the same rules for masks, takes its place.
    """
    import jax
    import jax.numpy as jnp

    from measure.actions import PARTS, STEPS, action_parts, decode_bytes, fused_attention
    from measure.models import BANDWIDTH, card_limit, random_model, requests, sized
    from measure.timing import peak_gb, sample

    config, batch = (sized("smallest"), min(batch, 2)) if context.small else (sized("7b"), batch)
    request = requests(config, batch, LENGTH)
    model = random_model(config, jnp.dtype(context.dtype), quantize)
    weights, bandwidth = quantize or context.dtype, card_limit(BANDWIDTH)
    name, implementation = ("cuDNN", "cudnn") if jax.default_backend() == "gpu" else ("jax.nn", "xla")
    ways = {"XLA": nullcontext, name: partial(fused_attention, implementation)}
    parts = {way: action_parts(model, *request) for way in ways}
    floor = decode_bytes(model, batch, config.patches + request[1].shape[1] + STEPS)
    shortened = context.small and (batch > 1 or quantize)  # by what bf16 has run
    for part in PARTS[:1] if shortened else PARTS:
        for way, entered in ways.items():
            if context.small and (shortened or part != "action") and way == "XLA":
                continue
            cells = {"side": "openvla_jax", "weights": weights, "attention": way, "batch": batch, "part": part}
            with entered() as traced, _failures(context.record, "actions", cells):
                samples = sample(parts[way][part], *context.runs)
                if traced is not None and not traced():
                    raise RuntimeError(f"attention by {way} was never called: the models call another function")
                extra = {"peak GB": peak_gb()}
                if part == "action":
                    extra |= _compare(context.folder, f"{weights}-{batch}", *parts[way][part]())
                if part == "decode step":
                    share = floor / np.median(samples.seconds) / bandwidth if bandwidth else None
                    extra["of the bandwidth"] = f"{share:.0%}" if share else "unknown card"
                context.record("actions", **cells, **samples.cells(), **extra)


def torch_actions(context: Context, *sides: str) -> None:
    """Records PyTorch's latency by part, on the same weights and prompts as ours, batch 1."""
    _require("torch")
    import jax.numpy as jnp

    from measure import pytorch
    from measure.actions import PARTS
    from measure.models import random_model, requests, sized
    from measure.timing import sample

    config = sized("smallest" if context.small else "7b")
    modules = pytorch.make_modules(config, context.dtype, random_model(config, jnp.dtype(context.dtype)))
    request = requests(config, 1, LENGTH)
    for name in sides:
        cells = {"side": f"PyTorch {name}", "weights": context.dtype, "attention": "SDPA", "batch": 1}
        with _failures(context.record, "actions", cells):
            if name == "compiled, CUDA graph" and not pytorch.CUDA:
                raise SkippedError("no CUDA")
            parts = pytorch.action_parts(pytorch.SIDES[name](modules, *request))
            for part in PARTS:
                samples = sample(parts[part], *context.runs)
                extra = {"peak GB": pytorch.peak_gb()}
                if part == "action":
                    extra |= _compare(context.folder, f"{context.dtype}-1", *parts[part]())
                context.record("actions", **cells, part=part, **samples.cells(), **extra)


def _compare(folder: Path, name: str, tokens: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """Returns columns: tokens equal to the first side's, and the difference of the first token's logits."""
    path = folder / f"{name}.npz"
    if not path.exists():
        np.savez(path, tokens=tokens, logits=logits)
        return {}
    first = np.load(path)
    difference = np.abs(logits - first["logits"]).max() / np.abs(first["logits"]).max()
    return {"tokens": f"{int((tokens == first['tokens']).sum())}/{tokens.size}", "logits off": float(difference)}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def lora(context: Context, batch: int, base: str | None = None) -> None:
    """Records a step of LoRA, rank 32, with as few recomputed activations as fit."""
    from measure import training

    base = base or context.dtype
    batch = 1 if context.small else batch
    rank = 4 if context.small else 32
    tuning = training.lora(rank, base, context.dtype)
    _train(context, {"side": "openvla_jax", "trained": f"LoRA, rank {rank}", "base": base, "batch": batch}, tuning)


def full(context: Context, batch: int) -> None:
    """Records a step that trains all 0.8 B parameters: float32 weights and moments, computed in bfloat16."""
    from measure import training

    cells = {"side": "openvla_jax", "trained": "everything", "base": "float32", "batch": 1 if context.small else batch}
    _train(context, cells, training.FULL, size="0.8b")


def _train(context: Context, cells: dict[str, Any], tuning: Any, size: str = "7b") -> None:
    from measure import training
    from measure.models import sized
    from measure.timing import peak_gb, sample

    config = sized("smallest" if context.small else size)
    if context.small:  # one tower takes less time to compile
        config = dataclasses.replace(config, towers=config.towers[1:])
    batch = cells["batch"]
    for remat in ("save_dots", "full"):
        step = None  # frees the state of a step that did not fit
        cells = {"model": config.name, **cells, "remat": remat}
        with _failures(context.record, "training", cells):
            step = training.make_step(config, tuning, training.rows(config, batch), context.dtype, remat)
            samples = sample(step.run, *context.runs)
            more = {"compile s": step.compile_seconds, "peak GB": peak_gb()}
            context.record("training", **cells, **samples.cells(), **_speed(config, tuning, batch, samples), **more)
            return
    raise RuntimeError("no step ran: see the table")


def peft(context: Context, batch: int) -> None:
    """Records PEFT's step on PyTorch's modules, with gradient checkpointing if it does not fit without."""
    _require("torch", "peft")
    import torch

    from measure import pytorch, training
    from measure.models import sized
    from measure.timing import sample

    rank, batch, config = (4, 1, sized("smallest")) if context.small else (32, batch, sized("7b"))
    tuning = training.lora(rank, context.dtype, context.dtype)
    cells = {"model": config.name, "side": "PyTorch + PEFT", "trained": f"LoRA, rank {rank}", "base": context.dtype}
    for checkpointing in (False, True):
        cells |= {"batch": batch, "remat": "full" if checkpointing else "none"}
        with _failures(context.record, "training", cells):
            run = pytorch.peft_step(config, training.rows(config, batch), context.dtype, rank, checkpointing)
            samples = sample(run, *context.runs)
            more = _speed(config, tuning, batch, samples) | {"peak GB": pytorch.peak_gb()}
            context.record("training", **cells, **samples.cells(), **more)
            return
        run = None
        torch.cuda.empty_cache()
    raise RuntimeError("no step ran: see the table")


def _speed(config: Any, tuning: Any, batch: int, samples: Any) -> dict[str, Any]:
    """Returns columns: examples per second, and the share of the FLOP per second on the card's data sheet."""
    from measure import training
    from measure.models import PEAK, card_limit

    seconds, peak = float(np.median(samples.seconds)), card_limit(PEAK)
    flops = training.model_flops(config, training.TEXT, tuning) * batch
    return {"examples/s": batch / seconds, "MFU": f"{flops / seconds / peak:.1%}" if peak else "unknown card"}


# ---------------------------------------------------------------------------------------------------------------------
# Shared by the stages
# ---------------------------------------------------------------------------------------------------------------------


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise SkippedError(f"no {package}")


@contextmanager
def _failures(record: Record, table: str, cells: dict[str, Any]) -> Iterator[None]:
    """Records an exception as a row, so that the next way is tried."""
    try:
        yield
    except Exception as error:
        record(table, **cells, failed=f"{type(error).__name__}: {error}".splitlines()[0][:200])
        if not isinstance(error, SkippedError):
            traceback.print_exc()


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    seconds: int  # that its process may take
    run: Callable[[Context], None]


# The most important come first: a stage runs only if time is left.
STAGES = (
    Stage("smoke", 60, smoke),
    Stage("bf16", 90, partial(actions, batch=1)),
    Stage("torch", 45, lambda context: torch_actions(context, "eager")),
    Stage("torch-compiled", 75, lambda context: torch_actions(context, "compiled", "compiled, CUDA graph")),
    Stage("lora-16", 90, partial(lora, batch=16)),
    Stage("peft-16", 60, partial(peft, batch=16)),
    Stage("int8", 60, partial(actions, batch=1, quantize="int8")),
    Stage("batch-8", 60, partial(actions, batch=8)),
    Stage("batch-32", 60, partial(actions, batch=32)),
    Stage("int4", 60, partial(actions, batch=1, quantize="int4")),
    Stage("lora-1", 60, partial(lora, batch=1)),
    Stage("full-0.8b", 60, partial(full, batch=32)),
    Stage("lora-16-int4", 60, partial(lora, batch=16, base="int4")),
)
