"""Rows that tf.data delivers -> `Batch`: adds tokens, positions and masks; refuses rows that cannot be trained on."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from openvla_jax.data import DataError, faults, text
from openvla_jax.data.mixture import Mixture
from openvla_jax.errors import InputError
from openvla_jax.tokens.actions import ActionTokenizer
from openvla_jax.tokens.prompts import encode_example
from openvla_jax.types import Batch


class Encoder:
    """Makes the batches of one mixture's datasets, and counts what it had to cut or leave out.

    truncated_instructions: rows so far whose instruction was cut to fit. skipped: frames that were left out.
    """

    def __init__(self, mixture: Mixture, tokenizer: Any, text_length: int, prompt_family: str):
        self.names = mixture.names
        self.cameras = mixture.observation.cameras
        self.camera_mask = mixture.camera_mask
        self.horizon = mixture.action.horizon
        self.action_dims = mixture.action_dims
        self.grippers = mixture.grippers
        self.action_tokenizer = ActionTokenizer(tokenizer.vocab_size, mixture.action.bins)
        self.truncated_instructions = 0
        self.skipped = faults.Skipped(self.names)
        targets = self.horizon * self.action_dims.max() + 1

        # Robots are told the same things over and over: the row of an instruction is made once, with zeros for actions,
        # and the actions of each frame are written over them.
        @functools.lru_cache(maxsize=65536)
        def template(instruction: bytes, action_dim: int) -> tuple[np.ndarray, np.ndarray, bool]:
            blank = np.zeros((self.horizon, action_dim))
            tokens, places, cut = encode_example(
                tokenizer, self.action_tokenizer, text.decode(instruction), blank, text_length, prompt_family
            )
            return tokens, np.pad(places, (0, targets - len(places)), mode="edge"), cut

        self._template = template

    def __call__(self, rows: Mapping[str, np.ndarray]) -> Batch:
        """Encodes the columns of `batches`; raises DataError for a row that cannot be trained on (see `faults`)."""
        if "skipped" in rows:
            self.skipped.note(rows["skipped"])
        faults.check(rows, self.names, self.cameras, self.grippers, self.horizon)
        dims = self.action_dims[rows["dataset"]]
        tokens, positions = self._templates(rows, dims)
        actions = rows["action"].reshape(len(dims), self.horizon, self.action_dims.max())
        action_mask = np.broadcast_to(np.arange(actions.shape[2]) < dims[:, None, None], actions.shape).copy()
        # Row by row, step by step: dimension a of step k is target k * dim + a of its row.
        target = np.arange(self.horizon)[:, None] * dims[:, None, None] + np.arange(actions.shape[2])
        row = np.nonzero(action_mask)[0]
        tokens[row, positions[row, target[action_mask]]] = self.action_tokenizer.encode(actions[action_mask])
        images = [rows[f"image_{camera}"][:, None] for camera in self.cameras]
        return Batch(
            images=images[0] if len(images) == 1 else np.concatenate(images, axis=1),  # one camera: no copy
            image_mask=self.camera_mask[rows["dataset"]],
            state=rows.get("state"),
            tokens=tokens,
            target_positions=positions,
            target_mask=np.arange(positions.shape[1]) <= self.horizon * dims[:, None],
            actions=actions,
            action_mask=action_mask,
            dataset=rows["dataset"],
        )

    def _templates(self, rows: Mapping[str, np.ndarray], dims: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [B, T] with zeros for actions, and target_positions int32 [B, N]."""
        tokens, places = [], []
        for row, dim in enumerate(dims):
            try:
                ids, place, cut = self._template(rows["language"][row], int(dim))
            except InputError as error:  # an instruction that is empty or not text
                raise DataError(f"{faults.where(rows, row, self.names)}: {error}") from error
            tokens.append(ids)
            places.append(place)
            if cut and not self.truncated_instructions:
                logging.warning(
                    "%s: the instruction is too long and is cut: raise data.text_length",
                    faults.where(rows, row, self.names),
                )
            self.truncated_instructions += cut
        return np.stack(tokens), np.stack(places)
