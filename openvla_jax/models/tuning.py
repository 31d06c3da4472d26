"""What of a model is trained, and what is frozen: adapters added, path patterns, and the modes of the paper's Table 1.

A path names a parameter in the tree (`llama/blocks/attention/q/kernel`, adapters `.../q/lora/a`). A pattern is one
of a path, or of any folder above it, in the shell's notation (`*` matches slashes too): `vision`, `llama/embed`,
`*/lora`. `llama/last` is the last decoder layer, which is then split off the stack. `added` stands for the parts that a
policy has beside a pretrained model: its head's, the projectors of state and noise, and FiLM, as far as it has them.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from openvla_jax.config import TRAINABLE, LoRAConfig, VLAConfig, nearest
from openvla_jax.errors import InputError
from openvla_jax.models.linear import Linear
from openvla_jax.models.lora import LoRA, LoRAParam
from openvla_jax.models.openvla import OpenVLA, abstract_unused
from openvla_jax.models.quantize import EXCLUDE, QTensor, check_kind, choose_paths, quantize_model
from openvla_jax.models.vit import Attention, PatchEmbed

LAST = "llama/last"
ADAPTERS = TRAINABLE["lora"]
# Parts that a policy adds to a pretrained model: trained themselves, they carry no adapters.
ADDED = ("action_head", "state_projector", "noisy_projector", "*/film")
ALL_ADDED = "added"  # the pattern that stands for those that a model has
MODES: dict[str, tuple[str, ...]] = {name: tuple(patterns.split(",")) for name, patterns in TRAINABLE.items()}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Which parameters are trained (`trainable` patterns), and how the others are kept: in `frozen_dtype`, kernels as
    `quantize` integers where that is not None."""

    trainable: tuple[str, ...] = MODES["full"]
    lora: LoRAConfig | None = None
    frozen_dtype: str = "bfloat16"
    quantize: str | None = None
    quantize_exclude: tuple[str, ...] = EXCLUDE

    def __post_init__(self) -> None:
        if self.quantize is not None:
            check_kind(self.quantize)
        if self.lora is not None and self.lora.rank < 1:
            raise InputError(f"lora.rank is {self.lora.rank}: adapters need a rank of at least 1")
        if not self.trainable:
            raise InputError(f"trainable is empty: nothing would be trained; {ADAPTERS!r} trains adapters, '*' all")

    @property
    def full(self) -> bool:
        """Everything is trained: nothing is frozen, and checkpoints hold the whole model."""
        return self.lora is None and self.trainable == MODES["full"]

    @property
    def splits_last(self) -> bool:
        return any(pattern == LAST or pattern.startswith(f"{LAST}/") for pattern in self.trainable)

    @property
    def patterns(self) -> tuple[str, ...]:
        """`trainable`, with `added` replaced by what it stands for."""
        return tuple(one for pattern in self.trainable for one in (ADDED if pattern == ALL_ADDED else (pattern,)))

    def is_trainable(self, path: Iterable[Any], _: Any = None) -> bool:
        """An nnx filter."""
        return matches("/".join(map(str, path)), self.patterns)

    def prepare(self, model: OpenVLA, key: Array) -> OpenVLA:
        """The model as it is trained: last layer apart, frozen kernels quantised, adapters added; in place.

        Under `jax.eval_shape` it makes no arrays. InputError for a pattern that matches nothing, or for one that would
        train integers.
        """
        if self.splits_last:
            split_last(model)
        if self.quantize is not None:
            quantize_model(model, self.quantize, self.quantized_paths(model))
        if self.lora is not None:
            add_lora(model, self.lora, key)
        paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
        for pattern in self.trainable:
            if pattern != ALL_ADDED and not any(matches(path, [pattern]) for path in paths):
                known = nearest(pattern, folders(paths))
                raise InputError(f"trainable pattern {pattern!r} matches no parameter; {known}")
        return model

    def quantized_paths(self, model: OpenVLA) -> list[str]:
        """Kernels that are kept as integers: the frozen ones of those that quantisation chooses."""
        return [path for path in choose_paths(model, self.quantize_exclude) if not self.is_trainable(path.split("/"))]

    def split(self, model: OpenVLA) -> tuple[Any, nnx.State, nnx.State]:
        """(graph, trained, frozen) of a prepared model; frozen floats in `frozen_dtype`, others as they are."""
        graph, trained, frozen = nnx.split(model, self.is_trainable, ...)  # type: ignore[misc]
        dtype = jnp.dtype(self.frozen_dtype)
        cast = lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x
        return graph, trained, jax.tree.map(cast, frozen)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Tuning":
        """Inverse of `to_dict`, also after JSON."""
        lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list | tuple)}
        lora = None if data["lora"] is None else LoRAConfig(**data["lora"])
        return cls(**(data | lists | {"lora": lora}))


FULL = Tuning()


def matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(path, f"{p}/*") for p in patterns)


def folders(paths: Iterable[str]) -> set[str]:
    """All folders of paths."""
    return {path.rsplit("/", depth)[0] for path in paths for depth in range(1, path.count("/") + 1)}


def abstract_prepared(config: VLAConfig, tuning: Tuning, dtype=jnp.float32) -> OpenVLA:
    """The model as it is trained, as shapes."""
    make = lambda key: tuning.prepare(OpenVLA(config, key, dtype), key)
    return jax.eval_shape(make, jax.random.key(0))


def split_last(model: OpenVLA) -> None:
    """Splits off the last decoder layer, in place: a stack of one behind the others."""
    blocks: Any = model.llama.blocks
    if model.config.llama.depth < 2:
        raise InputError(f"{LAST} needs a language model of at least 2 layers: train llama instead")
    model.llama.blocks, model.llama.last = (jax.tree.map(cut, blocks) for cut in (lambda x: x[:-1], lambda x: x[-1:]))


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


def add_lora(model: OpenVLA, config: LoRAConfig, key: Array) -> None:
    """Adds adapters to the layers that `config.targets` names, in place; B is zero, so nothing changes yet."""
    run = {path: (shape, kind) for path, shape, kind in sites(model)}
    dead = {
        f"unused/{tower}/{path}": (shape, kind)
        for tower, unused in abstract_unused(model.config).items()
        for path, shape, kind in sites(unused)
    }
    if config.targets == "all":
        chosen = [path for path, (_, kind) in run.items() if kind != "patches"]
    elif config.targets == "reference":
        chosen = [*run, *dead]
    else:
        patterns = [pattern.strip() for pattern in config.targets.split(",")]
        for pattern in patterns:
            if not any(matches(path, [pattern]) for path in (*run, *dead)):
                known = {*run, *dead, *folders((*run, *dead)), "all", "reference"}
                raise InputError(f"lora.targets: {pattern!r} matches no layer; {nearest(pattern, known)}")
        chosen = [path for path in (*run, *dead) if matches(path, patterns)]
    for path in chosen:
        adapter = LoRA(key, config, path, (run | dead)[path][0])
        parts = path.split("/")
        if path in dead:
            if model.unused is None:
                model.unused = nnx.Dict()
            node: Any = model.unused
            for part in parts[1:]:
                if part not in node:
                    node[part] = nnx.Dict()
                node = node[part]
            node["lora"] = adapter
        elif run[path][1] == "qkv":
            module_at(model, parts[:-1]).qkv = nnx.Dict(lora=adapter)
        else:
            module_at(model, parts).lora = adapter


def sites(model: nnx.Module) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(path, kernel shape, kind) of the places for adapters; three input projections of a tower, or two of its pool,
    share one. Kinds: linear, qkv, patches.
    """
    shared = set()
    for keys, module in sorted(nnx.iter_modules(model), key=lambda item: (len(item[0]), list(map(str, item[0])))):
        path = "/".join(map(str, keys))
        if isinstance(module, Attention):
            *lead, rows, columns = kernel_shape(module.q)
            shared |= {f"{path}/{name}" for name in "qkv"}
            yield f"{path}/qkv", (*lead, rows, 3 * columns), "qkv"
        elif path == "pool":
            pool: Any = module
            rows, columns = kernel_shape(pool.k)
            shared |= {"pool/k", "pool/v"}
            yield "pool/kv", (rows, 2 * columns), "kv"
        elif isinstance(module, PatchEmbed):
            yield path, kernel_shape(module), "patches"
        elif isinstance(module, Linear) and path not in shared and not matches(path, ADDED):
            yield path, kernel_shape(module), "linear"


def sites_of(model: nnx.Module) -> set[str]:
    """Paths of the places that have adapters."""
    leaves = nnx.to_flat_state(nnx.state(model, LoRAParam))
    return {"/".join(map(str, path)).rpartition("/lora/")[0] for path, _ in leaves}


def kernel_shape(layer: Any) -> tuple[int, ...]:
    return (layer.kernel.values if isinstance(layer.kernel, QTensor) else layer.kernel).shape


def module_at(model: nnx.Module, path: Iterable[str]) -> Any:
    node: Any = model
    for part in path:
        node = node[part] if isinstance(node, nnx.Dict) else getattr(node, part)
    return node


def merge_tuned(model: OpenVLA) -> OpenVLA:
    """Takes adapters and a last layer apart back into the kernels, in place: added in float32, then cast."""
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, Attention) and module.qkv is not None:
            lora: LoRA = module.qkv["lora"]
            for linear, b in zip((module.q, module.k, module.v), jnp.split(lora.b[...], 3, axis=-1), strict=True):
                _add(linear, lora.a[...], b, lora.scale)
            module.qkv = nnx.data(None)
        elif isinstance(module, Linear | PatchEmbed) and module.lora is not None:
            _add(module, module.lora.a[...], module.lora.b[...], module.lora.scale)
            module.lora = nnx.data(None)
    if model.llama.last is not None:
        join = lambda first, last: jnp.concatenate([first, last.astype(first.dtype)])
        model.llama.blocks = jax.tree.map(join, model.llama.blocks, model.llama.last)
        model.llama.last = nnx.data(None)
    model.unused = nnx.data(None)
    return model


def _add(layer: Linear | PatchEmbed, a: Array, b: Array, scale: float) -> None:
    """`kernel + scale * a b`, a layer of a stack at a time: no float32 copy of a stack is made."""

    def one(kernel, a, b):
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

    assert isinstance(layer.kernel, nnx.Param), "adapters are merged into kernels, not into integers"
    kernel = layer.kernel[...]
    layer.kernel[...] = one(kernel, a, b) if kernel.ndim == 2 else jax.lax.map(lambda row: one(*row), (kernel, a, b))


# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------


def count_trainable(config: VLAConfig, tuning: Tuning) -> dict[str, int]:
    """Trained parameters by component, as the reference counts them: including a trained tower's that are never run
    (`unused/...`; they get no optimiser state here). No arrays are made.
    """
    model = abstract_prepared(config, tuning)
    counts: dict[str, int] = {}

    def add(path: str, size: int) -> None:
        parts = path.split("/")
        name = "/".join(parts[: 2 if parts[0] in ("vision", "unused") else 1])
        counts[name] = counts.get(name, 0) + size

    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if tuning.is_trainable(path):
            add("/".join(map(str, path)), math.prod(leaf.shape))
    for tower, unused in abstract_unused(config).items():
        for path, leaf in nnx.to_flat_state(nnx.state(unused, nnx.Param)):
            if tuning.is_trainable(("vision", tower, *path)):
                add(f"unused/{tower}", math.prod(leaf.shape))
    return counts


def count_adapters(config: VLAConfig, lora: LoRAConfig) -> int:
    """Parameters of the adapters alone."""
    state = nnx.state(abstract_prepared(config, Tuning(MODES["lora"], lora)), LoRAParam)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def make_graph(model: VLAConfig, dtype, tuning: Tuning) -> Any:
    """The static part of the model as it is trained; `nnx.merge(graph, params, frozen)` is the model."""
    return nnx.split(abstract_prepared(model, tuning, dtype), tuning.is_trainable, ...)[0]
