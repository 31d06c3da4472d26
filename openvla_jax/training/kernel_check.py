"""The attention kernel tried on a chip before a run trusts it: it was compiled for TPUs, but never run on one here."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from openvla_jax.config import VLAConfig
from openvla_jax.errors import InputError
from openvla_jax.models.attention import attention, attention_kernel, rope
from openvla_jax.models.sequence import SequenceLayout
from openvla_jax.parallel.execution import Execution
from openvla_jax.parallel.sharding import make_mesh

TOLERANCE = 0.03  # of a norm; both round to bfloat16


class KernelError(InputError):
    """A kernel that a run must not trust, in one line."""


class Case(NamedTuple):
    """Attention of one stack of layers.

    Attributes:
        length: Positions.
        width: Of all heads together.
        heads: Their number.
        theta: Base of the rotary embedding; None: queries and keys are not rotated.
        causal: Whether no query sees later positions.
        masked: Whether some positions are hidden from all queries.
    """

    length: int
    width: int
    heads: int
    theta: float | None = None
    causal: bool = False
    masked: bool = False


def check_kernels(model: VLAConfig, text_length: int, device: jax.Device) -> None:
    """Raises KernelError, naming the flag to set, if a Pallas kernel differs from XLA's attention on `device` by more
    than TOLERANCE, in output or gradient.
    """
    llama = model.llama
    stacks = {tower.name: Case(tower.patches + tower.prefix_tokens, tower.width, tower.heads) for tower in model.towers}
    if llama.heads == llama.kv_heads:
        length, masked = SequenceLayout.of(model).length(text_length), model.is_parallel or model.cameras > 1
        stacks["llama"] = Case(length, llama.width, llama.heads, llama.rope_theta, not model.is_parallel, masked)
    for name, case in stacks.items():
        try:
            difference = disagreement(case, device)
        except jax.errors.JaxRuntimeError as error:
            what = f"does not run: {' '.join(str(error).split())[:200]}"
        else:
            if difference is None or difference < TOLERANCE:  # false if it is NaN
                continue
            what = f"differs from the compiler's attention by {difference:.1%}"
        raise KernelError(
            f"on {device.device_kind} the attention kernel of {name} {what}; go on with --config.train.kernels=False"
        )


def disagreement(case: Case, device: jax.Device) -> float | None:
    """Returns the largest difference, to the norm, of attention's result and gradients; None if no kernel takes the
    shape.
    """
    length, width, heads, theta, causal, masked = case
    mesh = make_mesh({"fsdp": 1}, [device])
    rows = np.random.default_rng(0).standard_normal((4, 2, length, width))
    q, k, v, gradient = (jax.device_put(jnp.asarray(row, jnp.bfloat16), device) for row in rows)
    shown = np.ones((2, length), bool)
    if masked:
        shown[:, length // 2 : length // 2 + 1 + length // 4] = False
    keys = jnp.asarray(shown) if masked else None
    kernel = attention_kernel(q, heads, Execution(mesh, kernels=True), causal=causal, theta=theta, keys=keys)
    if kernel is None:
        return None

    def made_by_compiler(*projections: jax.Array) -> jax.Array:
        q, k, v = (x.reshape(2, length, heads, width // heads) for x in projections)
        if theta is not None:
            q, k = (rope(x, jnp.arange(length)[None], theta) for x in (q, k))
        mask = jnp.ones((1, length, length), bool)
        mask = (jnp.tril(mask) if causal else mask) & shown[:, None]
        return attention(q, k, v, mask).reshape(2, length, width)

    def whole(function):
        mixed, back = jax.vjp(function, q, k, v)
        return [np.asarray(x, np.float32) for x in (mixed, *back(gradient))]

    forms = [lambda *projections: kernel(*projections)]
    if kernel.takes_merged:
        forms.append(lambda *projections: kernel(jnp.concatenate(projections, axis=-1)))
    expected = whole(jax.jit(made_by_compiler))
    pairs = [pair for form in forms for pair in zip(whole(jax.jit(form)), expected, strict=True)]
    # Not Python's max, which passes over a NaN.
    return float(np.max([np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in pairs]))
