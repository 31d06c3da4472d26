"""Random batches of the right form, for tests that need no data."""

import dataclasses

import numpy as np

from openvla_jax.config import VLAConfig, tiny
from openvla_jax.types import Batch

MODEL = tiny(base_vocab_size=700)
ONE_TOWER = dataclasses.replace(MODEL, towers=MODEL.towers[1:])  # compiles faster


def random_batch(
    rows: int, seed: int = 0, model: VLAConfig = MODEL, text_length: int = 20, action_dim: int = 7
) -> Batch:
    """Rows of different text length; the targets are the row's last `action_dim + 1` tokens, action tokens and EOS."""
    rng = np.random.default_rng(seed)
    tokens = np.full((rows, text_length), model.pad_token, np.int32)
    positions = np.zeros((rows, action_dim + 1), np.int32)
    for row in range(rows):
        length = rng.integers(action_dim + 4, text_length + 1)
        tokens[row, :length] = rng.integers(3, model.base_vocab_size - 256, length)
        tokens[row, 0] = 1
        positions[row] = np.arange(length - action_dim - 1, length)
        tokens[row, positions[row, :-1]] = rng.integers(model.base_vocab_size - 256, model.base_vocab_size, action_dim)
        tokens[row, length - 1] = 2
    images = rng.integers(0, 256, (rows, 1, model.image_size, model.image_size, 3), dtype=np.uint8)
    dataset = (np.arange(rows) % 2).astype(np.int32)
    actions = rng.uniform(-1, 1, (rows, 1, action_dim)).astype(np.float32)
    return Batch(
        images=images,
        image_mask=np.ones((rows, 1), bool),
        state=None,
        tokens=tokens,
        target_positions=positions,
        target_mask=np.ones(positions.shape, bool),
        actions=actions,
        action_mask=np.ones(actions.shape, bool),
        dataset=dataset,
    )
