"""Checkpoints: weights, and the contract that says how to use them.

A checkpoint is a directory written by Orbax (v1) with these items:

    params/      nested dict of arrays, paths as in the model (`llama/blocks/attention/q/kernel`); of a run that froze
                 some, only what it trained: such a checkpoint, an adapter, is used together with its base
    unused/      reference tensors that are never run, by tower (only in imported weights; copied along)
    optimizer/   optimiser state and step (only while training)
    data/        position in the data stream, per process (only where `data.resume` is exact)
    contract/    config.json, dataset_statistics.json, tokenizer files: model, preprocessing, prompt, action statistics

Training keeps them as W/checkpoints/<step>/; an imported checkpoint is one such directory by itself. A directory
appears under its final name only when it is complete.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from openvla_jax.config import VLAConfig

FORMAT = 1


CONFIG_FILE, STATISTICS_FILE, TOKENIZER_DIR = "config.json", "dataset_statistics.json", "tokenizer"


# What training does to an image and an action before the model sees them; inference repeats it from here.
PREPROCESSING = {
    "resize_kernel": "lanczos3",  # "bicubic": PIL's, as the HF processor of imported checkpoints
    "center_crop": False,  # true when trained with random crops
    "jpeg": False,  # images go through JPEG first, as in the reference's LIBERO and Bridge evaluations
    "text_length": 64,  # tokens of a training row: prompt, action and end token
    "action_normalization": "bounds_q99",
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, of another model, or not one at all."""


@dataclasses.dataclass(frozen=True)
class Contract:
    """Everything that a user of the weights must know and must not retype."""

    model: VLAConfig
    tokenizer: Any  # transformers fast tokenizer; None where an import found no tokenizer files
    statistics: Mapping[str, Any]  # {dataset: {"action": {...}, "num_transitions", ...}}
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(PREPROCESSING))
    training: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # the run's config, or the source of an import
    default_key: str | None = None  # the statistics that unnormalise actions where nobody names others
    adapter: Mapping[str, Any] | None = None  # {base, fingerprint, tuning} where params hold only what was trained

    def save(self, directory: os.PathLike | str) -> None:
        """Writes the contract's files into an existing directory."""
        from openvla_jax.tokens.tokenizer import save_tokenizer

        path = epath.Path(directory)
        config = {
            "format": FORMAT,
            "model": self.model.to_dict(),
            "preprocessing": dict(self.preprocessing),
            "training": dict(self.training),
            "default_key": self.default_key,
        }
        if self.adapter is not None:
            config["adapter"] = dict(self.adapter)
        (path / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        (path / STATISTICS_FILE).write_text(json.dumps(dict(self.statistics), indent=2))
        if self.tokenizer is not None:
            (path / TOKENIZER_DIR).mkdir(exist_ok=True)
            save_tokenizer(self.tokenizer, path / TOKENIZER_DIR)

    @classmethod
    def load(cls, directory: os.PathLike | str) -> "Contract":
        """Reads what `save` wrote."""
        from openvla_jax.tokens.tokenizer import load_tokenizer

        path = epath.Path(directory)
        config = read_json(path / CONFIG_FILE)
        if config.get("format") != FORMAT:
            raise CheckpointError(f"{path / CONFIG_FILE}: format {config.get('format')!r}, this version reads {FORMAT}")
        return cls(
            model=VLAConfig.from_dict(config["model"]),
            tokenizer=load_tokenizer(path / TOKENIZER_DIR) if (path / TOKENIZER_DIR).is_dir() else None,
            statistics=read_json(path / STATISTICS_FILE),
            preprocessing=config["preprocessing"],
            training=config["training"],
            default_key=config.get("default_key"),
            adapter=config.get("adapter"),
        )


def read_json(path: epath.Path) -> Any:
    if not path.exists():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): the checkpoint is damaged") from None
