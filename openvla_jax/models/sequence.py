"""Where everything stands in the language model's sequence. All arithmetic on positions is done here.

    BOS | patches of camera 0 | ... of camera C-1 | state token | timestep token | text 1 .. text T-1

Positions in a `Batch` and in prompts count text tokens, BOS first. The prefix (patches, state and the timestep of a
diffusion head) stands between BOS and the rest of the text, so text token i > 0 stands at position `prefix + i`. Text
is padded on the right.

Heads that predict token by token use causal attention. The others predict a chunk at once: the text ends with an
action slot for each number of the chunk and the end token, and every position attends to all that are no pads.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from openvla_jax.config import VLAConfig
from openvla_jax.models.linear import matmul_precision


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """The sequence of one model.

    Attributes:
        patches: Patches of one camera.
        cameras: Number of cameras.
        state: Whether a token for the state follows the patches.
        timestep: Whether a token for the diffusion timestep follows that.
        bidirectional: Whether positions attend to later ones too.
    """

    patches: int
    cameras: int = 1
    state: bool = False
    timestep: bool = False
    bidirectional: bool = False

    @classmethod
    def of(cls, config: VLAConfig) -> "SequenceLayout":
        """Returns the layout of a model."""
        diffusion = config.head == "diffusion"
        return cls(config.patches, config.cameras, config.state_dim > 0, diffusion, config.is_parallel)

    @property
    def prefix(self) -> int:
        """Positions between BOS and the rest of the text."""
        return self.cameras * self.patches + self.state + self.timestep

    def length(self, text: int) -> int:
        """Returns the positions of a sequence with `text` tokens of text."""
        return self.prefix + text

    def position(self, index: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """Returns where text token `index` >= 1 stands."""
        return index + self.prefix

    def predictor(self, index: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """Returns the position whose output predicts text token `index` >= 1."""
        return index + (self.prefix - 1)

    def join(
        self,
        text: Float[Array, "B T D"],
        patches: Float[Array, "B P D"],
        state: Float[Array, "B D"] | None = None,
        timestep: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Returns the sequence's embeddings. `patches` holds the patches of all cameras, one camera after the other.

        Raises ValueError for other parts than the layout's.
        """
        if patches.shape[1] != self.cameras * self.patches:
            raise ValueError(f"{patches.shape[1]} patches: the layout has {self.cameras} cameras of {self.patches}")
        for name, token in {"state": state, "timestep": timestep}.items():
            if (token is not None) != getattr(self, name):
                raise ValueError(f"{'a' if token is not None else 'no'} {name} token: the layout differs")
        tokens = [token[:, None] for token in (state, timestep) if token is not None]
        return jnp.concatenate([text[:, :1], patches, *tokens, text[:, 1:]], axis=1)

    def of_text(self, x: Float[Array, "B S V"]) -> Float[Array, "B T V"]:
        """Returns the rows at the text's positions, for outputs: the first row predicts text token 1."""
        return x[:, self.prefix :]

    def visible(
        self, text: Bool[Array, "B T"], cameras: Bool[Array | np.ndarray, "B C"] | None = None
    ) -> Bool[Array, "B S"]:
        """Returns which positions may be attended to: text as given, no patch of a camera that a row does not have."""
        rows = text.shape[0]
        shown = jnp.ones((rows, self.cameras), bool) if cameras is None else jnp.asarray(cameras)
        prefix = [jnp.repeat(shown, self.patches, axis=1), jnp.ones((rows, self.state + self.timestep), bool)]
        return jnp.concatenate([text[:, :1], *prefix, text[:, 1:]], axis=1)


def put_positions(
    x: Float[Array, "B S D"], positions: Int[Array, "B N"], rows: Float[Array, "B N D"] | None
) -> Float[Array, "B S D"]:
    """Returns x with `rows` at `positions`, which differ from each other; zeros there without `rows`."""
    place = jax.nn.one_hot(positions, x.shape[1], dtype=x.dtype)
    kept = x * (1 - place.sum(axis=1))[..., None]
    if rows is None:
        return kept
    return kept + jnp.einsum("BNS,BND->BSD", place, rows, precision=matmul_precision(x.dtype))


def take_positions(x: Float[Array, "B S D"], positions: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    """Returns the rows of x at `positions`.

    A product with rows of an identity, exact in any dtype: the gradient of a gather is a scatter, which is slow on
    TPUs, and wrong when the compiler splits it over two mesh axes.
    """
    pick = jax.nn.one_hot(positions, x.shape[1], dtype=x.dtype)
    return jnp.einsum("BNS,BSD->BND", pick, x, precision=matmul_precision(x.dtype))
