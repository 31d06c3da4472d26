"""What is trained and what is frozen: the paper's modes, state for trained leaves only, adapters in the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training.batches import MODEL, ONE_TOWER, random_batch
from training.test_step import SETTINGS

from openvla_jax.config import LoRAConfig, preset
from openvla_jax.models.heads import make_head
from openvla_jax.models.lora import LoRA, LoRAParam
from openvla_jax.models.openvla import OpenVLA, count_parameters
from openvla_jax.models.quantize import count_bytes
from openvla_jax.models.tuning import MODES, Tuning, abstract_prepared, count_adapters, count_trainable, merge_tuned
from openvla_jax.parallel.execution import PLAIN, Execution
from openvla_jax.parallel.sharding import global_batch, make_mesh
from openvla_jax.training.optimizer import make_optimizer, make_schedule
from openvla_jax.training.state import abstract_state, init_state
from openvla_jax.training.step import make_forward, make_train_step
from openvla_jax.types import ActionSpec

OPTIMIZER = make_optimizer(SETTINGS, make_schedule(SETTINGS, 10))


def mesh():
    return make_mesh({}, jax.devices()[:1])


@pytest.mark.parametrize(
    ("mode", "millions"), [("full", 7188.1), ("last_layer", 465.1), ("frozen_vision", 6760.4), ("sandwich", 914.2)]
)
def test_the_modes_train_what_the_paper_s_table_counts(mode, millions):
    counts = count_trainable(preset("openvla-v01-7b"), Tuning(MODES[mode]))
    assert round(sum(counts.values()) / 1e6, 1) == millions


def test_the_reference_set_is_exact():
    config = preset("openvla-7b")
    counts = count_trainable(config, Tuning(MODES["lora"], LoRAConfig(32, targets="reference")))
    # By group, as PEFT's own expansion of all-linear on the reference's modules gives them, last blocks and pool apart.
    assert counts == {
        "llama": 79_953_920 + 1_157_120,
        "projector": 1_019_904,
        "vision/dino": 12_582_912 * 23 // 24 + 51_584,
        "unused/dino": 12_582_912 // 24,
        "vision/siglip": 15_399_936 * 26 // 27 + 55_680,
        "unused/siglip": 15_399_936 // 27 + 607_232,
    }
    assert sum(counts.values()) == count_adapters(config, LoRAConfig(32, targets="reference")) == 110_828_288
    assert count_parameters(config, include_unused=True) + 110_828_288 == 7_652_065_472


def test_at_7b_state_exists_for_adapters_only_and_the_base_is_held_once():
    """Bytes of the abstract state on one device: the base in bfloat16, and three float32 numbers per adapter weight."""
    config, trained = preset("openvla-7b"), 109_019_136
    for kind, gigabytes in ((None, 16.3), ("int8", 9.8), ("int4", 6.6)):
        tuning = Tuning(MODES["lora"], LoRAConfig(32), quantize=kind)
        state, _ = abstract_state(config, jnp.bfloat16, OPTIMIZER, mesh(), tuning)
        assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == trained
        assert 0 <= count_bytes(state.opt_state) - 2 * 4 * trained < 64  # two moments of each, and counters
        assert not [leaf for leaf in jax.tree.leaves(state.frozen) if leaf.dtype == jnp.float32]
        assert round(count_bytes(state) / 1e9, 1) == gigabytes
        if kind is None:
            assert count_bytes(state.frozen) == 2 * count_parameters(config)


@pytest.fixture(scope="module")
def stepped():
    """{name: (tuning, state before, state after three steps, metrics)} on one batch, tiny model."""
    lora = LoRAConfig(4, targets="reference")
    cases = {
        "lora": Tuning(MODES["lora"], lora, "float32"),
        "qlora": Tuning(MODES["lora"], LoRAConfig(4, dropout=0.1), quantize="int4", quantize_exclude=()),
        "sandwich": Tuning(MODES["sandwich"], None, "bfloat16"),
    }
    batch, found = global_batch(random_batch(8), mesh()), {}
    for name, tuning in cases.items():
        state = init_state(ONE_TOWER, jnp.float32, OPTIMIZER, mesh(), 0, tuning)
        before = jax.device_get(state)
        step = make_train_step(
            ONE_TOWER, OPTIMIZER, make_schedule(SETTINGS, 10), Execution(mesh(), remat="full"), dtype=jnp.float32,
            datasets=2, tuning=tuning, accumulation=2 if name == "lora" else 1,
        )  # fmt: skip
        _, placed = abstract_state(ONE_TOWER, jnp.float32, OPTIMIZER, mesh(), tuning)
        step = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
        memory = step.lower(state, batch).compile().memory_analysis()
        # The new state takes the old one's place, frozen weights included: there is no second copy of them.
        assert memory.alias_size_in_bytes >= count_bytes(state) > memory.output_size_in_bytes - 4096, name
        assert memory.argument_size_in_bytes <= count_bytes((state, batch)) + 4096
        losses = []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        found[name] = tuning, before, state, losses
    return found


@pytest.mark.long
def test_only_what_is_trained_moves(stepped):
    for name, (_, before, after, losses) in stepped.items():
        assert losses[2] < losses[0], name
        assert jax.tree.structure(before.frozen) == jax.tree.structure(after.frozen)
        pairs = zip(jax.tree.leaves(before.frozen), jax.tree.leaves(after.frozen), strict=True)
        assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs), name
        trained = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(after.params)}
        frozen = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(after.frozen)}
        assert not trained & frozen
        moments = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state))
        assert moments - 2 * sum(leaf.size for leaf in jax.tree.leaves(after.params)) <= 2
        if "lora" in name:
            assert all("/lora/" in path for path in trained)
            still = [
                path for path, leaf in nnx.to_flat_state(after.params)
                if path[-1] == "b" and path[0] != "unused" and not np.asarray(leaf[...]).any()
            ]  # fmt: skip
            assert not still
            assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after.params))
    kinds = {leaf.dtype for leaf in jax.tree.leaves(stepped["qlora"][1].frozen)}
    assert kinds == {jnp.dtype(jnp.int4), jnp.dtype(jnp.bfloat16)}
    assert {path[:2] for path, _ in nnx.to_flat_state(stepped["sandwich"][2].params)} >= {("llama", "last")}
    dead = [leaf for path, leaf in nnx.to_flat_state(stepped["lora"][2].params) if path[0] == "unused"]
    assert dead and all(not np.asarray(leaf[...]).any() for leaf in dead if leaf.shape[0] == 4)


@pytest.mark.long
def test_merged_weights_compute_what_the_parts_did(stepped):
    batch = random_batch(4, 1)
    for name in ("lora", "sandwich"):
        tuning, _, after, _ = stepped[name]
        graph = nnx.split(abstract_prepared(ONE_TOWER, tuning), tuning.is_trainable, ...)[0]
        run = jax.jit(lambda model: model(model.normalize(batch.images[:, 0]), batch.tokens))
        copies = [jax.tree.map(jnp.copy, state) for state in (after.params, after.frozen)]
        apart = run(nnx.merge(graph, after.params, after.frozen))
        merged = merge_tuned(nnx.merge(graph, *copies))
        assert not any("lora" in path for path, _ in nnx.to_flat_state(nnx.state(merged)))
        if name == "sandwich":  # the last layer joins a bfloat16 stack
            assert np.abs(apart - run(merged)).max() < 0.05
        else:
            np.testing.assert_allclose(run(merged), apart, atol=1e-4)
        assert jax.tree.structure(nnx.state(merged)) == jax.tree.structure(
            nnx.state(jax.eval_shape(lambda key: OpenVLA(ONE_TOWER, key), jax.random.key(0)))
        )


def test_dropout_falls_on_the_adapter_s_input_only():
    adapter = LoRA(jax.random.key(0), LoRAConfig(2, alpha=2, dropout=0.5), "here", (6, 3))
    adapter.b[...] = jnp.ones((2, 3))
    x = jnp.ones((4000, 6))
    plain = np.asarray(x @ adapter.a[...] @ adapter.b[...])
    np.testing.assert_allclose(adapter(x, PLAIN), plain, rtol=1e-5)  # without a key nothing is dropped
    dropped = np.asarray(adapter(x, Execution(dropout_key=jax.random.key(1))))
    assert len(np.unique(dropped.round(4)[:, 0])) > 10
    np.testing.assert_allclose(dropped.mean(axis=0), plain[0], atol=0.1)


@pytest.mark.long
def test_accumulation_draws_dropout_for_each_part():
    """Two parts of equal rows lose different activations; the step's gradient is the sum of theirs."""
    tuning, seed = Tuning(MODES["lora"], LoRAConfig(4, dropout=0.5), "float32"), 3
    execution, sgd = Execution(mesh()), optax.sgd(1.0)
    state = init_state(ONE_TOWER, jnp.float32, sgd, mesh(), 0, tuning)
    for path, leaf in nnx.to_flat_state(state.params):  # B is zero at first, and what is dropped then has no effect
        if path[-1] == "b":
            leaf[...] = 0.1 * jax.random.normal(jax.random.key(len(path)), leaf.shape)
    batch = jax.tree.map(lambda rows: np.repeat(rows, 2, axis=0), random_batch(2))
    step = make_train_step(
        ONE_TOWER, sgd, optax.constant_schedule(1.0), execution, dtype=jnp.float32, datasets=2, tuning=tuning,
        accumulation=2, seed=seed,
    )  # fmt: skip
    after, metrics = jax.jit(step)(state, global_batch(batch, mesh()))

    head = make_head(ONE_TOWER, ActionSpec())
    forward = make_forward(ONE_TOWER, head, execution, dtype=jnp.float32, datasets=2, tuning=tuning)
    part = jax.tree.map(lambda rows: rows[::2], batch)
    loss = jax.jit(jax.value_and_grad(lambda params, key: forward(params, state.frozen, part, dropout_key=key)[0]))
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 1), 2)
    (first, gradient), (second, other) = (loss(state.params, key) for key in keys)
    assert abs(first - second) > 1e-3 * first
    targets = head.targets(jax.tree.map(jnp.asarray, batch))
    np.testing.assert_allclose(metrics["loss"], (first + second) / targets, rtol=1e-5)
    moved = jax.tree.map(lambda new, old: old - new, after.params, state.params)
    expected = jax.tree.map(lambda a, b: (a + b) / targets, gradient, other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-3), moved, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: abstract_prepared(MODEL, Tuning(("llama/heads",))),
            r"'llama/heads' matches no .*'llama/head'",
        ),
        (lambda: abstract_prepared(MODEL, Tuning(MODES["lora"])), r"'\*/lora' matches no parameter"),
        (
            lambda: abstract_prepared(MODEL, Tuning(MODES["lora"], LoRAConfig(4, targets="llama/*/query"))),
            r"lora.targets: 'llama/\*/query' matches no layer",
        ),
        (lambda: Tuning(MODES["lora"], LoRAConfig(0)), "lora.rank is 0: adapters need a rank of at least 1"),
        (lambda: LoRAConfig(4, dropout=1.0), "lora.dropout 1.0"),
        (lambda: Tuning(()), "trainable is empty"),
        (lambda: Tuning(quantize="int3"), "unknown quantisation 'int3'"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_patterns_choose_targets():
    tuning = Tuning(MODES["lora"], LoRAConfig(4, targets="projector,*/mlp/up"))
    chosen = nnx.state(abstract_prepared(MODEL, tuning), LoRAParam)
    assert {"/".join(map(str, path[:-2])) for path, _ in nnx.to_flat_state(chosen)} == {
        *(f"projector/fc{i}" for i in (1, 2, 3)),
        *(f"{tower}/blocks/mlp/up" for tower in ("vision/dino", "vision/siglip", "llama")),
        *(f"unused/{tower}/block/mlp/up" for tower in ("dino", "siglip")),
        "unused/siglip/pool/mlp/up",
    }
