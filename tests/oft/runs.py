"""The training goldens of OpenVLA-OFT as models, states and batches of this project."""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from oft.cases import FOLDER, imported_base, settings

from openvla_jax.checkpoint.load import load_model
from openvla_jax.config import LoRAConfig, VLAConfig
from openvla_jax.convert.names import TRANSFORMS, table
from openvla_jax.convert.oft import PLATFORMS
from openvla_jax.convert.peft import _to_tree, modules
from openvla_jax.convert.torch_io import read_pt
from openvla_jax.models.tree import flat, nested, refill
from openvla_jax.models.tuning import ALL_ADDED, MODES, Tuning, abstract_prepared
from openvla_jax.types import ActionSpec, Batch

CLASSES = {
    "L1RegressionActionHead/": "action_head.",
    "DiffusionActionHead/": "action_head.",
    "ProprioProjector/": "proprio_projector.",
    "NoisyActionProjector/": "noisy_action_projector.",
}
COMPONENTS = {
    "L1RegressionActionHead": "action_head",
    "DiffusionActionHead": "action_head",
    "ProprioProjector": "proprio_projector",
    "NoisyActionProjector": "noisy_action_projector",
}


def head_of(options: dict[str, Any]) -> str:
    return "l1" if options["use_l1_regression"] else "diffusion" if options["use_diffusion"] else "parallel_tokens"


def specs_of(name: str) -> tuple[VLAConfig, ActionSpec, Tuning]:
    """The model of a case, sized by its options and arrays, what it predicts and how it is trained."""
    options, data = settings(name), np.load(FOLDER / name / "train.npz")
    head, (_, horizon, dim) = head_of(options), data["actions"].shape
    model = dataclasses.replace(
        load_model(imported_base(name))[1],
        head=head,
        action_dim=0 if head == "parallel_tokens" else dim,
        cameras=options["num_images_in_input"],
        state_dim=data["proprio"].shape[-1] if options["use_proprio"] else 0,
        film=options["use_film"],
    )
    action = ActionSpec(dim, horizon, horizon, head, normalization=PLATFORMS[options["platform"]].normalization)
    lora = LoRAConfig(options["lora_rank"], targets="reference")
    return model, action, Tuning((*MODES["lora"], ALL_ADDED), lora, "float32")


class Place(NamedTuple):
    """Where a trainable tensor of the reference stands here: a leaf, its layer, and how values get there."""

    path: str
    layer: int | None
    shape: tuple[int, ...]  # in PyTorch's arrangement
    to_tree: Callable[[np.ndarray], np.ndarray]


def places(names: Iterable[str], model: VLAConfig, rank: int) -> dict[str, Place]:
    """The places of trainable tensors by their names."""
    slots, known = {slot.source: slot for slot in table(model, "hf")}, modules(model)
    found = {}
    for original in names:
        name = original.removeprefix("PeftModel/base_model.model.")
        name = name.replace("vision_backbone.vision_backbone.", "vision_backbone.").replace(".block.", ".")
        for prefix, ours in CLASSES.items():
            name = ours + name.removeprefix(prefix) if name.startswith(prefix) else name
        name, _, factor = name.partition(".lora_")
        if factor:
            module, factor = known[name], factor[0]
            rows, *columns = slots[f"{name}.weight"].source_shape
            shape = (rank, *columns) if factor == "A" else (rows, rank, *(1 for _ in columns[1:]))
            to_tree = lambda x, module=module, factor=factor: _to_tree(x, module, factor)
            found[original] = Place(f"{module.path}/lora/{factor.lower()}", module.layer, shape, to_tree)
        else:
            slot = slots[name]
            path = slot.target.removeprefix("params/")
            found[original] = Place(path, slot.layer, slot.source_shape, TRANSFORMS[slot.transform].to_tree)
    return found


def leaves_of(tensors: dict[str, np.ndarray], model: VLAConfig, rank: int) -> dict[str, np.ndarray]:
    """Trainable tensors of the reference, by leaf."""
    leaves: dict[str, dict[int | None, np.ndarray]] = {}
    for original, place in places(tensors, model, rank).items():
        value = np.asarray(place.to_tree(tensors[original]), np.float32)
        leaves.setdefault(place.path, {})[place.layer] = value
    stack = lambda rows: rows[None] if None in rows else np.stack([rows[i] for i in sorted(rows)])
    return {path: stack(rows) for path, rows in leaves.items()}


def recorded(name: str) -> dict[str, Any]:
    """`first_grad_norm` by tensor, and the tensors with `no_grad`."""
    return json.loads((FOLDER / name / "grads.json").read_text())


def start_tensors(name: str) -> dict[str, np.ndarray]:
    """Trainable tensors of the reference before the first step; those that are left out are zero.

    A case without `init.npz` starts from its component files, and its adapters' A outside of these is drawn by name, as
    the goldens' README says.
    """
    if (FOLDER / name / "init.npz").exists():
        return dict(np.load(FOLDER / name / "init.npz"))
    options, given = settings(name), recorded(name)
    model, _, tuning = specs_of(name)
    tensors = {}
    for original, place in places([*given["first_grad_norm"], *given["no_grad"]], model, tuning.lora.rank).items():
        kind, _, inner = original.partition("/")
        in_towers = inner.removeprefix("base_model.model.vision_backbone.")
        if kind in COMPONENTS:
            tensors[original] = component(name, COMPONENTS[kind])[inner]
        elif options["use_film"] and in_towers != inner:
            tensors[original] = component(name, "vision_backbone")[in_towers]
        elif ".lora_A." in original:
            rng = np.random.default_rng([options["weight_seed"], zlib.crc32(original.replace("/", ".").encode())])
            scale = np.float32(1 / np.sqrt(np.prod(place.shape[1:])))
            tensors[original] = rng.standard_normal(place.shape, dtype=np.float32) * scale
    return tensors


@functools.cache
def component(name: str, part: str) -> dict[str, np.ndarray]:
    """The tensors of a case's component file; the towers of a case without such a file are those of `film`."""
    path = next(file for folder in (name, "film") for file in (FOLDER / folder).glob(f"{part}--*.pt"))
    return {key.removeprefix("module."): tensor.read() for key, tensor in read_pt(path).items()}


def start_of(name: str) -> tuple[nnx.State, nnx.State]:
    """(trained, frozen) parameters before the first step of a case's training."""
    model, _, tuning = specs_of(name)
    base = flat(nnx.to_pure_dict(nnx.as_pure(nnx.state(load_model(imported_base(name))[0], nnx.Param))))
    given = base | leaves_of(start_tensors(name), model, tuning.lora.rank)
    prepared = abstract_prepared(model, tuning)
    abstract = nnx.split(prepared, tuning.is_trainable, ...)[1:]

    def fill(part: nnx.State) -> nnx.State:
        wanted = flat(nnx.to_pure_dict(nnx.as_pure(part)))
        leaves = {}
        for path, leaf in wanted.items():
            assert path in given or path.endswith("/lora/b"), path
            leaves[path] = given.get(path, np.zeros(leaf.shape, np.float32))
            assert leaves[path].shape == leaf.shape, (path, leaves[path].shape, leaf.shape)
        return refill(part, jax.tree.map(jax.numpy.asarray, nested(leaves)))

    return fill(abstract[0]), fill(abstract[1])


def batches(name: str) -> int:
    """How many batches of different examples a case has."""
    data = np.load(FOLDER / name / "train.npz")
    sizes = np.cumsum([len(data[key]) for key in sorted(data) if key.startswith("input_ids_")])
    return int((sizes <= len(data["images"])).sum())


def batch_of(name: str, number: int) -> Batch:
    """A training batch of the reference."""
    data = np.load(FOLDER / name / "train.npz")
    ids, labels = data[f"input_ids_{number}"], data[f"labels_{number}"]
    rows = len(ids)
    first = sum(len(data[f"input_ids_{i}"]) for i in range(number))
    positions = np.stack([np.flatnonzero(row != -100) for row in labels]).astype(np.int32)
    actions, images = data[f"actions_{number}"], data["images"][first : first + rows]
    return Batch(
        images=images,
        image_mask=np.ones(images.shape[:2], bool),
        state=data[f"proprio_{number}"].astype(np.float32) if settings(name)["use_proprio"] else None,
        tokens=ids.astype(np.int32),
        target_positions=positions,
        target_mask=np.ones(positions.shape, bool),
        actions=actions.astype(np.float32),
        action_mask=np.ones(actions.shape, bool),
        dataset=np.zeros(rows, np.int32),
    )
