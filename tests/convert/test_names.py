"""The table of names: complete, one to one, and exactly undone by its inverse."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from conftest import golden
from fabricate import VARIANTS, random_tensors, shrunken
from hypothesis import given
from hypothesis import strategies as st

from openvla_jax.config import preset
from openvla_jax.convert.names import (
    TRANSFORMS,
    ConversionError,
    canonical_names,
    check,
    leaf_shapes,
    source_shapes,
    table,
)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("openvla-7b", 982, 7_541_237_184), ("openvla-v01-7b", 637, 7_188_124_608)],
)
@pytest.mark.parametrize("layout", ["hf", "native"])
def test_published_models_have_their_published_numbers_of_tensors_and_parameters(name, tensors, parameters, layout):
    shapes = source_shapes(table(preset(name), layout))
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


def test_names_and_shapes_are_those_of_a_real_checkpoint():
    manifest = json.loads((golden("openvla_tiny") / "manifest.json").read_text())
    from openvla_jax.convert.sources import open_source

    model = open_source(golden("openvla_tiny")).model
    assert list(source_shapes(table(model, "hf")).items()) == [(name, tuple(shape)) for name, shape in manifest.items()]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["hf", "native"])
def test_slots_fill_every_leaf_and_every_tensor_exactly_once(variant, layout):
    config = shrunken(variant)
    slots = table(config, layout)
    places = [(slot.target, slot.layer) for slot in slots]
    assert len(set(places)) == len(places)
    blocks = [(slot.source, slot.block) for slot in slots]
    assert len(set(blocks)) == len(blocks)
    for name in {slot.source for slot in slots}:
        assert sorted(s.block for s in slots if s.source == name) == list(
            range(next(s.blocks for s in slots if s.source == name))
        )
    # As many numbers on one side as on the other.
    assert sum(math.prod(s) for s in source_shapes(slots).values()) == sum(
        math.prod(s) for s in leaf_shapes(config).values()
    )


@given(
    st.sampled_from(sorted(TRANSFORMS)),
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_transforms_are_undone_bit_for_bit(name, a, b, dtype):
    transform = TRANSFORMS[name]
    tree_shape = {"keep": (a, b), "squeeze": (a, b), "transpose": (a * 50, b), "patches": (a * a * 3, b)}[name]
    bits = np.random.default_rng(b).integers(0, 256, (*tree_shape, np.dtype(dtype).itemsize), np.uint8)
    tree = bits.view(dtype)[..., 0]  # any bits, NaN too
    torch = transform.to_torch(tree)
    assert torch.shape == transform.torch_shape(tree_shape)
    assert np.ascontiguousarray(transform.to_tree(torch)).tobytes() == tree.tobytes()


def test_transposes_and_patches_put_numbers_where_pytorch_has_them():
    x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(TRANSFORMS["transpose"].to_tree(x), x.T)
    kernel = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32)  # [out, channel, height, width]
    patch = np.random.default_rng(1).normal(size=(4, 4, 3)).astype(np.float32)  # [height, width, channel]
    flat = patch.reshape(-1) @ TRANSFORMS["patches"].to_tree(kernel)
    np.testing.assert_allclose(flat, np.einsum("ochw,hwc->o", kernel, patch), rtol=1e-5)


def test_layer_scale_is_found_under_either_name_in_either_layout():
    names = [
        "vision_backbone.featurizer.blocks.0.ls1.gamma",
        "x.ls2.scale_factor",
        "x.rotary_emb.inv_freq",
        "y.gamma.weight",
    ]
    hf, native = canonical_names(names, "hf"), canonical_names(names, "native")
    assert list(hf) == ["vision_backbone.featurizer.blocks.0.ls1.scale_factor", "x.ls2.scale_factor", "y.gamma.weight"]
    assert list(native) == ["vision_backbone.featurizer.blocks.0.ls1.gamma", "x.ls2.gamma", "y.gamma.weight"]


def test_all_differences_are_listed_at_once():
    config = shrunken("dinosiglip")
    tensors = random_tensors(config, "hf")
    first, second, third, *_, last = tensors
    lm = "language_model.model.layers.1.mlp.up_proj.weight"
    tensors["extra.weight"] = np.zeros(3, np.float32)
    del tensors[first]
    tensors[second] = tensors[second][..., :-1]
    tensors[last] = tensors[last].astype(np.int32)
    tensors[lm] = tensors[lm].astype(np.float16)
    with pytest.raises(ConversionError) as error:
        check(table(config, "hf"), tensors, "here")
    text = str(error.value)
    assert "here: 5 tensors" in text
    assert f"{first}: missing" in text and "extra.weight: not part" in text and f"{second}: shape" in text
    assert f"{last}: dtype int32" in text and f"{lm} is float16" in text
    assert third not in text
