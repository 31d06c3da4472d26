"""Latency of one action, by stage, dtype, batch and length, beside PyTorch on the same weights and prompts.

  python benchmarks/inference.py                      # 0.8 B parameters on a CPU (bfloat16 and 7B on a GPU): minutes
  python benchmarks/inference.py --size 7b --batches 1 8 --quantize int8 int4

The baseline is assembled from transformers' modules as OpenVLA's own code is (SDPA attention, key/value cache, logits
of the last position only); like the reference it runs the towers' last block, whose output nobody reads. Both sides
hold the same random weights, get the same prompts without padding tokens on PyTorch's side, and are timed in turns.
Fails if tokens differ in float32, or if on a CPU ours takes more than 0.9 of PyTorch's time.
"""

import argparse
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import psutil  # noqa: E402

from openvla_jax.config import LlamaConfig, VisionConfig, VLAConfig, preset  # noqa: E402
from openvla_jax.inference.decode import decode_actions  # noqa: E402
from openvla_jax.models.openvla import abstract_model  # noqa: E402
from openvla_jax.models.quantize import choose_paths, count_bytes, quantize_model  # noqa: E402
from openvla_jax.parallel.execution import PLAIN  # noqa: E402

MAX_RATIO = 0.9  # of PyTorch's latency, on a CPU in float32
STEPS = 7
# Peak memory bandwidth in bytes per second, by a part of the device's name (vendors' data sheets).
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12, "4090": 1.01e12, "A6000": 0.77e12}


def model_config(size: str) -> VLAConfig:
    if size == "7b":
        return preset("openvla-7b")
    towers = (
        VisionConfig("dino", 768, 12, 12, 3072, registers=4, class_token=True, layer_scale=True),
        VisionConfig("siglip", 768, 12, 12, 3072),
    )
    depth = {"0.8b": 10, "0.4b": 2}[size]
    return VLAConfig(size, towers, LlamaConfig(width=2048, depth=depth, heads=16, kv_heads=16, mlp_dim=5504))


def random_model(config: VLAConfig, dtype: Any) -> Any:
    """Random weights of sensible size, made on the device leaf by leaf."""

    def fill(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if leaf.ndim < 2 or "norm" in name or "bias" in name or "scale" in name:
            value = 0.0 if "bias" in name else 0.1 if "scale1" in name or "scale2" in name else 1.0
            return jnp.full(leaf.shape, value, dtype)
        seed = np.frombuffer(name.encode(), np.uint8).sum()
        deviation = 0.02 if "table" in name or "position" in name else leaf.shape[-2] ** -0.5
        make = jax.jit(lambda key: (jax.random.normal(key, leaf.shape, dtype) * deviation).astype(dtype))
        return make(jax.random.key(int(seed)))

    return jax.tree_util.tree_map_with_path(fill, abstract_model(config, dtype))


def requests(config: VLAConfig, batch: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """images uint8 [B, S, S, 3], prompts int32 [B, T] padded to the policy's bucket, lengths int32 [B]."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, config.image_size, config.image_size, 3), dtype=np.uint8)
    ids = np.full((batch, -(-length // 32) * 32), config.pad_token, np.int32)
    ids[:, :length] = rng.integers(3, 31000, (batch, length))
    ids[:, 0] = 1
    return images, ids, np.full(batch, length, np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# The two sides: each a dict of stage -> function without arguments that returns when the work is done
# ---------------------------------------------------------------------------------------------------------------------


def ours(model: Any, images: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> dict[str, Callable[[], Any]]:
    leaves, structure = jax.tree.flatten(model)
    unflatten = lambda leaves: jax.tree.unflatten(structure, leaves)

    @jax.jit
    def action(leaves, images, ids, lengths):
        return decode_actions(unflatten(leaves), images, ids, lengths, STEPS, constrained=False).tokens

    @jax.jit
    def vision(leaves, images):
        model = unflatten(leaves)
        return model.project(model.normalize(images))

    @jax.jit
    def prefill(leaves, patches, ids, lengths):
        model = unflatten(leaves)
        x = model.splice(patches, ids)
        hidden, cache = model.llama.prefill(x, x.shape[1] + STEPS, PLAIN, lengths + (model.config.patches - 1))
        return model.llama.logits(hidden[:, 0], PLAIN), cache

    @jax.jit
    def step(leaves, tokens, lengths, cache):
        return unflatten(leaves).decode(tokens, lengths, cache)[0]

    patches = vision(leaves, images)
    _, cache = prefill(leaves, patches, ids, lengths)
    tokens = np.zeros(len(ids), np.int32)
    return {
        "action": lambda: np.asarray(action(leaves, images, ids, lengths)),
        "vision": lambda: jax.block_until_ready(vision(leaves, images)),
        "prefill": lambda: jax.block_until_ready(prefill(leaves, patches, ids, lengths)),
        "decode step": lambda: jax.block_until_ready(step(leaves, tokens, lengths, cache)),
    }


def make_pytorch(config: VLAConfig) -> Any:
    """The baseline's modules, random float32 weights, on the CPU."""
    import torch
    import torch_reference

    if not torch.cuda.is_available():
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as XLA takes
    reference = torch_reference.TorchVLA(config, 0)
    for part in (*reference.towers, reference.llama):
        part.set_attn_implementation("sdpa")
    return reference.eval()


def same_weights(reference: Any, dtype: Any) -> Any:
    """Our model with the weights of the PyTorch modules."""
    import torch_reference

    # The oracle's own tables of names, in float32 and without copies.
    torch_reference._tensors = lambda module, _: {name: p.detach().numpy() for name, p in module.named_parameters()}
    arrays = reference.arrays()
    abstract = abstract_model(reference.config, dtype)
    leaves = [jnp.asarray(arrays.pop(name), dtype) for name in torch_reference.named_leaves(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def pytorch(
    reference: Any, dtype: str, images: np.ndarray, ids: np.ndarray, lengths: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """All prompts have one length, so that neither side needs a mask for padding."""
    import torch
    import torch_reference

    config = reference.config
    device, torch_dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)
    reference = reference.to(device, torch_dtype)
    stats = [(np.asarray(t.mean, np.float32), np.asarray(t.std, np.float32)) for t in config.towers]
    pixels = np.concatenate([(images / np.float32(255) - mean) / std for mean, std in stats], axis=-1)
    pixels = torch.tensor(np.moveaxis(pixels, -1, 1)).to(device, torch_dtype)
    text = torch.tensor(ids[:, : int(lengths[0])].astype(np.int64)).to(device)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def vision():
        parts = zip(reference.towers, config.towers, pixels.split(3, dim=1), strict=True)
        return reference.projector(torch.cat([torch_reference.features(*part) for part in parts], dim=-1))

    def prefill(patches):
        embedded = reference.llama.model.embed_tokens(text)
        sequence = torch.cat([embedded[:, :1], patches, embedded[:, 1:]], dim=1)
        return reference.llama(inputs_embeds=sequence, use_cache=True, logits_to_keep=1)

    def step(token, cache):
        return reference.llama(input_ids=token[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def action():
        out = prefill(vision())
        tokens = [out.logits[:, -1].argmax(-1)]
        for _ in range(STEPS - 1):
            out = step(tokens[-1], out.past_key_values)
            tokens.append(out.logits[:, -1].argmax(-1))
        return torch.stack(tokens, dim=1).cpu().numpy()

    def one_step():
        step(first, cache)
        wait()
        cache.crop(-1)

    def timed(function):
        def run():
            with torch.inference_mode():
                result = function()
                wait()
                return result

        return run

    with torch.inference_mode():
        patches = vision()
        out = prefill(patches)
        cache, first = out.past_key_values, out.logits[:, -1].argmax(-1)
    return {
        "action": timed(action),
        "vision": timed(vision),
        "prefill": timed(lambda: prefill(patches)),
        "decode step": timed(one_step),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def time_in_turns(sides: dict[str, dict[str, Callable[[], Any]]], runs: int) -> dict[str, dict[str, np.ndarray]]:
    """Seconds of each run, by side and stage; the sides take turns, so that a busy machine troubles both."""
    times: dict[str, dict[str, list[float]]] = {side: {stage: [] for stage in stages} for side, stages in sides.items()}
    for stage in next(iter(sides.values())):
        for run in range(runs + 1):
            for side, stages in sides.items():
                began = time.perf_counter()
                stages[stage]()
                if run:  # the first compiles, and fills caches
                    times[side][stage].append(time.perf_counter() - began)
    return {side: {stage: np.asarray(values) for stage, values in stages.items()} for side, stages in times.items()}


class PeakMemory:
    """Largest resident memory of the process while the block runs, sampled; of a GPU what its allocator says."""

    def __enter__(self) -> "PeakMemory":
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.05):
            self.bytes = max(self.bytes, process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def line(side: str, dtype: str, batch: int, length: int, times: dict[str, np.ndarray]) -> str:
    cells = [side, dtype, str(batch), str(length)]
    for stage in ("action", "vision", "prefill", "decode step"):
        p50, p95 = np.quantile(times[stage], [0.5, 0.95])
        cells.append(f"{1e3 * p50:,.1f} / {1e3 * p95:,.1f}")
    cells.append(f"{batch / np.median(times['action']):.2f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpu = jax.default_backend() == "cpu"
    parser.add_argument("--size", choices=("0.4b", "0.8b", "7b"), default="0.8b" if cpu else "7b")
    parser.add_argument("--dtypes", nargs="+", default=["float32"] if cpu else ["bfloat16"])
    parser.add_argument("--quantize", nargs="*", default=[], help="also ours with these weights")
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--lengths", nargs="+", type=int, default=[25], help="tokens of the prompt")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no_pytorch", action="store_true")
    args = parser.parse_args()
    config, failed = model_config(args.size), False
    kind = jax.local_devices()[0].device_kind
    print(
        f"{config.name}: {sum(x.size for x in jax.tree.leaves(abstract_model(config))) / 1e9:.2f} B parameters, {kind}"
    )
    print("| side | weights | batch | prompt | action ms p50 / p95 | vision | prefill | decode step | actions/s |")
    print("| --- " * 9 + "|")
    for dtype in args.dtypes:
        for quantize in (None, *args.quantize):
            reference = None if args.no_pytorch or quantize else make_pytorch(config)
            dtype_ = jnp.dtype(dtype)
            model = same_weights(reference, dtype_) if reference is not None else random_model(config, dtype_)
            if quantize:
                model = quantize_model(model, quantize, choose_paths(model))
            if cpu:  # as a policy does
                model.unstack()
            for batch in args.batches:
                for length in args.lengths:
                    prompt = requests(config, batch, length)
                    with PeakMemory() as memory:
                        sides = {"openvla_jax": ours(model, *prompt)}
                        if reference is not None:
                            sides["PyTorch"] = pytorch(reference, dtype, *prompt)
                        times = time_in_turns(sides, args.runs)
                    for side, of_side in times.items():
                        print(line(side, quantize or dtype, batch, length, of_side), flush=True)
                    weights = count_bytes(model) / 1e9
                    notes = [f"peak memory of the process {memory.bytes / 1e9:.1f} GB, weights {weights:.2f} GB"]
                    bandwidth = next((value for name, value in BANDWIDTH.items() if name in kind), None)
                    if bandwidth:
                        floor = count_bytes(model.llama) / bandwidth
                        share = floor / np.median(times["openvla_jax"]["decode step"])
                        notes.append(f"decode step at {share:.0%} of the memory bandwidth's roofline")
                    if "PyTorch" in sides:
                        medians = {side: np.median(of_side["action"]) for side, of_side in times.items()}
                        ratio = medians["openvla_jax"] / medians["PyTorch"]
                        same = np.array_equal(sides["openvla_jax"]["action"](), sides["PyTorch"]["action"]())
                        notes.append(f"{ratio:.2f} of PyTorch's latency; tokens {'equal' if same else 'differ'}")
                        if dtype == "float32" and (not same or (cpu and batch == 1 and ratio > MAX_RATIO)):
                            failed = True
                    print("  " + "; ".join(notes), flush=True)
                    del sides
                    gc.collect()
    if failed:
        sys.exit(f"failed: tokens differ in float32, or more than {MAX_RATIO} of PyTorch's latency")


if __name__ == "__main__":
    main()
