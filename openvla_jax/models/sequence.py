"""Where everything stands in the language model's sequence. All arithmetic on positions is done here.

    BOS | patches of camera 0 | ... of camera C-1 | state token | text 1 .. text T-1

Positions in a `Batch` and in prompts count text tokens, BOS first. The prefix (patches and state) stands between BOS
and the rest of the text, so text token i > 0 stands at position `prefix + i`. Attention is causal; text is padded on
the right, so no real token sees a pad.
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
    """

    patches: int
    cameras: int = 1
    state: bool = False

    @classmethod
    def of(cls, config: VLAConfig) -> "SequenceLayout":
        """Returns the layout of a model."""
        return cls(config.patches, config.cameras, config.state_dim > 0)

    @property
    def prefix(self) -> int:
        """Positions between BOS and the rest of the text."""
        return self.cameras * self.patches + self.state

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
        self, text: Float[Array, "B T D"], patches: Float[Array, "B P D"], state: Float[Array, "B 1 D"] | None
    ) -> Float[Array, "B S D"]:
        """Returns the sequence's embeddings. `patches` holds the patches of all cameras, one camera after the other."""
        parts = [text[:, :1], patches, *([] if state is None else [state]), text[:, 1:]]
        x = jnp.concatenate(parts, axis=1)
        if x.shape[1] != self.length(text.shape[1]):
            raise ValueError(
                f"{patches.shape[1]} patches and {'a' if state is not None else 'no'} state token: the layout has "
                f"{self.cameras} cameras of {self.patches} patches and {'a' if self.state else 'no'} state token"
            )
        return x

    def of_text(self, x: Float[Array, "B S V"]) -> Float[Array, "B T V"]:
        """Returns the rows at the text's positions, for outputs: the first row predicts text token 1."""
        return x[:, self.prefix :]

    def visible(
        self, text: Bool[Array, "B T"], cameras: Bool[Array | np.ndarray, "B C"] | None = None
    ) -> Bool[Array, "B S"]:
        """Returns which positions may be attended to: text as given, no patch of a camera that a row does not have."""
        rows = text.shape[0]
        shown = jnp.ones((rows, self.cameras), bool) if cameras is None else jnp.asarray(cameras)
        prefix = [jnp.repeat(shown, self.patches, axis=1), jnp.ones((rows, int(self.state)), bool)]
        return jnp.concatenate([text[:, :1], *prefix, text[:, 1:]], axis=1)


def take_positions(x: Float[Array, "B S D"], positions: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    """Returns the rows of x at `positions`.

    A product with rows of an identity, exact in any dtype: the gradient of a gather is a scatter, which is slow on
    TPUs, and wrong when the compiler splits it over two mesh axes.
    """
    pick = jax.nn.one_hot(positions, x.shape[1], dtype=x.dtype)
    return jnp.einsum("BNS,BSD->BND", pick, x, precision=matmul_precision(x.dtype))
