"""What `alignment_loss` and `decode` ask of a prior."""

from typing import Any, Protocol


class Prior(Protocol):
    """What `alignment_loss` asks of a prior."""

    def predict(
        self,
        tokens: Any,
        *,
        reverse: bool = False,
        num_groups: Any = None,
        positions: Any = None,
        sizes: Any = None,
    ) -> Any:
        """Return for every token the prediction of the one after (or before) it."""


class TwoLayerPrior(Protocol):
    """A prior like `MLPPrior`, to whose weights `alignment_loss` has gradients."""

    def network_weights(self) -> tuple[Any, ...]:
        """Return the weights of both networks, in the order of `MLP`'s fields."""


class SteppingPrior(Protocol):
    """What `decode` asks of a prior that reads one token at a time."""

    def step(
        self, token: Any, state: Any = None, *, position: Any = None, size: Any = None
    ) -> tuple[Any, Any]:
        """Return the prediction (..., D) after a token (..., D), and the new state."""
