"""Latency of one action, by stage, dtype, batch and length, beside PyTorch on the same weights and prompts.

  python benchmarks/inference.py                      # 0.8 B parameters on a CPU (bfloat16 and 7B on a GPU): minutes
  python benchmarks/inference.py --size 7b --batches 1 8 --quantize int8 int4

The baseline is `measure/pytorch.py`. Both sides have the same random weights and prompts, and take turns. PyTorch's
prompts have no padding. Fails if tokens differ in float32, or if ours takes more than 0.9 of PyTorch's time on a CPU.
The first row comes after about a minute of compilation. `benchmarks/gpu.py` measures the same on a GPU.
"""

import argparse
import gc
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
import jax.numpy as jnp
from measure.actions import PARTS, STEPS, action_parts, decode_bytes
from measure.models import BANDWIDTH, SIZES, card_limit, count_billions, random_model, requests, sized
from measure.timing import PeakMemory, time_in_turns

from openvla_jax.models.quantize import count_bytes

MAX_RATIO = 0.9  # of PyTorch's latency, on a CPU in float32


def line(side: str, dtype: str, batch: int, length: int, times: dict[str, np.ndarray]) -> str:
    cells = [side, dtype, str(batch), str(length)]
    for part in PARTS:
        p50, p95 = np.quantile(times[part], [0.5, 0.95])
        cells.append(f"{1e3 * p50:,.1f} / {1e3 * p95:,.1f}")
    cells.append(f"{batch / np.median(times['action']):.2f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpu = jax.default_backend() == "cpu"
    parser.add_argument("--size", choices=SIZES, default="0.8b" if cpu else "7b")
    parser.add_argument("--dtypes", nargs="+", default=["float32"] if cpu else ["bfloat16"])
    parser.add_argument("--quantize", nargs="*", default=[], help="also ours with these weights")
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--lengths", nargs="+", type=int, default=[25], help="tokens of the prompt")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no_pytorch", action="store_true")
    args = parser.parse_args()
    config, failed = sized(args.size), False
    print(f"{config.name}: {count_billions(config):.2f} B parameters, {jax.local_devices()[0].device_kind}")
    print("| side | weights | batch | prompt | action ms p50 / p95 | vision | prefill | decode step | actions/s |")
    print("| --- " * 9 + "|")
    for dtype in args.dtypes:
        for quantize in (None, *args.quantize):
            model, modules = random_model(config, jnp.dtype(dtype), quantize), None
            if not (args.no_pytorch or quantize):
                from measure import pytorch

                modules = pytorch.make_modules(config, dtype, model)
            if cpu:  # as a policy does
                model.unstack()
            for batch in args.batches:
                for length in args.lengths:
                    request = requests(config, batch, length)
                    with PeakMemory() as memory:
                        sides = {"openvla_jax": action_parts(model, *request)}
                        if modules is not None:
                            sides["PyTorch"] = pytorch.action_parts(pytorch.Eager(modules, *request))
                        by_part = {
                            part: time_in_turns({side: parts[part] for side, parts in sides.items()}, args.runs)
                            for part in PARTS
                        }
                    times = {side: {part: by_part[part][side] for part in PARTS} for side in sides}
                    for side, of_side in times.items():
                        print(line(side, quantize or dtype, batch, length, of_side), flush=True)
                    weights = count_bytes(model) / 1e9
                    notes = [f"peak memory of the process {memory.bytes / 1e9:.1f} GB, weights {weights:.2f} GB"]
                    if bandwidth := card_limit(BANDWIDTH):
                        floor = decode_bytes(model, batch, config.patches + request[1].shape[1] + STEPS) / bandwidth
                        share = floor / np.median(times["openvla_jax"]["decode step"])
                        notes.append(f"decode step at {share:.0%} of the memory bandwidth's roofline")
                    if "PyTorch" in sides:
                        ratio = np.median(times["openvla_jax"]["action"]) / np.median(times["PyTorch"]["action"])
                        same = np.array_equal(sides["openvla_jax"]["action"]()[0], sides["PyTorch"]["action"]()[0])
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
