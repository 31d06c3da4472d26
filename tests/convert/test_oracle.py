"""An exported folder, loaded by PyTorch modules of transformers, computes what this project computes."""

import jax
import numpy as np
import pytest
from conftest import golden
from fabricate import write_hf
from flax import nnx

torch = pytest.importorskip("torch")

from oracle import OracleVLA

from openvla_jax.convert import export_weights, import_weights
from openvla_jax.convert.outputs import build_model
from openvla_jax.convert.sources import open_source

pytestmark = pytest.mark.torch


def logits_of_both(src, tmp_path, pixels, ids):
    """Logits of an imported checkpoint here, and of its export there."""
    import_weights(src, tmp_path / "orbax")
    export_weights(tmp_path / "orbax", tmp_path / "exported")
    graph, state = build_model(open_source(tmp_path / "orbax"))
    ours = jax.jit(lambda state, pixels, ids: nnx.merge(graph, state)(pixels, ids))(
        state, pixels.transpose(0, 2, 3, 1), ids
    )
    oracle = OracleVLA(tmp_path / "exported", vision_heads=4)
    theirs = oracle(torch.from_numpy(pixels), torch.from_numpy(ids.astype(np.int64))).numpy()
    return np.asarray(ours), theirs


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("dinosiglip", "bfloat16"),
        ("dinosiglip-384px", "float32"),
        ("siglip-letterbox", "bfloat16"),
        ("clip", "float32"),
        ("dinoclip", "float32"),
    ],
)
def test_exports_compute_the_same_logits_in_pytorch(variant, dtype, tmp_path):
    write_hf(tmp_path / "hf", variant, dtype, shards=2)
    model = open_source(tmp_path / "hf").model
    random = np.random.default_rng(0)
    size = model.image_size
    pixels = random.normal(size=(2, 3 * len(model.towers), size, size)).astype(np.float32)
    ids = random.integers(3, model.base_vocab_size, (2, 9)).astype(np.int32)
    ids[:, 0] = 1
    ours, theirs = logits_of_both(tmp_path / "hf", tmp_path, pixels, ids)
    assert np.abs(theirs).max() > 0.1 and theirs.std() > 0.01  # the comparison is of something
    assert np.abs(ours - theirs).max() <= 2e-4


def test_an_exported_golden_computes_the_reference_s_logits_in_pytorch(tmp_path):
    src = golden("openvla_tiny")
    pixels = np.load(src / "pixel_values.npy")
    with np.load(src / "expected.npz") as expected:
        ids, mask, logits = expected["input_ids"], expected["attention_mask"].astype(bool), expected["logits_text"]
    import_weights(src, tmp_path / "orbax")
    export_weights(tmp_path / "orbax", tmp_path / "exported")
    theirs = OracleVLA(tmp_path / "exported", vision_heads=4)(torch.from_numpy(pixels), torch.from_numpy(ids)).numpy()
    assert np.abs(theirs[:, 256:, ::29] - logits)[mask].max() <= 2e-4
