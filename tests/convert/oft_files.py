"""Random OpenVLA-OFT checkpoint directories, as the reference's finetune.py leaves them, written without PyTorch."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from fabricate import DTYPES, STATISTICS, random_tensors, shrunken, write_hf
from safetensors.numpy import load_file

from openvla_jax.config import VLAConfig
from openvla_jax.convert.torch_io import read_pt
from openvla_jax.convert.torch_write import PtWriter, fill

SUFFIX = "10_checkpoint.pt"
WIDTH = 64  # of the language model of `shrunken`
ROW = {"mean": 0.0, "std": 0.5, "min": -1.0, "max": 1.0, "q01": -0.9, "q99": 0.9}


def statistics(columns: int = 8, dim: int = 7) -> dict[str, Any]:
    """As the reference saves them beside a checkpoint: one dataset, with its state's."""
    action = STATISTICS["bridge_orig"]["action"]
    if dim != 7:
        action = {name: [value] * dim for name, value in ROW.items()}
    proprio = {name: [value] * columns for name, value in ROW.items()}
    return {"mine_no_noops": {"action": action, "num_transitions": 9, "num_trajectories": 1, "proprio": proprio}}


def policy(head: str = "l1", columns: int = 8, dim: int = 7, film: bool = False, cameras: int = 2) -> VLAConfig:
    """The model of a small policy."""
    continuous = head != "parallel_tokens"
    return dataclasses.replace(
        shrunken("dinosiglip"), head=head, action_dim=dim if continuous else 0, state_dim=columns, film=film,
        cameras=cameras,
    )  # fmt: skip


def write_oft(
    folder: Path, head: str = "l1", columns: int = 8, dim: int = 7, film: bool = False, rank: int = 20,
    dtype: str = "bfloat16", suffix: str = SUFFIX, seed: int = 0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A directory with a small model and its component files; returns all tensors by their names in `names.table`."""
    base = write_hf(folder, "dinosiglip", dtype, seed=seed)
    tensors = random_tensors(policy(head, columns, dim, film), "hf", dtype, seed)
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics(columns, dim), indent=2))
    for component in ("action_head", "proprio_projector", "noisy_action_projector"):
        kept = "float32" if component != "action_head" else dtype
        stored = {
            f"module.{name.partition('.')[2]}": x.astype(DTYPES[kept])
            for name, x in tensors.items()
            if name.startswith(f"{component}.")
        }
        if stored:
            write_pt(folder / f"{component}--{suffix}", stored)
    if film:
        write_pt(folder / f"vision_backbone--{suffix}", towers(base, tensors, rank))
    return tensors | base


def towers(base: dict[str, np.ndarray], tensors: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """Wrapped towers with FiLM, and adapters whose B is not zero but in the last blocks."""
    stored, random = {}, np.random.default_rng(rank)
    for name, x in {n: x for n, x in tensors.items() if n.startswith("vision_backbone.")}.items():
        if re.fullmatch(r".*\.blocks\.\d+\.(scale|shift)\.(weight|bias)", name):
            stored[name] = x.astype(np.float32)
            continue
        wrapped = re.sub(r"(\.blocks\.\d+)\.", r"\1.block.", name)
        if not re.search(r"\.(qkv|proj|fc1|fc2|q|kv)\.(weight|bias)$", name):
            stored[wrapped] = base[name]
            continue
        stored[re.sub(r"\.(weight|bias)$", r".base_layer.\1", wrapped)] = base[name]
        if name.endswith(".bias"):
            rows, *columns = tensors[name.replace(".bias", ".weight")].shape
            for factor, shape in (("A", (rank, *columns)), ("B", (rows, rank, *[1] * (len(columns) - 1)))):
                values = random.normal(0, 0.0 if ".blocks.2." in name and factor == "B" else 0.1, shape)
                stored[wrapped.replace(".bias", f".lora_{factor}.default.weight")] = values.astype(x.dtype)
    return stored


def write_pt(path: Path, tensors: dict[str, np.ndarray]) -> None:
    path.unlink(missing_ok=True)
    writer = PtWriter(path, {name: (np.dtype(x.dtype), x.shape) for name, x in tensors.items()})
    for name, x in tensors.items():
        fill(writer.tensors[name], 0, np.ascontiguousarray(x))
    writer.finish()


def stored(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `.pt`, in memory: the file may be written anew."""
    return {name: np.array(tensor.read()) for name, tensor in read_pt(path).items()}


def change(path: Path, **changes: Any) -> None:
    """Writes a `.pt` anew with some tensors changed: name with `__` for dots = function of the tensor."""
    tensors = stored(path)
    for name, function in changes.items():
        key = name.replace("__", ".")
        tensors[key] = function(tensors[key])
    write_pt(path, tensors)


def model_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")
