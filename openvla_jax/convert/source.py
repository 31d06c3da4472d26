"""What every source of weights offers to the converter."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from openvla_jax.checkpoint.contract import Contract
from openvla_jax.config import VLAConfig
from openvla_jax.convert.names import (
    TRANSFORMS,
    ConversionError,
    Shape,
    Slot,
    by_leaf,
    canonical_names,
    check,
    leaf_shapes,
    table,
)
from openvla_jax.convert.orbax_io import OrbaxReader
from openvla_jax.convert.torch_io import BFLOAT16, E4M3, E5M2
from openvla_jax.types import ActionSpec, ObservationSpec, Preprocessing

NEVER_FINITE = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}  # the exponent bits of NaN and infinity


@dataclasses.dataclass(frozen=True)
class Made:
    """A tensor that is computed, not stored, when it is read."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def _without_float8(tensors: Mapping[str, Any], leaves: Mapping[str, Sequence[Slot]]) -> dict[str, Any]:
    """Returns the tensors with float8 as the type of the leaf's other layers, or bfloat16: each holds its values."""
    wide = dict(tensors)
    for slots in leaves.values():
        found = [tensors[slot.source] for slot in slots if slot.source in tensors]
        small = {tensor.dtype for tensor in found} & {E4M3, E5M2}
        dtype = next((tensor.dtype for tensor in found if tensor.dtype not in small), BFLOAT16)
        for slot in slots if small else ():
            tensor = tensors.get(slot.source)
            if tensor is not None and tensor.dtype in small:
                wide[slot.source] = Made(tensor.shape, dtype, functools.partial(_cast, tensor, dtype))
    return wide


def _cast(tensor: Any, dtype: np.dtype) -> np.ndarray:
    return tensor.read().astype(dtype)


class TorchWeights:
    """Leaves of the tree, read from a PyTorch checkpoint, which is checked one to one against the table of names."""

    def __init__(self, config: VLAConfig, layout: str, tensors: Mapping[str, Any], where: str):
        self.slots = table(config, layout)
        self._by_leaf = by_leaf(self.slots)
        named = canonical_names(tensors, layout)
        self.tensors = _without_float8({name: tensors[original] for name, original in named.items()}, self._by_leaf)
        check(self.slots, self.tensors, where)
        self.leaves: dict[str, tuple[np.dtype, Shape]] = {}
        shapes = leaf_shapes(config)
        for leaf, slots in self._by_leaf.items():
            self.leaves[leaf] = self.tensors[slots[0].source].dtype, shapes[leaf]

    def read_slot(self, slot: Slot) -> np.ndarray:
        rows = slot.shape[0]
        block = self.tensors[slot.source].read()[slot.block * rows : (slot.block + 1) * rows]
        return TRANSFORMS[slot.transform].to_tree(block)

    def step(self, leaf: str) -> int:
        """Layers of a stacked leaf to be read at a time."""
        return 1

    def read(self, leaf: str, first: int = 0, count: int = 1) -> np.ndarray:
        """Layers first..first + count of a stacked leaf, or all of another one."""
        slots = self._by_leaf[leaf]
        if slots[0].layer is None:
            return np.asarray(self.read_slot(slots[0]))
        return np.stack([self.read_slot(slot) for slot in slots[first : first + count]])


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights and everything that is known about them; `tokenizer` is a folder or None."""

    kind: Literal["hf", "native", "orbax", "parts"]
    path: os.PathLike  # where it is; a bucket's, though its copy is read
    model: VLAConfig
    weights: TorchWeights | OrbaxReader
    statistics: Mapping[str, Any]
    tokenizer: os.PathLike | None
    preprocessing: Preprocessing
    origin: Mapping[str, Any]  # what a checkpoint keeps about where it came from
    notes: Sequence[str] = ()
    observation: ObservationSpec = dataclasses.field(default_factory=ObservationSpec)
    action: ActionSpec = dataclasses.field(default_factory=ActionSpec)

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.weights.leaves.values())

    @property
    def quantized(self) -> str | None:
        """The integers' type of a checkpoint that was saved quantised."""
        leaves = self.weights.leaves.items()
        return next((dtype.name for leaf, (dtype, _) in leaves if leaf.endswith("/values")), None)

    def refuse_quantized(self) -> None:
        """Raises ConversionError for a checkpoint that was saved quantised."""
        if self.quantized:
            raise ConversionError(
                f"{self.path} is {self.quantized}, which has no PyTorch form: name the checkpoint that it was made "
                "from; `python -m openvla_jax.evaluate quantization` compares their actions"
            )

    def contract(self) -> Contract:
        """Returns the contract of a checkpoint with these weights. Raises ConversionError for a foreign tokenizer."""
        from openvla_jax.tokens.tokenizer import load_tokenizer

        tokenizer = None if self.tokenizer is None else load_tokenizer(self.tokenizer)
        if tokenizer is not None and tokenizer.pad_token_id != self.model.pad_token:
            raise ConversionError(
                f"{self.tokenizer}: its pad token is {tokenizer.pad_token_id}, the model's {self.model.pad_token}: "
                "it is the tokenizer of another model"
            )
        return Contract(
            self.model, tokenizer, self.statistics, self.observation, self.action, self.preprocessing,
            training={"source": dict(self.origin)},
        )  # fmt: skip


def require_finite(x: np.ndarray, name: str, where: object) -> None:
    """Raises unless every value is a number; looks at exponent bits, in blocks that fit a cache."""
    if x.dtype.name not in NEVER_FINITE:
        raise ConversionError(
            f"{where}: {name} has type {x.dtype.name}, which is not supported; save it as float32, bfloat16 or float16"
        )
    limit = NEVER_FINITE[x.dtype.name]
    bits = np.ascontiguousarray(x).reshape(-1).view(f"u{x.dtype.itemsize}")
    mask = bits.dtype.type((1 << (8 * x.dtype.itemsize - 1)) - 1)
    for start in range(0, bits.size, 1 << 19):
        if (bits[start : start + (1 << 19)] & mask).max() >= limit:
            raise ConversionError(
                f"{where}: {name} holds NaN or infinity: the checkpoint is damaged, or its training diverged"
            )
