"""A checkpoint back to PyTorch: the folder that the HuggingFace code of OpenVLA loads, or a Prismatic run directory."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from openvla_jax.checkpoint.contract import STATISTICS_FILE
from openvla_jax.convert import oft_export
from openvla_jax.convert.importer import finished_or_gone, new_folder
from openvla_jax.convert.names import (
    TRANSFORMS,
    ConversionError,
    Shape,
    by_leaf,
    is_stacked,
    leaf_shapes,
    source_shapes,
    table,
)
from openvla_jax.convert.progress import run_with_progress
from openvla_jax.convert.reference_files import hf_files, native_files
from openvla_jax.convert.source import NEVER_FINITE, Source, require_finite
from openvla_jax.convert.sources import open_source
from openvla_jax.convert.torch_io import Tensor
from openvla_jax.convert.torch_write import PtWriter, fill
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

    Without `dtype` every tensor keeps its stored dtype, so that an import comes back bit for bit. bfloat16 leaves alone
    what OpenVLA-OFT keeps in float32: projectors of state and noise, and FiLM. A policy that predicts a chunk at once
    becomes OpenVLA-OFT's files (`oft_export.py`), with remarks about the options that its code must be given. Tensors
    that the policy never runs and the checkpoint lacks (it was trained from scratch) are written as zeros, with a
    remark. Raises ConversionError or OSError; then `dst` is as it was.
    """
    if format not in ("hf", "prismatic") or dtype not in (None, *DTYPES):
        raise ConversionError(
            f"format {format!r}, dtype {dtype!r}: formats are hf and prismatic, dtypes {' and '.join(DTYPES)}"
        )
    dst = new_folder(dst, overwrite)
    source = open_source(src)
    source.refuse_quantized()
    _require_reference(source, format)
    tokenizer = source.contract().tokenizer
    layout: Literal["hf", "native"] = "hf" if format == "hf" else "native"
    notes = [*source.notes, *_require_leaves(source)]
    if source.model.is_parallel:
        notes += oft_export.remarks(source)
    specs = _specs(source, layout, dtype)
    fallback = source.weights.leaves["params/llama/embed/table"][0].name
    components = oft_export.component_files(source, specs) if layout == "hf" else {}
    entries = [entry for file in components.values() for entry in file.values()]
    total = sum(math.prod(shape) * d.itemsize for d, shape in [*specs.values(), *(entry[1:] for entry in entries)])
    with finished_or_gone(dst, total) as folder:
        if layout == "hf":
            _write_json(folder, hf_files(source, fallback if dtype is None else dtype))
            places, writers = oft_export.lay_out(folder, specs, components)
        else:
            files, name = native_files(source)
            _write_json(folder, files)
            (folder / "checkpoints").mkdir()
            writers = [PtWriter(folder / "checkpoints" / name, {"model": _nest(specs)})]
            places = {key.removeprefix("model."): [tensor] for key, tensor in writers[0].tensors.items()}
        _write_tensors(source, layout, places)
        for writer in writers:
            writer.finish()
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
    return notes


def _specs(source: Source, layout: str, dtype: str | None) -> dict[str, tuple[np.dtype, Shape]]:
    """Returns (dtype, shape) of every tensor of the export."""
    stored = {leaf: d for leaf, (d, _) in source.weights.leaves.items()}
    fallback = stored["params/llama/embed/table"]
    slots = table(source.model, layout)

    def chosen(name: str, leaf: str) -> np.dtype:
        if dtype is None:
            return stored.get(leaf, fallback)
        return DTYPES["float32" if oft_export.FLOAT32.match(name) else dtype]

    dtypes = {slot.source: chosen(slot.source, slot.target) for slot in slots}
    return {name: (dtypes[name], shape) for name, shape in source_shapes(slots).items()}


def _require_reference(source: Source, format: str) -> None:
    """Raises ConversionError for what the reference's code has no place for: it would act otherwise, or not load."""
    action, observation = source.action, source.observation
    if source.model.is_parallel and format == "hf":
        oft_export.check_policy(source)
        return
    wanted = {
        "action.horizon": (action.horizon, 1),
        "action.head": (action.head, "tokens"),
        "action.normalization": (action.normalization, "bounds_q99"),
        "observation.cameras": (len(observation.cameras), 1),
        "observation.state": (len(observation.state), 0),
        "model.film": (source.model.film, False),
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


def _write_tensors(source: Source, layout: str, places: Mapping[str, Sequence[Tensor]]) -> None:
    """Fills all places of each tensor, leaf by leaf, as many layers at a time as the checkpoint's chunks hold."""
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
            return sum(math.prod(slot.shape) * place.dtype.itemsize for place in places[slot.source])  # zeros there
        block, done = weights.read(leaf, first, weights.step(leaf)), 0
        for x, slot in zip(block if is_stacked(leaf) else [block], slots[leaf][first:], strict=False):
            require_finite(x, leaf, source.path)
            y = np.ascontiguousarray(TRANSFORMS[slot.transform].to_torch(x))
            for place in places[slot.source]:
                z = y.astype(place.dtype, copy=False)
                fill(place, slot.block * z.nbytes, z)
                done += z.nbytes
        return done

    total = sum(place.nbytes for group in places.values() for place in group)
    run_with_progress(copy, work, total, f"export {layout}")


def _nest(specs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`vision_backbone.x.y` -> {"vision_backbone": {"x.y": ...}}: a state dict per part of the model."""
    nested: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        part, _, rest = name.partition(".")
        nested.setdefault(part, {})[rest] = spec
    return nested


def _write_json(folder: Path, files: Mapping[str, Any]) -> None:
    """Writes JSON files byte for byte as the reference does: statistics without a newline at their end."""
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + ("" if name == STATISTICS_FILE else "\n"))
