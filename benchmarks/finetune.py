"""A step of LoRA fine-tuning: examples/s, MFU and peak memory, beside full fine-tuning and PyTorch with PEFT.

  python benchmarks/finetune.py               # scaled down on a CPU; openvla-7b in bfloat16 on a GPU
  python benchmarks/finetune.py --size 7b --batches 1 16 --bases bfloat16 int4

Random weights and batches; adapters on every linear layer. The baseline is assembled from transformers' modules as
OpenVLA's own fine-tuning is, with PEFT's adapters (`pip install peft`; left out where that is missing) and torch's
AdamW; like the reference it computes the logits of every position. The sides take turns. On a CPU it fails if at
batch 1 a step of LoRA takes more than 0.75 of one that trains everything.
"""

import argparse
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "models"), str(ROOT / "benchmarks")]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from inference import PeakMemory, model_config  # noqa: E402

from configs.common import base  # noqa: E402
from openvla_jax.config import VLAConfig, tiny  # noqa: E402
from openvla_jax.models.lora import LoRAConfig  # noqa: E402
from openvla_jax.models.tuning import FULL, MODES, Tuning  # noqa: E402
from openvla_jax.parallel.execution import Execution  # noqa: E402
from openvla_jax.parallel.sharding import global_batch, make_mesh  # noqa: E402
from openvla_jax.planning.train import model_flops  # noqa: E402
from openvla_jax.training.optimizer import make_optimizer, make_schedule  # noqa: E402
from openvla_jax.training.state import abstract_state, init_state  # noqa: E402
from openvla_jax.training.step import make_train_step  # noqa: E402

MAX_RATIO = 0.75  # of the full step's time, on a CPU
TEXT = 64
# Peak dense bf16 rate in FLOP/s by a part of the device's name (vendors' data sheets).
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "A6000": 155e12}


def small() -> VLAConfig:
    """The tiny model; transformers' DINOv2 wants an MLP of four widths."""
    config = tiny()
    towers = (dataclasses.replace(config.towers[0], mlp_dim=4 * config.towers[0].width), *config.towers[1:])
    return dataclasses.replace(config, towers=towers)


def random_rows(config: VLAConfig, rows: int) -> Any:
    """A batch with an action of 7 tokens at the end of a text of 64."""
    from training.batches import random_batch

    return random_batch(rows, 0, config, TEXT)


def ours(config: VLAConfig, tuning: Tuning, batch: Any, dtype: str, remat: str) -> tuple[Callable[[], None], int]:
    """(a step that waits for its end, bytes that the compiled step needs)."""
    mesh, settings = make_mesh({}, jax.devices()[:1]), base().optimizer
    schedule = make_schedule(settings, 1000)
    optimizer = make_optimizer(settings, schedule)
    state = init_state(config, jnp.dtype(dtype), optimizer, mesh, 0, tuning)
    _, placed = abstract_state(config, jnp.dtype(dtype), optimizer, mesh, tuning)
    step = make_train_step(
        config, optimizer, schedule, Execution(mesh, remat=remat), dtype=jnp.dtype(dtype), datasets=2, tuning=tuning
    )
    batch = global_batch(batch, mesh)
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
    compiled = step.lower(state, batch).compile()
    memory, held = compiled.memory_analysis(), [state]
    step = step if tuning.quantize == "int4" else compiled  # see training/loop.py

    def run() -> None:
        held[0], metrics = step(held[0], batch)
        assert np.isfinite(jax.device_get(metrics["loss"]))

    return run, memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def pytorch(config: VLAConfig, batch: Any, dtype: str, rank: int) -> tuple[Callable[[], None], int] | None:
    """The same of PyTorch and PEFT, or None where PEFT is missing."""
    try:
        import torch
        import torch_reference
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        print(f"no PyTorch baseline: {error}")
        return None
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as XLA takes
    device, kind = ("cuda" if cuda else "cpu"), getattr(torch, dtype)
    model = torch_reference.TorchVLA(config, 0)
    for part in (*model.towers, model.llama):
        part.set_attn_implementation("sdpa")
    targets = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    lora = LoraConfig(r=rank, lora_alpha=min(rank, 16), init_lora_weights="gaussian", target_modules=targets)
    model = get_peft_model(model.to(kind), lora).to(device)
    inner = model.get_base_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    pixels = torch.rand(len(batch.tokens), 3 * len(config.towers), config.image_size, config.image_size)
    pixels = (2 * pixels - 1).to(device, kind)
    ids = torch.tensor(np.asarray(batch.tokens).astype(np.int64)).to(device)
    labels = torch.full((len(ids), config.patches + TEXT), -100, device=device)
    places = torch.tensor(np.asarray(batch.target_positions).astype(np.int64)).to(device)
    labels.scatter_(1, places + config.patches, ids.gather(1, places))
    real = torch.cat(
        [torch.ones(len(ids), config.patches, dtype=torch.bool, device=device), ids != config.pad_token], 1
    )

    def run() -> None:
        parts = zip(inner.towers, config.towers, pixels.split(3, dim=1), strict=True)
        patches = inner.projector(torch.cat([torch_reference.features(*part) for part in parts], dim=-1))
        text = inner.llama.model.embed_tokens(ids)
        embedded = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
        loss = inner.llama(inputs_embeds=embedded, attention_mask=real, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert np.isfinite(loss.item())  # waits for the device

    run()
    return run, torch.cuda.max_memory_allocated() if cuda else 0


def time_in_turns(sides: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Median seconds of a step."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(runs + 1):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            if run:  # the first fills caches
                times[name].append(time.perf_counter() - began)
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpu = jax.default_backend() == "cpu"
    parser.add_argument("--size", choices=("tiny", "0.4b", "0.8b", "7b"), default="tiny" if cpu else "7b")
    parser.add_argument("--batches", nargs="+", type=int, default=[1] if cpu else [1, 16])
    parser.add_argument("--bases", nargs="+", default=["float32", "int4"] if cpu else ["bfloat16", "int4"])
    parser.add_argument("--rank", type=int, help="default: 32, and 4 for the tiny model, whose width is 64")
    parser.add_argument("--remat", default="none" if cpu else "full")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--no_pytorch", action="store_true")
    args = parser.parse_args()
    args.rank = args.rank or (4 if args.size == "tiny" else 32)
    config, failed = (small() if args.size == "tiny" else model_config(args.size)), []
    dtype = "float32" if cpu else "bfloat16"
    kind = jax.local_devices()[0].device_kind
    print(f"{config.name}, {kind}, computed in {dtype}, remat {args.remat}, rank {args.rank}, text {TEXT}")
    print("| side | trained | base | batch | step ms | examples/s | MFU | memory |\n" + "| --- " * 8 + "|")
    peak = next((value for name, value in PEAK.items() if name in kind), None)
    for batch_size in args.batches:
        batch = random_rows(config, batch_size)
        cases: dict[tuple[str, str, str], Tuning | None] = {}
        for name in args.bases:
            integers = name if name.startswith("int") else None
            tuning = Tuning(MODES["lora"], LoRAConfig(args.rank), dtype if integers else name, integers)
            cases["openvla_jax", "lora", name] = tuning
        if cpu:
            cases["openvla_jax", "everything", "float32"] = FULL
        if not args.no_pytorch:
            cases["PyTorch + PEFT", "lora", dtype] = None
        # On a GPU one model at a time; on a CPU in turns, so that a busy machine troubles all.
        groups = [list(cases)] if cpu else [[case] for case in cases]
        for group in groups:
            with PeakMemory() as resident:
                made = {}
                for case in group:
                    tuning = cases[case]
                    side = (
                        pytorch(config, batch, dtype, args.rank)
                        if tuning is None
                        else ours(config, tuning, batch, dtype, args.remat)
                    )
                    made |= {} if side is None else {case: side}
                times = time_in_turns({case: step for case, (step, _) in made.items()}, args.runs)
            for case, seconds in times.items():
                flops = (
                    model_flops(config, TEXT, cases[case] or Tuning(MODES["lora"], LoRAConfig(args.rank))) * batch_size
                )
                mfu = f"{flops / seconds / peak:.1%}" if peak else "-"
                memory = f"{made[case][1] / 1e9:.2f} GB" if made[case][1] else "-"
                cells = [*case, str(batch_size), f"{1e3 * seconds:.1f}", f"{batch_size / seconds:.2f}", mfu, memory]
                print("| " + " | ".join(cells) + " |", flush=True)
            print(f"  peak memory of the process {resident.bytes / 1e9:.1f} GB")
            if cpu:
                first = times["openvla_jax", "lora", args.bases[0]]
                ratio = first / times["openvla_jax", "everything", "float32"]
                print(f"  a step of LoRA takes {ratio:.2f} of one that trains everything")
                failed += [ratio] if batch_size == 1 and ratio > MAX_RATIO else []
            del made
            gc.collect()
    if failed:
        sys.exit(f"failed: LoRA takes {max(failed):.2f} of the full step's time")


if __name__ == "__main__":
    main()
