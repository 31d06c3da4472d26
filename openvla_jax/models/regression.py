"""The parameters of continuous action heads, and the noise schedule of the diffusion head (OpenVLA-OFT).

`models/heads.py` says how they are trained and used.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from openvla_jax.models.activations import ACTIVATIONS
from openvla_jax.models.linear import Linear
from openvla_jax.models.norms import LayerNorm
from openvla_jax.parallel.execution import Execution

NOISE_STEPS = 50  # of the diffusion that the head is trained on
_EPS = 1e-5  # of the head's layer norms; the towers' is 1e-6


class ResidualBlock(nnx.Module):
    """x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, key, width: int):
        self.norm = LayerNorm(width, _EPS)
        self.fc = Linear(key, width, width, ("embed", "mlp"), bias=True)

    def __call__(self, x: Float[Array, "... D"], execution: Execution) -> Float[Array, "... D"]:
        return x + jax.nn.relu(self.fc(self.norm(x), execution))


class MLPResNet(nnx.Module):
    """Hidden states of one action, side by side [..., A * D], to the action [..., A] or to its noise."""

    def __init__(self, key, width: int, action_dim: int, blocks: int = 2):
        keys = jax.random.split(key, blocks + 2)
        self.norm1 = LayerNorm(action_dim * width, _EPS)
        self.fc1 = Linear(keys[0], action_dim * width, width, ("embed", "mlp"), bias=True)
        self.residuals = nnx.List([ResidualBlock(key, width) for key in keys[2:]])
        self.norm2 = LayerNorm(width, _EPS)
        self.fc2 = Linear(keys[1], width, action_dim, ("embed", "state"), bias=True)

    def __call__(self, x: Float[Array, "... AD"], execution: Execution) -> Float[Array, "... A"]:
        x = jax.nn.relu(self.fc1(self.norm1(x), execution))
        for block in self.residuals:
            x = block(x, execution)
        return self.fc2(self.norm2(x), execution)


class NoisyActionProjector(nnx.Module):
    """Each number of a noisy chunk [B, N] as an embedding [B, N, D]: two layers with exact GELU between them."""

    def __init__(self, key, width: int):
        keys = jax.random.split(key)
        self.fc1 = Linear(keys[0], 1, width, ("state", "embed"), bias=True)
        self.fc2 = Linear(keys[1], width, width, ("embed", "mlp"), bias=True)

    def __call__(self, values: Float[Array, "B N"], execution: Execution) -> Float[Array, "B N D"]:
        return self.fc2(ACTIVATIONS["gelu"](self.fc1(values[..., None], execution)), execution)


def embed_timestep(timestep: Int[Array, "B"], width: int) -> Float[Array, "B D"]:
    """Returns the sinusoidal embedding of diffusion timesteps, float32, [sin | cos]."""
    half = width // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / (half - 1)).astype(np.float32)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def kept_signal() -> np.ndarray:
    """Returns the share of variance that is signal after each timestep, float64 [NOISE_STEPS]: the squared-cosine
    schedule (`squaredcos_cap_v2` of diffusers).
    """
    share = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    steps = np.arange(NOISE_STEPS)
    betas = np.minimum(1 - share((steps + 1) / NOISE_STEPS) / share(steps / NOISE_STEPS), 0.999)
    return np.cumprod(1 - betas)


def add_noise(
    actions: Float[Array, "B K A"], noise: Float[Array, "B K A"], timestep: Int[Array, "B"]
) -> Float[Array, "B K A"]:
    """Returns the noisy chunk of each row at its timestep."""
    kept = jnp.asarray(kept_signal(), jnp.float32)[timestep][:, None, None]
    return jnp.sqrt(kept) * actions + jnp.sqrt(1 - kept) * noise


def sampling_timesteps(steps: int) -> np.ndarray:
    """Returns the timesteps of a DDIM sampler of `steps` steps, descending, "leading" spacing."""
    return np.arange(steps)[::-1] * (NOISE_STEPS // steps)


def denoise(
    noisy: Float[Array, "B K A"], noise: Float[Array, "B K A"], timestep: Int[Array, ""], steps: int
) -> Float[Array, "B K A"]:
    """Returns the chunk after one deterministic DDIM step from `timestep`, given the predicted noise.

    The predicted clean chunk is clipped to [-1, 1]; the noise is not adjusted to that (diffusers' defaults).
    """
    table = jnp.asarray(kept_signal(), jnp.float32)
    before = timestep - NOISE_STEPS // steps
    kept, kept_before = table[timestep], jnp.where(before >= 0, table[jnp.maximum(before, 0)], 1.0)
    clean = jnp.clip((noisy - jnp.sqrt(1 - kept) * noise) / jnp.sqrt(kept), -1, 1)
    return jnp.sqrt(kept_before) * clean + jnp.sqrt(1 - kept_before) * noise
