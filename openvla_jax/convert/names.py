"""The one table of names: which tensor of a PyTorch checkpoint is which leaf of the parameter tree.

It is used in both directions. A `Slot` joins a tensor, or one of the equal row blocks of a fused tensor, to one leaf,
or to one layer of a stacked leaf, by a named transform. Leaves are spelled `params/llama/blocks/attention/q/kernel`
for what the policy runs and `unused/dino/norm/scale` for reference tensors that it never runs.

Layouts: `hf` is the reference's HuggingFace class, `native` its own training checkpoints (flattened with dots).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from openvla_jax.config import VLAConfig
from openvla_jax.errors import InputError
from openvla_jax.models.openvla import abstract_model, abstract_unused

LAYOUTS = ("hf", "native")
Shape = tuple[int, ...]


class ConversionError(InputError):
    """A conversion that must not go on; the message says what, where and how to mend it."""


# ---------------------------------------------------------------------------------------------------------------------
# Transforms: PyTorch's arrangement of a tensor <-> the tree's
# ---------------------------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    to_tree: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]
    torch_shape: Callable[[Shape], Shape]


def _transpose(x: np.ndarray) -> np.ndarray:
    """Contiguous transpose of a matrix, several times faster than NumPy's own on matrices that no cache holds.

    Neighbours in a row move together, as one 8-byte word, in blocks; then each word's parts go to their rows.
    """
    bits = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")
    lanes = 8 // x.dtype.itemsize
    if bits.shape[1] % lanes:
        return np.ascontiguousarray(bits.T).view(x.dtype)
    words = bits.view(np.uint64)
    out = np.empty(bits.shape[::-1], bits.dtype)
    for i in range(0, len(words), 128):
        band = np.empty((words.shape[1], len(words[i : i + 128])), np.uint64)
        for j in range(0, len(band), 64):
            band[j : j + 64] = words[i : i + 128, j : j + 64].T
        parts = band.view(bits.dtype).reshape(*band.shape, lanes)
        for lane in range(lanes):
            out[lane::lanes, i : i + 128] = parts[:, :, lane]
    return out.view(x.dtype)


def _patch_shape(tree: Shape) -> Shape:
    """[height * width * 3, D] -> [D, 3, height, width]"""
    size = math.isqrt(tree[0] // 3)
    return tree[1], 3, size, size


TRANSFORMS = {
    "keep": Transform(lambda x: x, lambda x: x, lambda shape: shape),
    "squeeze": Transform(lambda x: x[0], lambda x: x[None], lambda shape: (1, *shape)),
    "transpose": Transform(_transpose, _transpose, lambda shape: shape[::-1]),
    "patches": Transform(  # convolution [D, 3, height, width] <-> product [(height, width, 3), D]
        lambda x: np.ascontiguousarray(x.transpose(2, 3, 1, 0)).reshape(-1, len(x)),
        lambda x: np.ascontiguousarray(x.reshape(_patch_shape(x.shape)[2:] + (3, -1)).transpose(3, 2, 0, 1)),
        _patch_shape,
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

# (PyTorch name, tree path, transform); a comma lists the equal row blocks of a fused tensor. Rows whose path a model
# lacks (registers, LayerScale, the pool) do not apply to it. The order is that of the reference's state dict.
Rows = tuple[tuple[str, str, str], ...]


def _weight_and_bias(torch: str, tree: str) -> Rows:
    kernels, biases = (",".join(f"{t}/{leaf}" for t in tree.split(",")) for leaf in ("kernel", "bias"))
    return (f"{torch}.weight", kernels, "transpose"), (f"{torch}.bias", biases, "keep")


def _norm(torch: str, tree: str) -> Rows:
    return (f"{torch}.weight", f"{tree}/scale", "keep"), (f"{torch}.bias", f"{tree}/bias", "keep")


VIT_STEM: Rows = (
    ("cls_token", "class_token", "squeeze"),
    ("reg_token", "registers", "squeeze"),
    ("pos_embed", "position", "squeeze"),
    ("patch_embed.proj.weight", "patch_embed/kernel", "patches"),
    ("patch_embed.proj.bias", "patch_embed/bias", "keep"),
    *_norm("norm_pre", "pre_norm"),
)
VIT_BLOCK: Rows = (
    *_norm("norm1", "norm1"),
    *_weight_and_bias("attn.qkv", "attention/q,attention/k,attention/v"),
    *_weight_and_bias("attn.proj", "attention/o"),
    ("ls1.{gamma}", "scale1", "keep"),
    *_norm("norm2", "norm2"),
    *_weight_and_bias("mlp.fc1", "mlp/up"),
    *_weight_and_bias("mlp.fc2", "mlp/down"),
    ("ls2.{gamma}", "scale2", "keep"),
    *_weight_and_bias("scale", "film/scale"),
    *_weight_and_bias("shift", "film/shift"),
)
VIT_UNUSED: Rows = (
    *_norm("norm", "norm"),
    ("attn_pool.latent", "pool/latent", "squeeze"),
    *_weight_and_bias("attn_pool.q", "pool/q"),
    *_weight_and_bias("attn_pool.kv", "pool/k,pool/v"),
    *_weight_and_bias("attn_pool.proj", "pool/o"),
    *_norm("attn_pool.norm", "pool/norm"),
    *_weight_and_bias("attn_pool.mlp.fc1", "pool/mlp/up"),
    *_weight_and_bias("attn_pool.mlp.fc2", "pool/mlp/down"),
)
LLAMA_BLOCK: Rows = (
    ("self_attn.q_proj.weight", "attention/q/kernel", "transpose"),
    ("self_attn.k_proj.weight", "attention/k/kernel", "transpose"),
    ("self_attn.v_proj.weight", "attention/v/kernel", "transpose"),
    ("self_attn.o_proj.weight", "attention/o/kernel", "transpose"),
    ("mlp.gate_proj.weight", "mlp/gate/kernel", "transpose"),
    ("mlp.up_proj.weight", "mlp/up/kernel", "transpose"),
    ("mlp.down_proj.weight", "mlp/down/kernel", "transpose"),
    ("input_layernorm.weight", "norm1/scale", "keep"),
    ("post_attention_layernorm.weight", "norm2/scale", "keep"),
)
# What OpenVLA-OFT adds, in files beside the model; "{head}" is where its head keeps the MLP.
OFT_PARTS: Rows = (
    *_norm("action_head.{head}.layer_norm1", "action_head/norm1"),
    *_weight_and_bias("action_head.{head}.fc1", "action_head/fc1"),
    *(
        row
        for i in (0, 1)
        for row in (
            *_norm(f"action_head.{{head}}.mlp_resnet_blocks.{i}.ffn.0", f"action_head/residuals/{i}/norm"),
            *_weight_and_bias(f"action_head.{{head}}.mlp_resnet_blocks.{i}.ffn.1", f"action_head/residuals/{i}/fc"),
        )
    ),
    *_norm("action_head.{head}.layer_norm2", "action_head/norm2"),
    *_weight_and_bias("action_head.{head}.fc2", "action_head/fc2"),
    *_weight_and_bias("proprio_projector.fc1", "state_projector/fc1"),
    *_weight_and_bias("proprio_projector.fc2", "state_projector/fc2"),
    *_weight_and_bias("noisy_action_projector.fc1", "noisy_projector/fc1"),
    *_weight_and_bias("noisy_action_projector.fc2", "noisy_projector/fc2"),
)
# Buffers of old checkpoints that hold no weights.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
TIED = "; if it is tied to the embedding, save a copy of the embedding under this name"


@dataclasses.dataclass(frozen=True)
class Slot:
    """Row block `block` of `blocks` of the tensor `source` <-> the leaf `target`, or its layer `layer`."""

    source: str
    block: int
    blocks: int
    target: str
    layer: int | None
    transform: str
    shape: Shape  # of the row block, in PyTorch's arrangement

    @property
    def source_shape(self) -> Shape:
        return (self.shape[0] * self.blocks, *self.shape[1:])


@functools.cache
def leaf_shapes(config: VLAConfig) -> dict[str, Shape]:
    """Shapes of all leaves of a model, `params/...` and `unused/...`; no arrays are made."""

    def flat(prefix: str, module: object) -> dict[str, Shape]:
        leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))[0]
        return {
            f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf.shape for path, leaf in leaves
        }

    shapes = flat("params", abstract_model(config))
    for name, module in abstract_unused(config).items():
        shapes |= flat(f"unused/{name}", module)
    return shapes


def is_stacked(leaf: str) -> bool:
    """Whether a leaf has a leading axis of layers."""
    return "/blocks/" in leaf


def tower_prefix(config: VLAConfig, index: int, layout: str) -> str:
    """What the names of a tower's tensors begin with."""
    if layout == "hf":
        return ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")[index]
    return (
        f"vision_backbone.{config.towers[index].name}_featurizer."
        if len(config.towers) > 1
        else "vision_backbone.featurizer."
    )


def table(config: VLAConfig, layout: str) -> list[Slot]:
    """All slots of a model in a layout, in the order of the reference's state dict."""
    shapes = leaf_shapes(config)
    slots: list[Slot] = []
    gamma = "scale_factor" if layout == "hf" else "gamma"
    head = "noise_predictor.mlp_resnet" if config.head == "diffusion" else "model"

    def add(rows: Rows, source: str, target: str, layer: int | None = None) -> None:
        for name, paths, transform in rows:
            targets = [f"{target}/{path}" for path in paths.split(",")]
            for block, leaf in enumerate(targets):
                if leaf not in shapes:
                    continue
                shape = shapes[leaf] if layer is None else shapes[leaf][1:]
                torch = TRANSFORMS[transform].torch_shape(shape)
                full_name = source + name.replace("{gamma}", gamma).replace("{head}", head)
                slots.append(Slot(full_name, block, len(targets), leaf, layer, transform, torch))

    for index, tower in enumerate(config.towers):
        prefix, run, unused = tower_prefix(config, index, layout), f"params/vision/{tower.name}", f"unused/{tower.name}"
        add(VIT_STEM, prefix, run)
        for layer in range(tower.depth - 1):
            add(VIT_BLOCK, f"{prefix}blocks.{layer}.", f"{run}/blocks", layer)
        add(VIT_BLOCK, f"{prefix}blocks.{tower.depth - 1}.", f"{unused}/block")
        add(VIT_UNUSED, prefix, unused)
    for i in (1, 2, 3):
        native = "projector.projector" if config.projector.kind == "linear" else f"projector.projector.{2 * (i - 1)}"
        add(_weight_and_bias(f"projector.fc{i}" if layout == "hf" else native, f"projector/fc{i}"), "", "params")
    llama = "language_model." if layout == "hf" else "llm_backbone.llm."
    add((("model.embed_tokens.weight", "embed/table", "keep"),), llama, "params/llama")
    for layer in range(config.llama.depth):
        add(LLAMA_BLOCK, f"{llama}model.layers.{layer}.", "params/llama/blocks", layer)
    add((("model.norm.weight", "norm/scale", "keep"),), llama, "params/llama")
    add((("lm_head.weight", "head/kernel", "transpose"),), llama, "params/llama")
    add(OFT_PARTS, "", "params")

    assert {slot.target for slot in slots} == set(shapes), set(shapes) ^ {slot.target for slot in slots}
    return slots


def by_leaf(slots: Iterable[Slot]) -> dict[str, list[Slot]]:
    """Slots of each leaf, in the order of its layers."""
    leaves: dict[str, list[Slot]] = {}
    for slot in slots:
        leaves.setdefault(slot.target, []).append(slot)
    return leaves


def source_shapes(slots: Iterable[Slot]) -> dict[str, Shape]:
    """Shape of every tensor of the PyTorch checkpoint, in order."""
    return {slot.source: slot.source_shape for slot in slots}


def canonical_names(names: Iterable[str], layout: str) -> dict[str, str]:
    """LayerScale is `gamma` in some files and `scale_factor` in others, in either layout: {name as in the table:
    name}.
    """
    wanted, other = ("scale_factor", "gamma") if layout == "hf" else ("gamma", "scale_factor")
    return {
        re.sub(rf"\.ls([12])\.{other}$", rf".ls\1.{wanted}", name): name for name in names if not IGNORED.search(name)
    }


def check(slots: Iterable[Slot], tensors: Mapping[str, Any], where: str) -> None:
    """Raises with every difference at once unless tensors and slots match one to one, in shape and (per leaf) dtype.

    `tensors` have `shape` and `dtype`.
    """
    wanted = source_shapes(slots)
    problems = [
        f"{name}: missing, shape {list(shape)} is wanted{TIED if name.endswith('lm_head.weight') else ''}"
        for name, shape in wanted.items()
        if name not in tensors
    ]
    problems += [f"{name}: not part of this model" for name in tensors if name not in wanted]
    for name, shape in wanted.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            problems.append(f"{name}: shape {list(tensors[name].shape)}, wanted {list(shape)}")
    for leaf, group in by_leaf(slots).items():
        dtypes = {str(tensors[slot.source].dtype): slot.source for slot in group if slot.source in tensors}
        if len(dtypes) > 1:
            problems.append(
                f"{leaf}: layers of different dtypes, {', '.join(f'{n} is {d}' for d, n in dtypes.items())}"
            )
    for name, tensor in tensors.items():
        if name in wanted and str(tensor.dtype) not in ("float32", "bfloat16", "float16"):
            problems.append(f"{name}: dtype {tensor.dtype}, wanted float32, bfloat16 or float16")
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConversionError(f"{where}: {len(problems)} tensors do not fit the model:\n{listed}")
