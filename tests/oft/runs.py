"""The training goldens of OpenVLA-OFT as models, states and batches of this project."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from oft.cases import FOLDER, imported_base, settings

from openvla_jax.checkpoint.load import load_model
from openvla_jax.config import LoRAConfig, VLAConfig
from openvla_jax.convert.names import TRANSFORMS, table
from openvla_jax.convert.oft import PLATFORMS
from openvla_jax.convert.peft import _to_tree, modules
from openvla_jax.models.tree import flat, nested, refill
from openvla_jax.models.tuning import ADDED, MODES, Tuning, abstract_prepared, matches
from openvla_jax.types import ActionSpec, Batch

CLASSES = {
    "L1RegressionActionHead/": "action_head.",
    "DiffusionActionHead/": "action_head.",
    "ProprioProjector/": "proprio_projector.",
    "NoisyActionProjector/": "noisy_action_projector.",
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
    plain = Tuning(MODES["lora"], LoRAConfig(options["lora_rank"], targets="reference"), "float32")
    paths = flat(nnx.to_pure_dict(nnx.as_pure(nnx.state(abstract_prepared(model, plain), nnx.Param))))
    added = tuple(pattern for pattern in ADDED if any(matches(path, [pattern]) for path in paths))
    return model, action, dataclasses.replace(plain, trainable=(*MODES["lora"], *added))


def leaves_of(tensors: dict[str, np.ndarray], model: VLAConfig) -> dict[str, np.ndarray]:
    """Trainable tensors of the reference, by leaf. Layers of a leaf that are not among them are zero."""
    slots, known = {slot.source: slot for slot in table(model, "hf")}, modules(model)
    leaves: dict[str, dict[int | None, np.ndarray]] = {}
    for original, x in tensors.items():
        name = original.removeprefix("PeftModel/base_model.model.")
        name = name.replace("vision_backbone.vision_backbone.", "vision_backbone.").replace(".block.", ".")
        for prefix, ours in CLASSES.items():
            name = ours + name.removeprefix(prefix) if name.startswith(prefix) else name
        name, _, factor = name.partition(".lora_")
        if factor:
            path, layer = f"{known[name].path}/lora/{factor[0].lower()}", known[name].layer
            value = _to_tree(x, known[name], factor[0])
        else:
            slot = slots[name]
            path, layer = slot.target.removeprefix("params/"), slot.layer
            value = TRANSFORMS[slot.transform].to_tree(x)
        leaves.setdefault(path, {})[layer] = np.asarray(value, np.float32)
    stack = lambda rows: rows[None] if None in rows else np.stack([rows[i] for i in sorted(rows)])
    return {path: stack(rows) for path, rows in leaves.items()}


def start_of(name: str) -> tuple[nnx.State, nnx.State]:
    """(trained, frozen) parameters before the first step of a run with `init.npz`."""
    model, _, tuning = specs_of(name)
    base = flat(nnx.to_pure_dict(nnx.as_pure(nnx.state(load_model(imported_base(name))[0], nnx.Param))))
    init = dict(np.load(FOLDER / name / "init.npz"))
    given = base | leaves_of(init, model)
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
