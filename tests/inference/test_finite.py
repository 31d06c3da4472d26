"""An action that is not finite never leaves the policy or the server: it is an error with its reason."""

import base64
import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient
from openvla_client.arrays import encode_array
from small_policy import INSTRUCTIONS, STATISTICS, small_policy

from openvla_jax.errors import NonFiniteError
from openvla_jax.inference import wire
from openvla_jax.inference.batcher import Batcher
from openvla_jax.inference.policy import NonFiniteActionError
from openvla_jax.inference.server import Settings, make_app
from openvla_jax.models.heads.tokens import first_largest

IMAGE = np.zeros((56, 56, 3), np.uint8)


@pytest.fixture(scope="module")
def policy():
    return small_policy(copy.deepcopy(STATISTICS))


@pytest.fixture
def bad_statistics(policy, monkeypatch):
    """The policy, with NaN and infinity in the statistics of "arm" since it was loaded."""
    rows = policy.contract.statistics["arm"]["action"]
    monkeypatch.setitem(rows, "q99", [0.3, float("nan"), float("inf")])
    return policy


@pytest.fixture
def bad_weights(policy, monkeypatch):
    """The policy, with one NaN in its output head."""
    params = [param.at[..., -1].set(jnp.nan) if param.ndim == 2 else param for param in policy._params]
    monkeypatch.setattr(policy, "_params", params)
    return policy


def body(**changes):
    return {"image": encode_array(IMAGE), "instruction": INSTRUCTIONS[0], "unnorm_key": "arm"} | changes


def test_policy_refuses_to_act_by_bad_statistics(bad_statistics):
    with pytest.raises(NonFiniteActionError, match=r"dimension 1 of the action is nan: dataset 'arm'; .* damaged"):
        bad_statistics.predict_action(IMAGE, "push", "arm")
    assert np.isfinite(bad_statistics.predict_action(IMAGE, "push", "two_arms")).all()


def test_policy_refuses_to_act_by_bad_weights(bad_weights):
    with pytest.raises(NonFiniteActionError, match="dimension 0 of the action is nan: dataset 'arm'"):
        bad_weights.predict_action(IMAGE, "push", "arm")


def test_first_largest_marks_nan():
    logits = jnp.asarray([[1.0, 3.0, 3.0], [1.0, jnp.nan, 0.0], [-jnp.inf, -jnp.inf, 0.0], [jnp.nan] * 3])
    assert first_largest(logits).tolist() == [1, -1, 2, -1]


def test_batcher_fails_the_bad_row_alone(bad_statistics):
    batcher = Batcher(bad_statistics, max_batch=2, wait=5.0)
    requests = [bad_statistics.prepare(bad_statistics.observe(IMAGE, "push", key)) for key in ("two_arms", "arm")]
    good, bad = batcher.submit(requests)
    np.testing.assert_array_equal(good.result(60), bad_statistics.act(requests[:1])[0])
    with pytest.raises(NonFiniteActionError, match="'arm'"):
        bad.result(60)
    batcher.stop()


def test_server_answers_500_with_the_reason(bad_statistics):
    with TestClient(make_app(bad_statistics, Settings(max_batch=2)), raise_server_exceptions=False) as client:
        for content in (body(), body(image=IMAGE.tolist()), {"encoded": json.dumps(body())}):
            answer = client.post("/act", json=content)
            assert answer.status_code == 500 and "action is nan: dataset 'arm'" in answer.json()["error"]
        assert client.post("/act", json=body(unnorm_key="two_arms")).status_code == 200
        rows = {"requests": [body(unnorm_key="two_arms"), body()]}
        answer = client.post("/act_batch", json=rows)
        assert answer.status_code == 500 and answer.json()["error"].startswith("request 1: dimension 1 of the action")
        answer = client.get("/info")
        assert answer.status_code == 500 and "no JSON form" in answer.json()["error"]
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_info_shows_infinite_settings_as_text(policy, monkeypatch):
    monkeypatch.setitem(policy.contract.training, "clip", float("inf"))
    with TestClient(make_app(policy)) as client:
        assert client.get("/info").json()["training"]["clip"] == "Infinity"


@pytest.mark.parametrize("value", [float("nan"), {"a": [float("inf")]}, np.array([1.0, np.nan]), np.float32("-inf")])
def test_dumps_refuses_what_is_no_number(value):
    with pytest.raises(NonFiniteError):
        wire.dumps(value)


def test_arrays_are_measured_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(base64, "b64decode", lambda *args, **kwargs: pytest.fail("decoded"))
    value = {"__numpy__": "A" * 400, "dtype": "<f8", "shape": [10**6, 10**6]}
    with pytest.raises(wire.BadRequestError, match="400 characters of base64 are not an array of shape"):
        wire.decode_array(value, "image")
