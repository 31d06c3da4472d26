"""The types that cross the layers of the package."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of one host. N is the largest action dimension of the mixture + 1 (the end token)."""

    images: np.ndarray  # uint8 [B, H, W, 3]
    tokens: np.ndarray  # int32 [B, T], right-padded
    target_positions: np.ndarray  # int32 [B, N], where tokens hold what is to be predicted
    target_mask: np.ndarray  # bool [B, N], False where a row has fewer targets
    dataset: np.ndarray  # int32 [B], index into dataset_names
