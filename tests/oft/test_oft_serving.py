"""OpenVLA-OFT's server: the exchange of the real one, and chunks with its centre crop."""

import json

import numpy as np
import pytest
from conftest import golden
from oft.cases import imported

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient
from openvla_client.messages import read_chunk

from openvla_jax import Observation, Policy
from openvla_jax.inference.server import Settings, make_app

CASE = "l1_wrist_proprio"


@pytest.mark.long
def test_server_answers_as_the_reference_s():
    exchange = json.loads(golden(f"oft_tiny/{CASE}/server.json").read_text())
    policy = Policy.from_checkpoint(imported(CASE), "float32", preprocessing={"crop_area": 0.9})
    with TestClient(make_app(policy, Settings(max_batch=1))) as client:
        plain = client.post("/act", content=exchange["request"])
        encoded = client.post("/act", json={"encoded": exchange["request"]})
        bad = client.post("/act", json={"instruction": "push"})
    assert [plain.status_code, encoded.status_code, bad.status_code] == [200, 200, 400]
    theirs = json.loads(exchange["response"])
    for answer in (plain.json(), json.loads(encoded.json())):
        assert [(row["dtype"], row["shape"]) for row in answer] == [(row["dtype"], row["shape"]) for row in theirs]
        np.testing.assert_allclose(read_chunk(answer), read_chunk(theirs), rtol=0, atol=5e-5)
    expected = np.load(golden(f"oft_tiny/{CASE}/expected_center_crop.npz"))
    rows = zip(expected["images"], expected["instructions"], expected["state"], strict=True)
    for i, (images, instruction, state) in enumerate(rows):
        seen = Observation(dict(zip(("primary", "wrist"), images, strict=True)), str(instruction), state)
        np.testing.assert_allclose(policy.predict_chunk(seen), expected[f"{i}/actions"], rtol=0, atol=5e-5)
