"""The interface of the QuickMerge++ paper: classes and signatures of the authors' code.

Arrays may come from any library that supports DLPack, and results return to the same
library. A call of `QuickMergePP` returns losses as plain floats. Methods of the other
classes return them as scalars of the caller's library. If torch or JAX traces an
argument or a weight, every loss that depends on it is an array that can be
differentiated. Two classes have weights: `BidirectionalARAlignment` and `QuickMergePP`.
`qm_cupy.torch` defines all of them as torch modules, and `qm_cupy.jax` registers them
as pytrees.

Axes: B sequences of N tokens of width D are merged to K groups each. For one sequence,
results have no axis B. L is the number of layers that hidden states come from.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays.checks import check_number
from .arrays.conversion import Array, BoolArray, IntArray, convert_inputs
from .autodiff.dispatch import on_callers_stream_unless_traced, tracing_framework
from .pipeline import quickmerge
from .priors.mlp_prior import MLPPrior
from .results import Merged
from .stages.alignment.alignment_loss import alignment_loss, is_traced
from .stages.alignment.decode import decode
from .stages.alignment.models import check_model, check_prior
from .stages.budget import is_ratio, token_budget
from .stages.clustering.cluster_tokens import Method
from .stages.clustering.labels import Order
from .stages.fidelity.fidelity_loss import fidelity_loss
from .stages.saliency.saliency import saliency
from .stages.saliency.self_attention_entropy import self_attention_entropy
from .stages.selection.gumbel_softmax import gumbel_softmax

# The signatures have the argument names of the authors' code. In the functions of this
# library, `K` is `num_groups` (`budget` in `quickmerge`), and `saliency_scores` is
# `saliency`.


class EntropyAwareSaliency:
    """Saliency from self-attention entropy: step 1 of the paper.

    Parameters
    ----------
    embedding_dim : int
        Width D of the tokens.
    num_layers : int, default 12
        Number of layers L of a tuple of hidden states. Tokens that are not a tuple
        represent L equal layers, as in the authors' code: their mean is one layer.

    Examples
    --------
    >>> import numpy as np
    >>> tokens = np.random.default_rng(0).standard_normal((2, 10, 8))
    >>> EntropyAwareSaliency(embedding_dim=8, num_layers=12)(tokens).shape
    (2, 10)
    """

    def __init__(self, embedding_dim: int, num_layers: int = 12) -> None:
        self.embedding_dim = embedding_dim
        self.num_layers = num_layers

    def __call__(self, tokens: Array, *, mask: BoolArray | None = None) -> Array:
        """Return the saliency (B, N) of tokens (B, N, D), or of a tuple of layers."""
        layers = tokens if isinstance(tokens, tuple) else (tokens,)
        if isinstance(tokens, tuple) and len(tokens) != self.num_layers:
            raise ValueError(
                f"`tokens` must have L = {self.num_layers} layers, got {len(tokens)}: "
                "L is the `num_layers` of this object"
            )
        for x in layers:
            # `self_attention_entropy` raises a clear error for values without a shape.
            shape: tuple[int, ...] = getattr(x, "shape", ())
            if shape and shape[-1] != self.embedding_dim:
                raise ValueError(
                    f"`tokens` must have width D = {self.embedding_dim}, got "
                    f"{shape[-1]}: D is the `embedding_dim` of this object"
                )
            if len(shape) > 3:
                raise ValueError(
                    "`tokens` must be (N, D), (B, N, D) or a tuple of layers, got one "
                    f"array of shape {tuple(shape)}: pass `tuple(tokens)`"
                )
        entropy = self_attention_entropy(tokens, mask=mask)
        # s_i = 1 - (1/L) Σ_l Normalize(H_i^(l)): low entropy is salient. H_i is the
        # entropy of token i. Normalize is min–max scaling over a sequence.
        return saliency(entropy, mask=mask)


class DifferentiableTokenMerging:
    """Gumbel-softmax selection, clustering and weighted merging: step 2 of the paper.

    Parameters
    ----------
    temperature : float, default 0.1
        Temperature of the Gumbel-softmax. A lower value is more discrete.
    epsilon : float, default 0.01
        Weight ε of a token that is not selected, as in `saliency_mass`.
    method, order : str
        As in `cluster_tokens`.
    seed : int or None, default 0
        Seed of the Gumbel noise. The same seed gives the same result in every call.
        With None there is no noise.

    Examples
    --------
    >>> import numpy as np
    >>> tokens = np.random.default_rng(0).standard_normal((2, 10, 8))
    >>> scores = np.ones((2, 10))
    >>> merged, mask = DifferentiableTokenMerging()(tokens, scores, K=4)
    >>> merged.shape, mask.shape
    ((2, 4, 8), (2, 10))
    """

    def __init__(
        self,
        temperature: float = 0.1,
        epsilon: float = 0.01,
        *,
        method: Method = "average",
        order: Order = "last",
        seed: int | None = 0,
    ) -> None:
        self.temperature = temperature
        self.epsilon = epsilon
        self.method = method
        self.order = order
        self.seed = seed

    def __call__(
        self,
        tokens: Array,
        saliency_scores: Array,
        K: Any,
        *,
        mask: BoolArray | None = None,
    ) -> tuple[Array, Array]:
        """Return merged tokens (B, K, D) and selection probabilities (B, N)."""
        merged = self.merge(tokens, saliency_scores, K, mask=mask)
        # The seed is the same, so these are the probabilities of the merge.
        probabilities = gumbel_softmax(
            saliency_scores, temperature=self.temperature, seed=self.seed, mask=mask
        )
        return merged.tokens, probabilities

    def merge(
        self,
        tokens: Array,
        saliency_scores: Array,
        K: Any,
        *,
        mask: BoolArray | None = None,
    ) -> Merged[Array]:
        """Return the complete `Merged` result, with labels, sizes and positions."""
        return quickmerge(
            tokens,
            K,
            saliency=saliency_scores,
            mask=mask,
            method=self.method,
            order=self.order,
            temperature=self.temperature,
            epsilon=self.epsilon,
            weights="mass",
            noise_seed=self.seed,
        )


class BidirectionalARAlignment:
    """Autoregressive alignment under a two-layer prior: step 3 of the paper.

    Parameters
    ----------
    embedding_dim : int
        Width D of the tokens.
    hidden_dim : int, default 256
        Width of the prior's hidden layer.
    seed : int, default 0
        Seed of the prior's random weights.
    prior : Prior, optional
        A prior to use instead, such as an `MLPPrior` with your own weights.

    Examples
    --------
    >>> import numpy as np
    >>> alignment = BidirectionalARAlignment(embedding_dim=8)
    >>> float(alignment.compute_alignment_loss(np.zeros((2, 1, 8))))
    0.0
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden_dim: int = 256,
        *,
        seed: int = 0,
        prior: Any = None,
    ) -> None:
        self.embedding_dim = embedding_dim
        if prior is None:  # Linear(D, H), ReLU, Linear(H, D) for each direction
            prior = MLPPrior.init(embedding_dim, hidden_dim=hidden_dim, seed=seed)
        check_prior(prior)
        self.prior = prior

    def forward_loss(self, merged: Array, *, num_groups: Any = None) -> Array:
        """Return the left-to-right loss, the mean over the batch."""
        return self._mean_loss(merged, num_groups, "forward")

    def backward_loss(self, merged: Array, *, num_groups: Any = None) -> Array:
        """Return the right-to-left loss, the mean over the batch."""
        return self._mean_loss(merged, num_groups, "backward")

    def compute_alignment_loss(self, merged: Array, *, num_groups: Any = None) -> Array:
        """Return the sum of both losses, the mean over the batch."""
        return self._mean_loss(merged, num_groups, "total")

    def _mean_loss(self, merged: Any, num_groups: Any, which: str) -> Any:
        return mean_alignment_loss(merged, self.prior, num_groups, which)


@on_callers_stream_unless_traced
def mean_alignment_loss(merged: Any, prior: Any, num_groups: Any, which: str) -> Any:
    """Return one of the losses of `alignment_loss`, the mean over the batch.

    `which` is "forward", "backward" or "total".
    """
    convert_back = None
    # Traced arrays are not converted, because their framework must record all
    # operations.
    if not is_traced(merged, prior):
        convert_back, merged, num_groups = convert_inputs(
            {"merged": merged}, counts={"num_groups": num_groups}
        )
    loss = getattr(alignment_loss(merged, prior, num_groups=num_groups), which)  # (B,)
    mean = loss.sum() / max(math.prod(loss.shape), 1)  # 0 for an empty batch
    return mean if convert_back is None else convert_back(mean)


class NormBasedFidelityConstraint:
    """Norm-mass fidelity constraint: step 4 of the paper.

    Parameters
    ----------
    gamma : float, default 0.8
        Fraction γ of the norm mass to retain.

    Examples
    --------
    >>> import numpy as np
    >>> constraint = NormBasedFidelityConstraint(gamma=0.8)
    >>> float(constraint.compute_fidelity_loss(np.ones((4, 2)), np.ones((1, 2))))
    0.0
    """

    def __init__(self, gamma: float = 0.8) -> None:
        self.gamma = gamma

    def compute_fidelity_loss(
        self,
        tokens: Array,
        merged: Array,
        *,
        labels: IntArray | None = None,
        mask: BoolArray | None = None,
    ) -> Array:
        """Return the mean excess of the reconstruction error over its bound."""
        # mean over the sequences X of max(0, ‖X - X̂‖² / ‖X‖² - (1 - γ)²). In X̂, each
        # token is replaced by the merged token of its group or, without labels, by the
        # merged token with the greatest cosine similarity.
        return fidelity_loss(tokens, merged, labels=labels, gamma=self.gamma, mask=mask)


class QuickMergePP:
    """All four steps of the paper: merged tokens and their losses.

    Parameters
    ----------
    embedding_dim : int
        Width D of the tokens.
    num_layers : int, default 12
        As in `EntropyAwareSaliency`.
    temperature, gamma, epsilon : float
        As in `DifferentiableTokenMerging` and `NormBasedFidelityConstraint`.
    method, order, seed
        As in `DifferentiableTokenMerging`. The seed also determines the weights of the
        prior. If `seed` is None, the weights are drawn with seed 0.

    Examples
    --------
    >>> import numpy as np
    >>> tokens = np.random.default_rng(0).standard_normal((2, 100, 16))
    >>> merged, losses = QuickMergePP(embedding_dim=16)(tokens, 20)
    >>> merged.shape, sorted(losses)
    ((2, 20, 16), ['ar_alignment', 'fidelity', 'total'])
    """

    def __init__(
        self,
        embedding_dim: int,
        num_layers: int = 12,
        temperature: float = 0.1,
        gamma: float = 0.8,
        epsilon: float = 0.01,
        *,
        method: Method = "average",
        order: Order = "last",
        seed: int | None = 0,
    ) -> None:
        self.embedding_dim = embedding_dim
        self.saliency_estimator = EntropyAwareSaliency(embedding_dim, num_layers)
        self.token_merger = DifferentiableTokenMerging(
            temperature, epsilon, method=method, order=order, seed=seed
        )
        self.ar_alignment = BidirectionalARAlignment(embedding_dim, seed=seed or 0)
        self.fidelity_constraint = NormBasedFidelityConstraint(gamma)

    def __call__(
        self,
        tokens: Array,
        K: Any,
        alpha: float = 0.1,
        *,
        mask: BoolArray | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Merge tokens to K; total loss = alpha · alignment + fidelity.

        Parameters
        ----------
        tokens : ndarray of shape (N, D) or (B, N, D)
            Token embeddings.
        K : int or ndarray of int of shape (B,)
            Groups to keep.
        alpha : float, default 0.1
            Weight of the alignment loss.
        mask : ndarray of shape (N,) or (B, N), optional
            Boolean or integer, True or 1 = token.

        Returns
        -------
        merged : ndarray of shape (K, D) or (B, K, D)
            Merged tokens.
        losses : dict
            "ar_alignment", "fidelity" and "total". Each is a float, or an array if it
            depends on tokens or a prior that a framework traces.
        """
        return merge_with_losses(self, tokens, K, alpha, mask, _as_float)

    def inference(
        self, tokens: Array, K: int, ar_model: Callable[[Any], Any] | None = None
    ) -> tuple[Array, Any]:
        """Return merged tokens (K, D) and a model's predictions (K, E) for them.

        Without a model the predictions are an empty list.
        """
        if ar_model is not None:
            check_model(ar_model)
        merged = self.token_merger.merge(tokens, self.saliency_estimator(tokens), K)
        x = merged.tokens
        return x, [] if ar_model is None else decode(x, ar_model)


def _as_float(loss: Any) -> Any:
    """Return a loss as a float, unless a framework traces it."""
    # `float` of a traced loss would end its graph, or fail under `jax.jit`.
    return float(loss) if tracing_framework((loss,)) is None else loss


def merge_with_losses(
    model: Any,
    tokens: Any,
    num_groups: Any,
    alpha: float,
    mask: Any,
    convert: Callable[[Any], Any],
) -> tuple[Any, dict[str, Any]]:
    """Return the merged tokens and the losses of a `QuickMergePP`.

    `convert` is applied to each loss. The class in `qm_cupy.torch` calls this function
    too.
    """
    scores = model.saliency_estimator(tokens, mask=mask)  # (B, N)
    merged = model.token_merger.merge(tokens, scores, num_groups, mask=mask)
    if is_ratio(num_groups):  # K follows from the number of tokens
        num_groups = merged.tokens.shape[-2] if mask is None else _counts(merged)
    # L_AR = L_forward + L_backward, the mean over the batch
    align = model.ar_alignment.compute_alignment_loss
    alignment = convert(align(merged.tokens, num_groups=num_groups))
    constrain = model.fidelity_constraint.compute_fidelity_loss
    # With labels, the reconstruction X̂ of a token is the merged token of its group.
    error = constrain(tokens, merged.tokens, labels=merged.labels, mask=mask)
    fidelity = convert(error)
    losses = {  # total loss of the paper: α · L_AR + L_fidelity
        "ar_alignment": alignment,
        "fidelity": fidelity,
        "total": alpha * alignment + fidelity,
    }
    return merged.tokens, losses


def _counts(merged: Merged[Any]) -> Any:
    """Return K of each sequence (B,)."""
    if tracing_framework((merged.tokens,)) is not None:
        return merged.valid.sum(-1)
    return np.count_nonzero(convert_inputs({}, counts={"sizes": merged.sizes})[1], -1)


def quickmerge_inference(
    tokens: Array, ar_model: Callable[[Any], Any] | None, entropy_budget: float = 0.5
) -> tuple[Array, Any]:
    """Merge one sequence to a fraction of its tokens and decode it left to right.

    Parameters
    ----------
    tokens : ndarray of shape (N, D)
        Token embeddings.
    ar_model : callable or None
        Maps a prefix (t, D) to (t, E), for example a `torch.nn.Module`; as in `decode`.
    entropy_budget : float, default 0.5
        Fraction of the tokens to keep, within (0, 1].

    Returns
    -------
    merged : ndarray of shape (K, D)
        Merged tokens, K = max(1, ⌊N·entropy_budget⌋).
    predictions : ndarray of shape (K, E)
        The model's prediction after each token; an empty list without a model.

    Raises
    ------
    ValueError
        If the shape is not (N, D) or the budget lies outside (0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> tokens = np.random.default_rng(0).standard_normal((100, 16))
    >>> merged, predictions = quickmerge_inference(tokens, np.tanh, entropy_budget=0.2)
    >>> merged.shape, predictions.shape
    ((20, 16), (20, 16))
    """
    shape: tuple[int, ...] = getattr(tokens, "shape", ())
    if len(shape) != 2:
        raise ValueError(f"`tokens` must have shape (N, D), got {tuple(shape)}")
    ratio = check_number("entropy_budget", entropy_budget, 0, 1, "(]")
    # The defaults of the class: average linkage, seed 0, low entropy is salient.
    model = QuickMergePP(embedding_dim=shape[1])
    return model.inference(tokens, token_budget(ratio, shape[0]), ar_model)
