"""Adapters and what else a fine-tuning trained: from and to PEFT's files, and merged into their base."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from openvla_jax.checkpoint.base import BLOCKS, check_fingerprint, fingerprint, sample
from openvla_jax.checkpoint.contract import CheckpointError, Contract
from openvla_jax.checkpoint.reading import load_contract, open_checkpoint
from openvla_jax.config import VLAConfig
from openvla_jax.convert import peft
from openvla_jax.convert.exporter import DTYPES
from openvla_jax.convert.importer import finished_or_gone, new_folder
from openvla_jax.convert.names import ConversionError, Shape, is_stacked, leaf_shapes
from openvla_jax.convert.orbax_io import OrbaxReader, OrbaxWriter
from openvla_jax.convert.outputs import build_model, head_outputs, make_inputs
from openvla_jax.convert.progress import run_with_progress
from openvla_jax.convert.reference_files import OF_A_POLICY
from openvla_jax.convert.source import Source, require_finite
from openvla_jax.convert.sources import open_orbax, open_source
from openvla_jax.convert.staging import require_local
from openvla_jax.convert.verify import Report
from openvla_jax.models.tree import flat, nested
from openvla_jax.models.tuning import MODES, Tuning, add_lora
from openvla_jax.storage import absolute, is_remote

# Largest difference of logits that merging may make, by the dtype of the merged weights. float32 differs by the order
# of sums; bfloat16 rounds every merged kernel once.
THRESHOLDS = {"float32": 1e-4, "bfloat16": 0.25}
NUMBER_THRESHOLDS = {"float32": 1e-4, "bfloat16": 0.05}  # the same of normalised actions, or of noise


class Factors:
    """What was trained, by path, from memory; reads as `OrbaxReader` does."""

    def __init__(self, leaves: Mapping[str, np.ndarray]):
        self._leaves = {f"params/{path}": x for path, x in leaves.items()}
        self.leaves = {path: (x.dtype, x.shape) for path, x in self._leaves.items()}

    def read(self, leaf: str, first: int = 0, count: int = 1) -> np.ndarray:
        x = self._leaves[leaf]
        return x[first : first + count] if is_stacked(leaf) else x


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A fine-tuning's result without its base. `contract` is None for PEFT's."""

    path: os.PathLike
    tuning: Tuning
    weights: Factors | OrbaxReader
    contract: Contract | None = None
    copies: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def has(self, path: str) -> bool:
        return f"params/{path}" in self.weights.leaves

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """float32: one layer of a stacked leaf, or all of another."""
        x = self.weights.read(f"params/{path}", layer or 0)
        require_finite(x, path, self.path)
        return (x if layer is None else x[0]).astype(np.float32)


def open_adapter(path: str | Path, base: Source) -> Adapter:
    """An adapter of `base`: a checkpoint of a run that froze weights, or a folder of PEFT's. ConversionError or
    CheckpointError where it is none, or one of another base.
    """
    folder = Path(path)
    if not is_remote(path) and (folder / peft.CONFIG).exists():
        tuning, leaves, copies = peft.read_peft(folder, base.model)
        adapter = Adapter(folder, tuning, Factors(leaves), None, copies)
        _check_copies(adapter, base)
        return adapter
    directory = open_checkpoint(path)
    contract = load_contract(directory)
    if contract.adapter is None:
        raise ConversionError(f"{directory} is a whole model, not an adapter: there is nothing to merge")
    # A run may add a head, a state, cameras and FiLM to its base, which it then trained.
    added = {name: None for name in ("name", *OF_A_POLICY)}
    if contract.model.to_dict() | added != base.model.to_dict() | added:
        raise ConversionError(f"{directory} was trained on another model, {contract.model.name}, than {base.path}")
    check_fingerprint(source_fingerprint(base), contract.adapter, base.path, directory)
    tuning = Tuning.from_dict(dict(contract.adapter["tuning"]))
    return Adapter(directory, tuning, OrbaxReader(directory, ("params",)), contract)


def source_fingerprint(source: Source) -> str:
    """`checkpoint.base.fingerprint` of weights on disk, some layers at a time."""
    samples = {}
    for leaf, (_, shape) in source.weights.leaves.items():
        if leaf.startswith("params/"):
            step = source.weights.step(leaf)
            firsts = range(0, shape[0], step) if is_stacked(leaf) else [0]
            parts = [sample(source.weights.read(leaf, first, step), is_stacked(leaf)) for first in firsts]
            samples[leaf.removeprefix("params/")] = np.concatenate(parts)
    return fingerprint(samples)


def _check_copies(adapter: Adapter, base: Source) -> None:
    """PEFT saves the base's output head beside its adapter: it shows whether the base is the right one."""
    known = peft.modules(base.model)
    for name, tensor in adapter.copies.items():
        kernel = base.weights.read(f"params/{known[name].path}/kernel")
        if not np.array_equal(tensor.read().T.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)):
            raise ConversionError(
                f"{adapter.path} was trained on another base: its copy of {name} is not that of {base.path}: "
                "name the base that it was trained on"
            )


# ---------------------------------------------------------------------------------------------------------------------
# PEFT's files
# ---------------------------------------------------------------------------------------------------------------------


def import_adapter(src: str | Path, dst: str | Path, base: str | Path, overwrite: bool = False) -> None:
    """PEFT's adapter at `src` as a checkpoint `dst` that is used with the Orbax checkpoint `base`."""
    dst = new_folder(dst, overwrite)
    source = open_source(base)
    if source.kind != "orbax":
        raise ConversionError(f"{base} is no checkpoint of this project: import it first, then the adapter on it")
    adapter = open_adapter(require_local(src, "PEFT's folder"), source)
    assert isinstance(adapter.weights, Factors)
    contract = load_contract(source.path)
    info = {"base": os.fspath(absolute(source.path)), "fingerprint": source_fingerprint(source)}
    contract = dataclasses.replace(contract, adapter=info | {"tuning": adapter.tuning.to_dict()})
    nbytes = sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in adapter.weights.leaves.values())
    with finished_or_gone(dst, nbytes) as folder:
        writer = OrbaxWriter(folder)
        for leaf, (dtype, shape) in adapter.weights.leaves.items():
            writer.create(leaf, shape, dtype)
            for layer in range(shape[0]) if is_stacked(leaf) else [None]:
                writer.write(leaf, layer, adapter.read(leaf.removeprefix("params/"), layer))
        (folder / "contract").mkdir()
        contract.save(folder / "contract")
        writer.finish()


def export_adapter(src: str | Path, dst: str | Path, overwrite: bool = False) -> None:
    """A checkpoint of adapters as the folder that PEFT loads onto the exported base."""
    dst = new_folder(dst, overwrite)
    directory = open_checkpoint(src)
    contract = load_contract(directory)
    tuning = Tuning.from_dict(dict((contract.adapter or {})["tuning"]))
    if tuning.lora is None or tuning.trainable != MODES["lora"]:
        raise ConversionError(
            f"{directory} trained {', '.join(tuning.trainable)}: PEFT's files hold adapters only; merge it instead"
        )
    reader = OrbaxReader(directory, ("params",))
    leaves = {}
    for leaf, (_, shape) in reader.leaves.items():
        leaves[leaf.removeprefix("params/")] = x = reader.read(leaf, 0, shape[0])
        require_finite(x, leaf, directory)
    nbytes = sum(x.nbytes for x in leaves.values())
    with finished_or_gone(dst, nbytes) as folder:
        peft.write_peft(folder, contract.model, tuning, leaves, str((contract.adapter or {})["base"]))


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is a checkpoint that holds only what was trained."""
    try:
        return load_contract(path).adapter is not None
    except CheckpointError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


def merge_weights(
    base: str | Path,
    adapter: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    threshold: float | None = None,
    overwrite: bool = False,
    seed: int = 0,
) -> Report:
    """Writes `base` with what `adapter` trained as the checkpoint `dst`, some layers at a time.

    It is added in float32, then cast to `dtype` (default: as the base is stored).

    Where there are adapters, logits of the base with adapters beside it and of the merged weights are compared on
    seeded inputs; past `threshold` (default: `THRESHOLDS`) it raises ConversionError, and `dst` is as it was.
    """
    dst = new_folder(dst, overwrite)
    if dtype not in (None, *DTYPES):
        raise ConversionError(f"dtype {dtype!r}: {' or '.join(DTYPES)}")
    source = open_source(base)
    trained = open_adapter(adapter, source)
    contract = dataclasses.replace(trained.contract or source.contract(), adapter=None)
    leaves = source.weights.leaves | _added_leaves(source, trained, contract.model)
    dtypes = {leaf: DTYPES[dtype] if dtype else stored for leaf, (stored, _) in leaves.items()}
    total = sum(int(np.prod(shape)) * dtypes[leaf].itemsize for leaf, (_, shape) in leaves.items())
    with finished_or_gone(dst, total) as folder:
        writer = OrbaxWriter(folder)
        work = []
        for leaf, (_, shape) in leaves.items():
            writer.create(leaf, shape, dtypes[leaf])
            work += [(leaf, layer) for layer in (range(shape[0]) if is_stacked(leaf) else [None])]

        def copy(item: tuple[str, int | None]) -> int:
            x = merged_leaf(source, trained, *item).astype(dtypes[item[0]])
            require_finite(x, item[0], source.path)
            writer.write(*item, x)
            return x.nbytes

        run_with_progress(copy, work, total, f"merge {dst.name}")
        (folder / "contract").mkdir()
        contract.save(folder / "contract")
        writer.finish()
        if trained.tuning.lora is None:
            return Report(("no adapters: trained weights were copied",), ())
        report = _check_merged(source, trained, open_orbax(folder), threshold, seed)
        if not report.passed:
            raise ConversionError(f"{'; '.join(report.failures)}: raise --threshold if that is meant")
    return report


def _added_leaves(base: Source, adapter: Adapter, model: VLAConfig) -> dict[str, tuple[np.dtype, Shape]]:
    """(dtype, shape) of the parts that a run added to its base: head, projectors, FiLM."""
    added = [leaf for leaf in leaf_shapes(model) if leaf.startswith("params/") and leaf not in base.weights.leaves]
    return {leaf: adapter.weights.leaves[leaf] for leaf in added}


def merged_leaf(base: Source, adapter: Adapter, leaf: str, layer: int | None) -> np.ndarray:
    """A layer of a stacked leaf of the base, or all of another one, with what the adapter makes of it."""
    path = leaf.removeprefix("params/")
    if leaf not in base.weights.leaves:
        return adapter.read(path, layer)
    x = base.weights.read(leaf) if layer is None else base.weights.read(leaf, layer)[0]
    last = path.replace(f"{BLOCKS}/", "llama/last/", 1)
    if layer is not None and path.startswith(f"{BLOCKS}/") and adapter.has(last):
        depth = base.model.llama.depth
        if layer == depth - 1:
            return adapter.read(last)[0]
    elif adapter.has(path):
        return adapter.read(path, layer)
    if not path.endswith("/kernel"):
        return x
    place = path.removesuffix("/kernel")
    for site, block, blocks in _places(place):
        if adapter.has(f"{site}/lora/a"):
            a, b = adapter.read(f"{site}/lora/a", layer), adapter.read(f"{site}/lora/b", layer)
            assert adapter.tuning.lora is not None
            b = np.split(b, blocks, axis=-1)[block]
            return x.astype(np.float32) + adapter.tuning.lora.scale * (a @ b)
    return x


def _places(place: str) -> list[tuple[str, int, int]]:
    """(place of an adapter, its column block, of how many) for a kernel: its own, or one that it shares."""
    parent, _, name = place.rpartition("/")
    shared = [(f"{parent}/{fused}", fused.index(name), len(fused)) for fused in ("qkv", "kv") if name in fused]
    return [(place, 0, 1), *(shared if len(name) == 1 else [])]


def _check_merged(base: Source, adapter: Adapter, merged: Source, threshold: float | None, seed: int) -> Report:
    """What one pass gives before and after, one model in memory at a time."""
    if threshold is None:
        names = {dtype.name for dtype, _ in merged.weights.leaves.values()}
        kinds = NUMBER_THRESHOLDS if merged.action.is_continuous else THRESHOLDS
        threshold = kinds["float32" if names == {"float32"} else "bfloat16"]
    inputs = make_inputs(merged, seed)
    before, after = (
        head_outputs(*parts(), merged, inputs)
        for parts in (lambda: build_adapted(base, adapter, merged.model), lambda: build_model(merged))
    )
    difference = float(np.abs(before - after).max())
    what = {"l1": "action chunks", "diffusion": "predicted noise"}.get(merged.action.head, "logits")
    line = f"{what}, adapters beside the base and merged: max |d| {difference:.3g} (threshold {threshold:g})"
    if what == "logits":
        agreement = float((before.argmax(-1) == after.argmax(-1)).mean())
        places = "text positions" if before.ndim == 2 else "action slots"
        line = line.replace(what, f"{what} at {before[..., 0].size} {places}") + f", argmax agreement {agreement:.2%}"
    failures = [f"{what} differ by {difference:.3g} after merging, beyond {threshold:g}"]
    return Report((line,), () if difference <= threshold else tuple(failures), difference)


def build_adapted(source: Source, adapter: Adapter, merged: VLAConfig) -> tuple[Any, Any]:
    """(graphdef, state) of the base with the adapters beside its kernels, and trained leaves in place of its own, as
    the model `merged` has them.
    """
    graph, state = build_model(dataclasses.replace(source, model=merged))
    model = nnx.merge(graph, state)
    assert adapter.tuning.lora is not None
    add_lora(model, adapter.tuning.lora, jax.random.key(0))
    graph, state = nnx.split(model)
    leaves = flat(nnx.to_pure_dict(state))
    for path in (leaf.removeprefix("params/") for leaf in adapter.weights.leaves):
        whole = path.replace("llama/last/", f"{BLOCKS}/", 1)
        x = jnp.asarray(adapter.weights.read(f"params/{path}", 0, leaves[whole].shape[0]))
        leaves[whole] = x if whole == path else jnp.concatenate([leaves[whole][:-1].astype(jnp.float32), x])
    nnx.replace_by_pure_dict(state, nested(leaves))
    return graph, state
