"""A run with two cameras, a state and chunks of actions, from RLDS files to the policy that serves them."""

import sys

import numpy as np
import pytest
from conftest import ROOT, on_one_device

sys.path.insert(0, str(ROOT / "tests" / "data"))
import fake_rlds
import frozen

from openvla_jax import Observation, Policy
from openvla_jax.checkpoint.reading import load_contract
from openvla_jax.inference.wire import decode_array, dumps
from openvla_jax.training import loop

MODULE = """
from openvla_jax.data.custom import Columns, describe

DATASETS = [
    describe(
        "two",
        cameras={"primary": "image", "wrist": "wrist"},
        action=[Columns("action", 0, 7)],
        state=[Columns("observation/state", 0, 6)],
    )
]
"""
STATE = tuple(f"state_{i}" for i in range(6))


def settings(folder, **changes):
    config = frozen.settings(folder)
    config.data.update(dict(dataset="two", module=str(folder / "mine.py"), text_length=96))
    config.data.statistics_dir = str(folder / "statistics")
    config.update_from_flattened_dict(
        {
            "observation.cameras": ("primary", "wrist"), "observation.state": STATE, "action.horizon": 2,
            "action.executed": 2, "train.steps": 4, "train.checkpoint_every": 2, "train.eval_every": 2,
            "train.eval_batches": 1, "augment.enabled": True, "augment.crop_scale": (0.8, 0.8),
        } | changes
    )  # fmt: skip
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cameras")
    episodes = [fake_rlds.two_cameras(i) for i in range(6)]
    splits = {"train": [episodes[:5]], "val": [episodes[5:]]}
    fake_rlds.write(folder / "data", splits, name="two", schema=fake_rlds.two_camera_features())
    (folder / "mine.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        loop.run(settings(folder, **{"train.steps": 2}), folder / "run")
        loop.run(settings(folder), folder / "run")  # resumes with the same cameras, state and chunks
    return folder


@pytest.fixture(scope="module")
def policy(folder):
    return Policy.from_checkpoint(folder / "run")


def observation(seed=0, **changes):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (30, 40, 3), dtype=np.uint8) for name in ("primary", "wrist")}
    return Observation(
        **({"images": images, "instruction": "pick up the cup", "state": rng.uniform(-1, 1, 6)} | changes)
    )


def test_contract_of_a_run_names_cameras_state_and_chunk(folder):
    contract = load_contract(folder / "run")
    assert contract.observation.cameras == ("primary", "wrist") and contract.observation.state == STATE
    assert (contract.action.horizon, contract.action.executed, contract.action.dim) == (2, 2, 7)
    assert (contract.model.cameras, contract.model.state_dim) == (2, 6)
    assert contract.preprocessing.crop_area == pytest.approx(0.8)


def test_policy_predicts_a_chunk_from_every_camera_and_the_state(policy):
    seen = observation()
    chunk = policy.predict_chunk(seen)
    assert chunk.shape == (2, 7) and chunk.dtype == np.float64 and np.isfinite(chunk).all()
    logits = lambda seen: np.asarray(policy.run_model([policy.prepare(seen)]).logits)
    before = logits(seen)
    for change in (
        {"images": seen.images | {"wrist": np.zeros_like(seen.images["wrist"])}},
        {"images": seen.images | {"primary": np.zeros_like(seen.images["primary"])}},
        {"state": -seen.state},
    ):
        other = Observation(**({"images": seen.images, "instruction": seen.instruction, "state": seen.state} | change))
        assert np.abs(logits(other) - before).max() > 1e-6, change.keys()


def test_policy_batch_equals_its_rows(policy):
    rows = [observation(seed) for seed in range(3)]
    chunks = policy.predict_chunks(rows)
    assert chunks.shape == (3, 2, 7)
    for row, chunk in zip(rows, chunks, strict=True):
        np.testing.assert_array_equal(policy.predict_chunk(row), chunk)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {"primary": np.zeros((4, 4, 3), np.uint8)}}, "no image of camera 'wrist'"),
        ({"state": None}, "state is missing"),
        ({"state": np.zeros(5)}, "give 6 numbers"),
    ],
)
def test_policy_refuses_an_incomplete_observation(policy, change, message):
    with pytest.raises(ValueError, match=message):
        policy.predict_chunk(observation(**change))


def test_run_with_other_cameras_is_another_run(folder, monkeypatch):
    on_one_device(monkeypatch)
    with pytest.raises(ValueError, match=r"observation was .*use another --workdir or that config"):
        loop.run(settings(folder, **{"observation.cameras": ("primary",)}), folder / "run")


def test_server_answers_a_chunk_for_images_and_a_state(policy):
    testclient = pytest.importorskip("starlette.testclient")
    from openvla_jax.inference.server import Settings, make_app

    seen = observation()
    with testclient.TestClient(make_app(policy, Settings())) as client:
        body = {"images": dict(seen.images), "instruction": seen.instruction, "state": seen.state}
        answer = client.post("/act", content=dumps(body))
        assert answer.status_code == 200, answer.text
        chunk = [decode_array(row, "actions") for row in answer.json()]
        np.testing.assert_array_equal(chunk, policy.predict_chunk(seen))
        refused = client.post("/act", content=dumps(body | {"state": seen.state[:3]}))
        assert refused.status_code == 400 and "6 numbers" in refused.text
