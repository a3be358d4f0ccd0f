"""What `alignment_loss` and `decode` need of a prior and of merged tokens.

A prior is a model that predicts a merged token from the tokens before it. A class needs
no base class: it needs only the methods.
"""

from typing import Any, Protocol, TypeVar

Array_co = TypeVar("Array_co", bound=Any, covariant=True)


class MergedTokens(Protocol[Array_co]):
    """The fields of a `Merged` that priors and losses read.

    `Merged` itself is declared above this layer, because its methods call stages.
    """

    @property
    def tokens(self) -> Array_co:
        """The merged tokens (B, K, D)."""

    @property
    def sizes(self) -> Any:
        """The number of tokens in each group, (B, K); 0 for padding."""

    @property
    def positions(self) -> Any:
        """The position of each group's last token, (B, K); -1 for padding."""


class Prior(Protocol):
    """The method that `alignment_loss` calls on a prior."""

    def predict(
        self,
        tokens: Any,
        *,
        reverse: bool = False,
        num_groups: Any = None,
        positions: Any = None,
        sizes: Any = None,
    ) -> Any:
        """Return the prediction of the next token for every token, shaped as `tokens`.

        With `reverse`, it is the prediction of the previous token. The shape is (K, D)
        for one sequence, or (B, K, D). `num_groups` is the number of tokens that are
        not padding: an integer for one sequence, or a NumPy array (B,). `positions` and
        `sizes` are those of a `Merged`, or None. All arrays are copies, which the
        method may change. Its result is an array of the library of `tokens` (NumPy or
        CuPy) in a floating dtype.
        """


class TwoLayerPrior(Protocol):
    """A prior like `MLPPrior`: torch and JAX get gradients for its weights."""

    def network_weights(self) -> tuple[Any, ...]:
        """Return eight weights: four of the network `forward`, four of `backward`.

        The four are the fields of `MLP`: weight_in, bias_in, weight_out, bias_out. A
        class without `predict` predicts as an `MLPPrior` of these weights.
        """


class SteppingPrior(Protocol):
    """The method that `decode` calls on a prior that reads one token at a time."""

    def step(
        self, token: Any, state: Any = None, *, position: Any = None, size: Any = None
    ) -> tuple[Any, Any]:
        """Return the prediction (..., D) after a token (..., D) and the new state.

        The arrays, except those of the state, are copies, which the method may change.
        """
