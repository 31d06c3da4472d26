"""A run's check of its kernels, on kernels that are interpreted."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from training.batches import ONE_TOWER

from openvla_jax.kernels import flash_attention
from openvla_jax.training.kernel_check import Case, KernelError, check_kernels, disagreement

TOWER = dataclasses.replace(ONE_TOWER.towers[0], width=128, heads=2)
MODEL = dataclasses.replace(
    ONE_TOWER, towers=(TOWER,), llama=dataclasses.replace(ONE_TOWER.llama, width=128, heads=1, kv_heads=1)
)


def test_right_kernels_pass():
    check_kernels(MODEL, 20, jax.devices()[0])
    for causal, masked in itertools.product((False, True), (False, True)):
        assert disagreement(Case(40, 128, 1, 1e4, causal, masked), jax.devices()[0]) < 0.02
    assert disagreement(Case(40, 128, 4, 1e4, True), jax.devices()[0]) is None, "no kernel rotates heads of 32"


@pytest.mark.parametrize("wrong", [lambda x, *_: x, lambda x, *_: np.nan * x], ids=["nothing hidden", "NaN"])
def test_a_wrong_kernel_stops_the_run(monkeypatch, wrong):
    monkeypatch.setattr(flash_attention, "mask_scores", wrong)
    with pytest.raises(
        KernelError, match=r"kernel of (\w+) differs from the compiler's .*--config\.train\.kernels=False"
    ):
        check_kernels(MODEL, 20, jax.devices()[0])


def test_so_does_one_whose_gradients_alone_are_no_numbers(monkeypatch):
    write = flash_attention._Shape.write
    monkeypatch.setattr(
        flash_attention._Shape, "write", lambda shape, *args: write(shape, *args[:-1], np.nan * args[-1])
    )
    with pytest.raises(KernelError, match="by nan%"):
        check_kernels(MODEL, 20, jax.devices()[0])
