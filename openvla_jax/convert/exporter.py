"""A checkpoint back to PyTorch: the folder that the HuggingFace code of OpenVLA loads, or a Prismatic run directory."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from openvla_jax.convert.importer import (
    NEVER_FINITE,
    finished_or_gone,
    new_folder,
    require_finite,
)
from openvla_jax.convert.names import (
    TRANSFORMS,
    ConversionError,
    by_leaf,
    is_stacked,
    leaf_shapes,
    source_shapes,
    table,
)
from openvla_jax.convert.progress import run_with_progress
from openvla_jax.convert.reference_files import hf_files, native_files
from openvla_jax.convert.source import Source
from openvla_jax.convert.sources import open_source
from openvla_jax.convert.torch_io import Tensor
from openvla_jax.convert.torch_write import PtWriter, fill, lay_out_safetensors
from openvla_jax.tokens.tokenizer import save_tokenizer

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def export_weights(
    src: str | Path,
    dst: str | Path,
    *,
    format: Literal["hf", "prismatic"] = "hf",
    dtype: Literal["float32", "bfloat16"] | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes the checkpoint `src`, here or in a bucket, for the reference's PyTorch code; returns remarks.

    `dst` appears when it is complete.

    Without `dtype` every tensor keeps its stored dtype, so that an import comes back bit for bit. Tensors that the
    policy never runs and the checkpoint lacks (it was trained from scratch) are written as zeros, with a remark. Raises
    ConversionError or OSError; then `dst` is as it was.
    """
    if format not in ("hf", "prismatic") or dtype not in (None, *DTYPES):
        raise ConversionError(
            f"format {format!r}, dtype {dtype!r}: formats are hf and prismatic, dtypes {' and '.join(DTYPES)}"
        )
    dst = new_folder(dst, overwrite)
    source = open_source(src)
    source.refuse_quantized()
    _require_reference(source)
    tokenizer = source.contract().tokenizer
    layout: Literal["hf", "native"] = "hf" if format == "hf" else "native"
    notes = [*source.notes, *_require_leaves(source)]
    stored = {leaf: d for leaf, (d, _) in source.weights.leaves.items()}
    fallback = stored["params/llama/embed/table"]
    slots = table(source.model, layout)
    dtypes = {slot.source: DTYPES[dtype] if dtype else stored.get(slot.target, fallback) for slot in slots}
    specs = {name: (dtypes[name], shape) for name, shape in source_shapes(slots).items()}
    total = sum(math.prod(shape) * d.itemsize for d, shape in specs.values())
    with finished_or_gone(dst, total) as folder:
        if layout == "hf":
            _write_json(folder, hf_files(source, fallback.name if dtype is None else dtype))
            _write_tensors(source, layout, lay_out_safetensors(folder, specs), total)
        else:
            files, name = native_files(source)
            _write_json(folder, files)
            (folder / "checkpoints").mkdir()
            writer = PtWriter(folder / "checkpoints" / name, {"model": _nest(specs)})
            _write_tensors(source, layout, {key.removeprefix("model."): t for key, t in writer.tensors.items()}, total)
            writer.finish()
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
    return notes


def _require_reference(source: Source) -> None:
    """Raises ConversionError for what the reference's code has no place for: it would act otherwise, or not load."""
    action, observation = source.action, source.observation
    wanted = {
        "action.horizon": (action.horizon, 1),
        "action.head": (action.head, "tokens"),
        "action.normalization": (action.normalization, "bounds_q99"),
        "observation.cameras": (len(observation.cameras), 1),
        "observation.state": (len(observation.state), 0),
    }
    for name, (found, only) in wanted.items():
        if found != only:
            raise ConversionError(
                f"{source.path}: {name} is {found!r}, and OpenVLA's PyTorch code knows {only!r} alone; such a policy "
                "cannot be exported, serve it from here"
            )


def _require_leaves(source: Source) -> list[str]:
    """Raises with all differences between a checkpoint and its model; remarks on unused leaves that it lacks."""
    held, wanted = source.weights.leaves, leaf_shapes(source.model)
    problems = [f"{leaf} is missing" for leaf in wanted if leaf not in held and not leaf.startswith("unused/")]
    problems += [f"{leaf} is not part of the model" for leaf in held if leaf not in wanted]
    problems += [
        f"{leaf} has shape {held[leaf][1]}, wanted {wanted[leaf]}" for leaf in held if held[leaf][1] != wanted.get(leaf)
    ]
    problems += [f"{leaf} is {dtype}" for leaf, (dtype, _) in held.items() if dtype.name not in NEVER_FINITE]
    if problems:
        raise ConversionError(
            f"{source.path} does not fit its model:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    missing = [leaf for leaf in wanted if leaf not in held]
    return [f"{len(missing)} leaves that no policy runs are not in the checkpoint: written as zeros"] if missing else []


def _write_tensors(source: Source, layout: str, tensors: Mapping[str, Tensor], total: int) -> None:
    """Fills all tensors, leaf by leaf, as many layers at a time as the checkpoint's chunks hold."""
    weights, slots = source.weights, by_leaf(table(source.model, layout))
    work = [
        (leaf, first)
        for leaf, group in slots.items()
        for first in range(0, len(group), weights.step(leaf) if leaf in weights.leaves else 1)
    ]

    def copy(item: tuple[str, int]) -> int:
        leaf, first = item
        if leaf not in weights.leaves:
            slot = slots[leaf][first]
            return math.prod(slot.shape) * tensors[slot.source].dtype.itemsize  # the file is zeros there
        block, done = weights.read(leaf, first, weights.step(leaf)), 0
        for x, slot in zip(block if is_stacked(leaf) else [block], slots[leaf][first:], strict=False):
            require_finite(x, leaf, source.path)
            y = np.ascontiguousarray(TRANSFORMS[slot.transform].to_torch(x)).astype(
                tensors[slot.source].dtype, copy=False
            )
            fill(tensors[slot.source], slot.block * y.nbytes, y)
            done += y.nbytes
        return done

    run_with_progress(copy, work, total, f"export {layout}")


def _nest(specs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`vision_backbone.x.y` -> {"vision_backbone": {"x.y": ...}}: a state dict per part of the model."""
    nested: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        part, _, rest = name.partition(".")
        nested.setdefault(part, {})[rest] = spec
    return nested


def _write_json(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
