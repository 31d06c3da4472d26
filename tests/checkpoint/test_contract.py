"""The contract: what is written is read back, old formats are migrated, and what is wrong is named."""

import copy
import dataclasses
import json

import pytest

from openvla_jax.checkpoint.contract import (
    CONFIG_FILE,
    FORMAT,
    STATISTICS_FILE,
    CheckpointError,
    Contract,
    action_spec,
)
from openvla_jax.config import tiny
from openvla_jax.errors import InputError
from openvla_jax.tokens.tokenizer import load_tokenizer
from openvla_jax.types import ActionSpec, ObservationSpec, Preprocessing

ROW = {"q01": [-1.0, -2.0, 0.0], "q99": [1.0, 2.0, 1.0], "mask": [True, True, False]}
STATE = {"q01": [0.0, 10.0], "q99": [1.0, 20.0], "min": [-1.0, 9.0], "max": [2.0, 21.0], "names": ["x", "gripper"]}
STATISTICS = {"arm": {"action": ROW, "proprio": STATE, "num_transitions": 5}}
# As version 0.1 of the package wrote it.
FORMAT_1 = {
    "format": 1,
    "model": tiny().to_dict() | {"action_bins": 128},
    "preprocessing": {
        "resize_kernel": "bicubic",
        "center_crop": True,
        "jpeg": False,
        "text_length": 48,
        "action_normalization": "bounds_q99",
    },
    "training": {"seed": 7},
    "default_key": "arm",
}


def sized(state):
    """The tiny model with room for the columns of a state."""
    return dataclasses.replace(tiny(), state_dim=len(state))


def written(directory, config, statistics=STATISTICS):
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    (directory / STATISTICS_FILE).write_text(json.dumps(statistics))
    return directory


def test_contract_returns_as_it_was_saved(tmp_path):
    tokenizer = load_tokenizer("tiny")
    contract = Contract(
        dataclasses.replace(tiny(base_vocab_size=tokenizer.vocab_size), cameras=2, state_dim=2),
        tokenizer,
        STATISTICS,
        ObservationSpec(("primary", "wrist"), 180, ("gripper", "x")),
        ActionSpec(dim=3, horizon=8, executed=4, bins=64, names=("x", "y", "gripper"), control_rate=10.0),
        Preprocessing("bicubic", 0.8, True, 40),
        {"seed": 1},
        "arm",
        {"base": "b", "fingerprint": "f", "tuning": {}},
    )
    contract.save(tmp_path)
    loaded = Contract.load(tmp_path)
    assert dataclasses.replace(loaded, tokenizer=None) == dataclasses.replace(contract, tokenizer=None)
    assert loaded.tokenizer.encode("pick up") == tokenizer.encode("pick up")
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["format"] == FORMAT


def test_contract_of_format_1_is_migrated(tmp_path):
    loaded = Contract.load(written(tmp_path, FORMAT_1))
    assert loaded.model == tiny()
    assert loaded.observation == ObservationSpec(("primary",), 0, ())
    assert loaded.action == ActionSpec(dim=3, bins=128, gripper="open", frame="")
    assert loaded.preprocessing == Preprocessing("bicubic", 0.9, False, 48)
    assert (loaded.training, loaded.default_key, loaded.adapter) == ({"seed": 7}, "arm", None)
    plain = copy.deepcopy(FORMAT_1)
    plain["preprocessing"]["center_crop"] = False
    assert Contract.load(written(tmp_path, plain)).preprocessing.crop_area is None
    loaded.save(tmp_path)
    assert Contract.load(tmp_path) == loaded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": FORMAT + 1}, f"contract of format {FORMAT + 1}, this version reads 1 to {FORMAT}"),
        ({"format": None}, "contract of format None"),
        ({"model": None}, "lacks model"),
        ({"cameras": []}, "unknown key 'cameras' in the contract"),
        (
            {"observation": {"camera": ["primary"]}},
            "unknown key 'camera' in observation config; did you mean 'cameras'",
        ),
        ({"action": {"horizn": 2}}, "unknown key 'horizn' in action config; did you mean 'horizon'"),
        ({"action": {"bins": 32000, "dim": 3}}, "action.bins is 32000: the tokenizer of tiny has 32000"),
        ({"action": {"dim": 2}}, "3 action dimensions, but action.dim is 2"),
        ({"preprocessing": {"center_crop": True}}, "unknown key 'center_crop' in preprocessing config"),
        ({"model": {"widht": 1}}, "unknown key 'widht' in model config"),
    ],
)
def test_load_names_what_is_wrong_in_one_line(tmp_path, change, message):
    config = Contract(tiny(), None, STATISTICS).to_dict() | change
    with pytest.raises(CheckpointError) as caught:
        Contract.load(written(tmp_path, config))
    assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_contract_refuses_a_dataset_narrower_than_a_continuous_head(tmp_path):
    model = dataclasses.replace(tiny(), head="l1", action_dim=7)
    config = Contract(tiny(), None, STATISTICS).to_dict()
    config |= {"model": model.to_dict(), "action": {"head": "l1", "dim": 7, "horizon": 2}}
    with pytest.raises(CheckpointError, match="3 action dimensions, but the head 'l1' predicts 7: fix or remove"):
        Contract.load(written(tmp_path, config))


def test_load_names_what_a_contract_of_format_1_lacks(tmp_path):
    config = {key: value for key, value in FORMAT_1.items() if key != "preprocessing"}
    with pytest.raises(CheckpointError, match="of format 1, lacks 'preprocessing'"):
        Contract.load(written(tmp_path, config))


@pytest.mark.parametrize(
    ("changes", "state", "message"),
    [
        ({"action": {}}, (), "action has no rows q01 and q99"),
        ({"action": None}, (), "action has no rows q01 and q99"),
        ({"action": ROW | {"q01": [0.0, None, 0.0]}}, (), "action/q01 is .*not a list of finite numbers"),
        ({"action": ROW | {"q99": [1.0, float("inf"), 1.0]}}, (), "action/q99 is .*not a list of finite numbers"),
        ({"action": ROW | {"q01": [-1.0, 3.0, 0.0]}}, (), "dimension 1 has q01 3.0 above q99 2.0"),
        ({"action": ROW | {"mask": [True]}}, (), "rows of different length"),
        ({"proprio": STATE | {"q01": [0.0]}}, ("x",), "proprio has rows of different length"),
        ({"proprio": {}}, ("x",), "proprio has no rows"),
        ({}, ("y",), "no state column 'y'; known: gripper, x"),
        ({"proprio": STATE | {"names": ["x"]}}, ("x",), r"proprio has 2 columns, the state is \['x'\]"),
        ({"proprio": STATE | {"names": "xy"}}, ("x",), "the state is 'xy': name each column"),
        ({"proprio": STATE | {"names": 7}}, ("x",), "the state is 7: name each column"),
        ({"proprio": STATE | {"q99": [1.0, None]}}, (), "proprio/q99 is .*not a list of finite numbers"),
        *(
            ({"action": ROW | {"q01": row}}, (), "action/q01 is .*not a list of finite numbers")
            for row in (
                [float("nan")] * 3,
                [float("-inf")] * 3,
                [None] * 3,
                None,
                [],
                0.0,
                "123",
                ["1", "2", "3"],
                [[-1.0], [-2.0], [0.0]],
                [True, False, False],
                {"0": 1.0},
                [10**400, 0, 0],
            )
        ),
        *(
            ({"action": ROW | {"mask": mask}}, (), "action/mask is .*not a list of true and false")
            for mask in (True, None, "yes", [1, 1, 0], ["true"] * 3, [[True]] * 3)
        ),
        ({"action": ROW | {"mask": [True, True]}}, (), "action has rows of different length"),
        ({"action": ROW | {"mean": [0.0]}}, (), "action has rows of different length"),
        ({"action": ROW | {"std": [0.1, -0.1, 0.1]}}, (), "dimension 1 has std -0.1, below 0"),
        ({"action": ROW | {"min": [2.0] * 3, "max": [1.0] * 3}}, (), "dimension 0 has min 2.0 above max 1.0"),
        ({"action": [1.0]}, (), "action has no rows q01 and q99"),
    ],
)
def test_contract_refuses_statistics_that_cannot_scale(changes, state, message):
    statistics = {"arm": STATISTICS["arm"] | changes}
    with pytest.raises(CheckpointError, match=f"statistics of 'arm'.*{message}"):
        Contract(sized(state), None, statistics, ObservationSpec(state=state))


def test_contract_takes_statistics_of_dimensions_that_never_change():
    row = {"mean": [0.0] * 7, "std": [0.0] * 7, "min": [0] * 7, "max": [0] * 7, "q01": [0.0] * 7, "q99": [0.0] * 7}
    statistics = {"still": {"action": row, "proprio": {}}}
    assert Contract(tiny(), None, statistics).action_dim("still") == 7
    assert Contract(tiny(), None, statistics, action=ActionSpec(normalization="normal")).action_dim("still") == 7


@pytest.mark.parametrize("statistics", [{"arm": None}, {"arm": 1.0}, {"arm": [ROW]}, {"arm": {"action": ROW}, "b": 3}])
def test_contract_refuses_statistics_of_another_form(statistics):
    with pytest.raises(CheckpointError, match=r"statistics .* object") as caught:
        Contract(tiny(), None, statistics)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row", [0.5, "abc", [], [[1.0]], None])
def test_load_of_format_1_names_statistics_of_another_form(tmp_path, row):
    statistics = {"arm": {"action": ROW | {"q01": row, "mask": row}}}
    with pytest.raises(CheckpointError, match="statistics of 'arm': action/q01 is"):
        Contract.load(written(tmp_path, FORMAT_1, statistics))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (CONFIG_FILE, b""),
        (CONFIG_FILE, b"\xff\xfe{"),
        (CONFIG_FILE, b"[" * 100_000),
        (CONFIG_FILE, b"[]"),
        (CONFIG_FILE, None),
        (STATISTICS_FILE, b"{"),
        (STATISTICS_FILE, None),
        ("tokenizer/tokenizer.json", b"{"),
        ("tokenizer/tokenizer.json", b""),
        ("tokenizer/tokenizer.json", None),
    ],
)
def test_load_names_the_file_that_is_damaged(tmp_path, file, text):
    tokenizer = load_tokenizer("tiny")
    Contract(tiny(base_vocab_size=tokenizer.vocab_size), tokenizer, STATISTICS).save(tmp_path)
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_bytes(text)
    with pytest.raises(InputError) as caught:
        Contract.load(tmp_path)
    assert str(tmp_path / file) in str(caught.value) or (text is None and "tokenizer" in str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"towers": 3}}, {"model": {"towers": [5]}}, {"observation": {"cameras": 3}}, {"format": [2]},
        {"adapter": {"base": "b"}}, {"adapter": 3}, {"default_key": ["arm"]}, {"action": {"names": 5}},
        {"preprocessing": {"resize_kernel": []}},
    ],
)  # fmt: skip
def test_load_names_the_folder_of_a_config_of_another_form(tmp_path, change):
    config = Contract(tiny(), None, STATISTICS).to_dict() | change
    with pytest.raises(CheckpointError, match=str(tmp_path)) as caught:
        Contract.load(written(tmp_path, config))
    assert "\n" not in str(caught.value)


def test_state_statistics_are_in_the_order_of_the_spec():
    state = ("gripper", "x")
    contract = Contract(sized(state), None, STATISTICS, ObservationSpec(state=state))
    assert contract.state_statistics("arm") == {
        "q01": [10.0, 0.0],
        "q99": [20.0, 1.0],
        "min": [9.0, -1.0],
        "max": [21.0, 2.0],
    }


def test_action_spec_guesses_only_what_the_statistics_show():
    seven = {"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    assert action_spec({"a": {"action": seven}}) == ActionSpec(dim=7, gripper="open", frame="delta")
    fourteen = {"q01": [0.0] * 14, "q99": [1.0] * 14, "mask": [True] * 14}
    both = action_spec({"a": {"action": seven}, "b": {"action": fourteen}}, bins=64)
    assert both == ActionSpec(dim=14, gripper="", frame="", bins=64)
    assert action_spec({}) == ActionSpec()
