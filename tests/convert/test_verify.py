"""`verify` passes what is the same and fails what is not, by whatever little; `inspect` says what there is."""

import json

import ml_dtypes
import numpy as np
import pytest
from fabricate import STATISTICS, write_hf, write_native
from safetensors.numpy import load_file, save_file

from openvla_jax.convert import ConversionError, export_weights, import_weights, inspect_weights, verify_weights


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with `hf` and its import `orbax`."""
    root = tmp_path_factory.mktemp("pair")
    write_hf(root / "hf", "dinosiglip", "bfloat16", shards=2)
    import_weights(root / "hf", root / "orbax")
    return root


def changed(pair, dst, name, change):
    """A copy of the HF folder with one tensor changed."""
    export_weights(pair / "hf", dst)
    tensors = load_file(dst / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, dst / "model.safetensors")
    return dst


def test_an_import_passes_and_says_by_how_much(pair):
    report = verify_weights(pair / "hf", pair / "orbax")
    assert report.passed and report.max_logit_difference == 0
    text = str(report)
    assert text.endswith("PASSED")
    assert "tensors of vision/dino: 23 of 23 leaves equal" in text and "tensors of unused/siglip" in text
    assert "mean KL 0" in text and "argmax agreement 100.00%" in text and "actions with bridge_orig: max |d| 0" in text


@pytest.mark.torch
def test_native_and_huggingface_pass(pair, tmp_path):
    pytest.importorskip("torch")
    write_native(tmp_path / "run", "dinosiglip", "bfloat16")
    report = verify_weights(tmp_path / "run", pair / "orbax")
    assert report.passed, str(report)
    assert report.max_logit_difference == 0


def test_one_wrong_number_fails(pair, tmp_path):
    def nudge(x):
        x[3] = np.nextafter(x[3], x.dtype.type(9))
        return x

    other = changed(pair, tmp_path / "other", "vision_backbone.featurizer.norm.weight", nudge)
    report = verify_weights(pair / "hf", other)
    assert not report.passed
    assert "unused/dino/norm/scale differs" in str(report)  # no logit shows it: the policy does not run it
    assert report.max_logit_difference == 0


def test_wrong_weights_fail_by_tensors_logits_tokens_and_actions(pair, tmp_path):
    other = changed(pair, tmp_path / "other", "language_model.lm_head.weight", lambda x: np.ascontiguousarray(x[::-1]))
    failures = " ".join(verify_weights(pair / "orbax", other).failures)
    for text in (
        "params/llama/head/kernel differs",
        "logits differ by",
        "greedy action tokens differ",
        "actions with bridge_orig differ",
    ):
        assert text in failures


@pytest.mark.long
def test_rounding_passes_as_tensors_and_is_judged_by_logits(pair, tmp_path):
    write_hf(tmp_path / "exact", "dinosiglip", "float32")
    fine = verify_weights(tmp_path / "exact", pair / "hf", threshold=10.0)
    assert not [failure for failure in fine.failures if "params" in failure or "unused" in failure]
    assert 1e-5 < fine.max_logit_difference < 0.5
    strict = verify_weights(tmp_path / "exact", pair / "hf", threshold=1e-6)
    assert any("beyond 1e-06" in failure for failure in strict.failures)
    coarse = changed(pair, tmp_path / "coarse", "projector.fc2.weight", lambda x: (x * 1.05).astype(ml_dtypes.bfloat16))
    assert any(
        "fc2/kernel" in failure for failure in verify_weights(tmp_path / "exact", coarse, tensors_only=True).failures
    )


def test_other_models_and_statistics_are_told(pair, tmp_path):
    write_hf(tmp_path / "single", "siglip-letterbox")
    report = verify_weights(pair / "hf", tmp_path / "single")
    assert not report.passed and any(
        "B lacks" in failure and "params/vision/dino" in failure for failure in report.failures
    )
    export_weights(pair / "hf", tmp_path / "stats")
    other = {"bridge_orig": json.loads(json.dumps(STATISTICS["bridge_orig"])), "mine": STATISTICS["bridge_orig"]}
    other["bridge_orig"]["action"]["q99"][0] = 0.7
    (tmp_path / "stats" / "dataset_statistics.json").write_text(json.dumps(other))
    report = verify_weights(pair / "hf", tmp_path / "stats")
    assert "only in B ['mine'], other values ['bridge_orig']" in str(report)
    assert any("actions with bridge_orig differ" in failure for failure in report.failures)
    eps = verify_weights(pair / "hf", pair / "hf", model_config={"llama": {"norm_eps": 1e-3}})
    assert eps.passed  # both sides were told


def test_inspect_tells_model_sizes_and_what_is_missing(pair, tmp_path):
    text = inspect_weights(pair / "hf")
    for wanted in (
        "HuggingFace OpenVLA folder",
        "tower dino: 224 px, patch 14, width 32, depth 3, heads 4",
        "statistics: bridge_orig",
    ):
        assert wanted in text
    assert "bfloat16" in text and "in 130 tensors" in text and "4 assumed" in text
    assert "Orbax checkpoint" in inspect_weights(pair / "orbax")
    for name in ("tokenizer.json", "tokenizer.model"):
        export_weights(pair / "hf", tmp_path / name)
        for file in (tmp_path / name).glob("tokenizer*"):
            file.unlink()
    assert "tokenizer: missing" in inspect_weights(tmp_path / "tokenizer.json")
    with pytest.raises(ConversionError, match="does not exist"):
        inspect_weights(tmp_path / "nowhere")
