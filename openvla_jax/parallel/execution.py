"""How a model runs: on which mesh, with which kernels, what the backward pass recomputes, and what dropout draws."""

import dataclasses

import jax
from jax.sharding import Mesh
from jaxtyping import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Execution:
    """What a forward pass needs to know beside its weights and inputs.

    It is passed explicitly through every layer, so that a train step, an eval step and a plan cannot run differently
    by accident. It is no argument of a compiled function: make it inside, where `dropout_key` may be traced. It has no
    equality for the same reason.

    Attributes:
        mesh: The devices that share the batch and the weights. Without one nothing is constrained.
        kernels: Whether attention may run as a Pallas kernel. Needs a mesh.
        remat: What the backward pass keeps and recomputes, see `models.stack.remat_policy`.
        dropout_key: The key from which adapters draw the inputs to drop. Without one nothing is dropped.
    """

    mesh: Mesh | None = None
    kernels: bool = False
    remat: str = "none"
    dropout_key: Array | None = None

    @property
    def kernel_mesh(self) -> Mesh | None:
        """The mesh if Pallas kernels are enabled, else None (XLA attention).

        A tensor axis disables them, because it splits the heads of a row over chips.
        """
        return self.mesh if self.kernels and self.mesh is not None and self.mesh.shape["tensor"] == 1 else None

    def layer_keys(self, layers: int) -> Array | None:
        """One dropout key for each layer of a stack, or None without dropout."""
        return None if self.dropout_key is None else jax.random.split(self.dropout_key, layers)

    def with_dropout_key(self, key: Array | None) -> "Execution":
        """The same execution with another dropout key."""
        return dataclasses.replace(self, dropout_key=key)


PLAIN = Execution()  # one device, XLA attention, nothing recomputed or dropped
