"""The pipeline: merge token sequences into shorter ones."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .arrays.checks import (
    check_axes,
    check_choice,
    check_is_array,
    check_mask,
    check_mass,
    check_seed,
    check_shape,
    check_tokens,
)
from .arrays.conversion import Array, BoolArray, FloatArray, convert_inputs
from .arrays.dtypes import accumulation_dtype
from .arrays.libraries import is_cuda
from .arrays.protect import protected_tokens, split_positions
from .autodiff.dispatch import on_callers_stream_unless_traced, tracing_framework
from .autodiff.operations import plain_integer
from .composition import (
    COMPUTE_STAGES,
    Options,
    Weights,
    compose,
    traced_stages,
    with_defaults,
)
from .cuda.launch import contiguous
from .cuda.workspace import Workspace, memory_of
from .group_counts import num_groups_of, traced_num_groups
from .memory import check_quickmerge_memory
from .progress import span
from .results import Merged, arrays_of, check_target
from .sources import (
    Sources,
    check_causal_attention,
    check_causal_sources,
    check_sources,
    checked_scale,
    lift_sources,
)
from .stage_progress import with_progress
from .stages.clustering.checks import (
    check_limits,
    check_step,
    check_weighted_linkage,
)
from .stages.clustering.cluster_tokens import (
    METHODS,
    Method,
)
from .stages.clustering.labels import ORDERS, Order
from .stages.clustering.metrics import METRICS, Metric
from .stages.selection.gumbel_noise import check_noise
from .stages.selection.gumbel_softmax import (
    check_temperature,
)
from .stages.selection.saliency_mass import (
    check_epsilon,
)


@on_callers_stream_unless_traced
def quickmerge(
    tokens: Array,
    budget: Any = None,
    *,
    max_error: float | None = None,
    max_distance: float | None = None,
    hidden_states: FloatArray | None = None,
    attention: FloatArray | None = None,
    query: FloatArray | None = None,
    key: FloatArray | None = None,
    saliency: FloatArray | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: BoolArray | None = None,
    protect: BoolArray | Sequence[int] | None = None,
    method: Method | None = None,
    metric: Metric = "cosine",
    step: int | None = None,
    order: Order = "last",
    temperature: float = 0.1,
    epsilon: float = 0.01,
    weights: Weights | FloatArray | None = None,
    weighted_linkage: bool | None = None,
    noise_seed: int | None = None,
    sequence_offset: int = 0,
    out: Merged[Array] | None = None,
    workspace: Workspace | None = None,
) -> Merged[Array]:
    """Merge token sequences into fewer tokens that a model can read instead.

    Tokens are put into groups by their similarity, and each group becomes the weighted
    mean of its tokens. If you pass only tokens, the groups come from average linkage
    and all weights are 1. If you also pass the attention of a model, or its queries and
    keys, the groups come from ward linkage, and `attention_mass` computes the weights
    of the linkage and of the mean: a token weighs more if other tokens attend to it,
    and if it attends to few tokens. The steps of the paper [1]_ are
    ``weights="mass"`` with a `noise_seed`. By default, merged tokens are in causal
    order: a merged token contains no token that comes after its own position.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings, B sequences of N tokens of width D; float16, bfloat16, float32
        or float64.
    budget : number or ndarray of int of shape (B,), optional
        How many groups to keep: their number K, a fraction within (0, 1] of the tokens
        (as in `token_budget`), or K of each sequence (for example from `norm_budget`).
        If K differs between sequences, results are padded to the largest K. Exactly one
        of `budget`, `max_error` and `max_distance` is required.
    max_error : float, optional
        For ward linkage, which is then the default: as few groups as possible whose
        squared error per unit token is at most this, as in `cluster_tokens`. For
        "euclidean" it is the error of the tokens, in the square of their unit.
    max_distance : float, optional
        Merge groups whose distance is at most this, as in `cluster_tokens`. If weights
        enter ward linkage (`weighted_linkage`), they are divided by their mean first.
    hidden_states : ndarray of shape (B, N, D), or a tuple of them, optional
        Source of the saliency: the self-attention entropy of these states, or of those
        of each layer. By default `tokens` are the source. At most one source may be
        given. For one sequence the axis B is absent, here and in the following
        arguments. The saliency is computed only if `weights` or `method` needs it.
        Otherwise the shape of the source is checked and its values are not read.
    attention : ndarray of shape (B, N, N), (B, H, N, N) or (L, B, H, N, N), optional
        Another source: attention probabilities of a model with H heads. Their entropy
        is used, and the attention that each token receives. Or a tuple of layers,
        (B, N, N) or (B, H, N, N), such as the ``attentions`` of a model. Their means
        are used; pass the last layer before the merge, ``attentions[-1]``, for the
        weights "attention".
    query, key : ndarray of shape (B, N, d), (B, H, N, d) or (L, B, H, N, d), optional
        Another source: the attention of these queries to these keys, which have width
        d. Or two tuples of layers. Keys may have fewer heads, as in
        `query_key_entropy`.
    saliency : ndarray of shape (B, N), optional
        The saliency itself instead of a source, for example from `norm_saliency`;
        float, ≥ 0.
    causal : bool, default False
        Whether the attention of the source is causal: token i attends only to tokens
        0..i, as in language models. Pass True for such a model: otherwise early tokens
        get far too large weights, because many tokens attend to them, and they attend
        to few. Queries and keys are masked accordingly; entries of `attention` after
        the diagonal must be 0 (NumPy arrays and tensors that no framework traces are
        checked).
    scale : float, optional
        The factor of the scores of `query` and `key`, 1/√d by default.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean or integer, True or 1 = token, as in a tokenizer's ``attention_mask``.
        Padding is not read: it may be NaN.
    protect : ndarray of shape (N,) or (B, N), or sequence of int, optional
        Tokens that stay groups of their own: boolean, True = protected, or positions
        such as ``[0]``, as in `cluster_tokens`. The budget counts protected tokens.
    method : str, optional
        As in `cluster_tokens`. The default is "ward" if the weights are "attention",
        and otherwise "average". For "nearest", the K anchors are the protected tokens
        and the tokens of greatest saliency, to which a `noise_seed` adds Gumbel noise.
    metric : {"cosine", "euclidean"}, default "cosine"
        As in `cluster_tokens`: by cosines, or by distances, which depend on the lengths
        of tokens too (for example for patches of pictures).
    step : int, optional
        As in `cluster_tokens`, for "bipartite".
    order : {"last", "first"}, default "last"
        As in `cluster_tokens`.
    temperature : float, default 0.1
        As in `gumbel_softmax`, for the weights "mass".
    epsilon : float, default 0.01
        As in `saliency_mass`, for the weights "mass".
    weights : str or ndarray of shape (B, N), optional
        Weights of the tokens in the mean of their group; an array is float, ≥ 0.
        "uniform": 1, the default if no source is given.
        "saliency": the saliency, the default for `hidden_states` and `saliency`.
        "attention": the result of `attention_mass`, the default for `attention`, or
        `query` and `key`. Pass those of the last layer before the merge.
        "mass": the saliency mass of the paper.
    weighted_linkage : bool, optional
        Whether the weights are also the tokens' masses in the clustering, as `mass` in
        `linkage`. Only for "average" and "ward", where the default is True if the
        weights are "attention". Otherwise the default is False.
    noise_seed : int, optional
        Seed of the Gumbel noise of the weights "mass" and of the anchors of "nearest",
        as `seed` in `gumbel_softmax`. By default there is no noise.
    sequence_offset : int, default 0
        Index of sequence 0 in the noise, as in `gumbel_noise`.
    out : Merged, optional
        Arrays to write the results to: the result of an earlier call with the same
        shapes, dtypes and budget. JAX arrays cannot be written.
    workspace : Workspace, optional
        Memory for intermediate results. With a workspace, `out` and an integer
        `budget`, the second and later calls on a GPU allocate no memory, and a CUDA
        graph can capture them; see `Workspace`.

    Returns
    -------
    Merged
        Named tuple of ``tokens``, ``labels``, ``sizes``, ``positions`` and ``mass``,
        the weights.

    Raises
    ------
    TypeError
        If a dtype is wrong or the arrays come from several libraries.
    ValueError
        If a shape is wrong, an entry is not finite, the budget is out of range or too
        small for the protected tokens, more than one source of saliency is given, or
        the weights are "attention" and the source has no attention.
    MemoryError
        If the CPU has not enough memory. Linkage needs about 8 N² bytes.

    References
    ----------
    .. [1] D. Liu and Y. Yu, "QuickMerge++: Token merging with autoregressive prior",
       arXiv:2508.13204, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> tokens = np.random.default_rng(0).standard_normal((2, 100, 16))
    >>> merged = quickmerge(tokens, 0.2)
    >>> merged.tokens.shape, int(merged.sizes.sum())
    ((2, 20, 16), 200)
    """
    sources = Sources(hidden_states, attention, query, key, saliency)
    check_sources(sources)
    method, weights, weighted_linkage = with_defaults(
        sources, method, weights, weighted_linkage, max_error
    )
    check_choice("method", method, METHODS)
    limits = check_limits(budget, max_error, max_distance, method, "budget")
    check_weighted_linkage(weighted_linkage, method)
    check_causal_sources(causal, sources)
    options = Options(
        causal, checked_scale(scale, sources), limits, method, metric,
        check_step(step, method), order, temperature, epsilon, weights,
        weighted_linkage, noise_seed, sequence_offset,
    )  # fmt: skip
    # Do not convert traced arrays: under a compiler or JAX they may have no values, and
    # a torch tensor would lose its gradient. Call the public stage functions instead,
    # which are registered as operators of torch and JAX.
    arrays = sources.arrays()
    framework = tracing_framework(
        (tokens, mask, protect, weights, budget, *arrays.values())
    )
    if framework is not None:
        # A result of a traced call is a new node of the framework's graph. It cannot be
        # written to memory that exists already.
        if out is not None or workspace is not None:
            raise TypeError(
                "`out` and `workspace` cannot be used while torch or JAX records "
                "gradients or compiles: call `quickmerge` without them"
            )
        return _quickmerge_traced(
            framework, tokens, budget, sources, mask, protect, options
        )
    outputs = arrays_of(out)
    weight_array = None if isinstance(weights, str) else weights
    protect, positions = split_positions(protect)
    # Convert all arrays here, once. All stages below work on NumPy or CuPy arrays.
    convert_back, tokens, mask, protect, weight_array, *rest = convert_inputs(
        {"tokens": tokens, "mask": mask, "protect": protect, "weights": weight_array}
        | arrays,
        counts={"budget": budget, "protect": positions},
        outputs=outputs,
    )
    # `rest` contains the sources, then the counts, then the arrays of `out`.
    sources, rest = sources.with_arrays(rest[: len(arrays)]), rest[len(arrays) :]
    budget, positions, *targets = rest
    target = Merged(*targets) if outputs else None
    if not isinstance(weights, str):
        options = options._replace(weights=weight_array)
    mask = check_tokens(tokens, mask=mask)
    protect = protected_tokens(protect, positions, tokens, mask)
    shape = tokens.shape[:-1]  # (N,) or (B, N)
    options = _check_options(options, shape, mask)
    if options.need_saliency():
        check_mass(sources.saliency, shape, "saliency", mask)
    if causal and (options.need_saliency() or options.named_weights() == "attention"):
        check_causal_attention(lift_sources(sources, tokens), mask)
    # In this block CuPy allocates from the workspace, if there is one.
    with memory_of(workspace, tokens), span(0, 1):
        if is_cuda(tokens):  # copy a strided view once, instead of in every stage
            tokens = contiguous(tokens)
        num_groups = None
        if budget is not None:
            num_groups = num_groups_of(shape, budget, protect, method, mask)
        destination = None
        if target is not None and num_groups is None:
            raise ValueError(
                "`out` needs a `budget`: with `max_error` or `max_distance` its shapes "
                "are not known before the call"
            )
        mass_dtype = _mass_dtype(tokens, sources, options.weights)
        if options.named_weights() == "mass":
            check_epsilon(options.epsilon, mass_dtype)
        if target is not None and num_groups is not None:
            check_target(target, num_groups.max_groups, tokens, mass_dtype)
            destination = target.tokens  # (B, K, D)
        masked = mask is not None or protect is not None
        max_groups = None if num_groups is None else num_groups.max_groups
        check_quickmerge_memory(tokens, max_groups, sources, masked, options)
        merged = compose(
            with_progress(COMPUTE_STAGES, tokens, sources, options),
            tokens,
            num_groups,
            sources,
            mask,
            protect,
            options,
            destination,
        )
        if target is not None and out is not None:
            for x, field in zip(merged, target, strict=True):
                # On a GPU, the kernel has already written the merged tokens to `out`.
                # The other results are copied here; on a CPU, the merged tokens too.
                if x is not field:
                    field[...] = x
            return out
    if workspace is not None and is_cuda(tokens):
        # The next call reuses the memory of the workspace, so copy the results to other
        # memory.
        merged = Merged(*(x.copy() for x in merged))
    return Merged(*map(convert_back, merged))


def _quickmerge_traced(
    framework: Literal["torch", "jax"],
    tokens: Any,
    budget: Any,
    sources: Sources,
    mask: Any,
    protect: Any,
    options: Options,
) -> Merged[Any]:
    """Merge arrays that a framework traces, by the public stage functions.

    These are registered as operators of the framework and have gradients. Of an array,
    only the library and the shape are checked here, because its values may not be known
    yet. Each stage function checks the values when it runs. `torch.compile` traces
    through this code.
    """
    stages = traced_stages(framework)
    tokens = stages.check_array("tokens", tokens)
    check_axes("tokens", tuple(tokens.shape), "ND", "BND")
    shape = tuple(tokens.shape[:-1])  # (N,) or (B, N)
    mask = stages.full_mask(mask, tokens)
    protect = stages.protected_tokens(protect, tokens, mask)
    # All sources must be arrays of the framework: its graph cannot contain others. For
    # JAX, `check_array` converts NumPy arrays.
    arrays = sources.arrays()
    sources = sources.with_arrays(map(stages.check_array, arrays, arrays.values()))
    _check_noise_traced(framework, options.noise_seed)
    if isinstance(options.weights, str):
        check_choice("weights", options.weights, get_args(Weights))
    else:
        weights = stages.check_array("weights", options.weights)
        check_shape("weights", weights, "BN", shape)
        options = options._replace(weights=weights)
    # The stage functions check all values too, but their messages have other names.
    weights = None if isinstance(options.weights, str) else options.weights
    values = stages.host_values(mask, protect, budget, sources.saliency, weights)
    if values is not None:
        _check_values(shape, options, *values)
    num_groups = None
    if budget is not None:
        num_groups = traced_num_groups(framework, budget, shape[-1], mask)
    elif framework == "jax":
        raise TypeError(
            "`quickmerge` needs a `budget` while JAX traces: with `max_error` or "
            "`max_distance`, the shape of the result depends on the tokens"
        )
    return compose(stages, tokens, num_groups, sources, mask, protect, options)


def _check_values(
    shape: tuple[int, ...],
    options: Options,
    mask: Any,
    protect: Any,
    budget: Any,
    saliency: Any,
    weights: Any,
) -> None:
    """Raise for values that are wrong; the arrays are NumPy arrays or None."""
    mask = check_mask(mask, shape)
    options = options if weights is None else options._replace(weights=weights)
    options = _check_options(options, shape, mask)
    if options.need_saliency():
        check_mass(saliency, shape, "saliency", mask)
    if budget is not None:
        num_groups_of(shape, budget, protect, options.method, mask)


def _check_options(options: Options, shape: tuple[int, ...], mask: Any) -> Options:
    """Return the options with Python numbers; raise if one is out of range."""
    check_choice("metric", options.metric, METRICS)
    check_choice("order", options.order, ORDERS)
    if isinstance(options.weights, str):
        check_choice("weights", options.weights, get_args(Weights))
    else:
        check_is_array("weights", options.weights)
        check_mass(options.weights, shape, "weights", mask)
    noise_seed, sequence_offset = check_noise(
        options.noise_seed, options.sequence_offset, "noise_seed"
    )
    return options._replace(
        temperature=check_temperature(options.temperature),
        epsilon=check_epsilon(options.epsilon),
        noise_seed=noise_seed,
        sequence_offset=sequence_offset,
    )


def _check_noise_traced(framework: str, noise_seed: Any) -> None:
    """Raise if the seed is not None or an integer within 0..2⁶⁴ - 1.

    `torch.compile` traces through this code, so it uses only plain arithmetic.
    """
    if framework == "jax":
        from .autodiff.jax_operators import check_known

        check_known("noise_seed", noise_seed)
    if noise_seed is None or 0 <= plain_integer("noise_seed", noise_seed) < 2**64:
        return
    check_seed(noise_seed, "noise_seed")  # raises


def _mass_dtype(tokens: NDArray[Any], sources: Sources, weights: Any) -> np.dtype[Any]:
    """Return the dtype of the weights: float64 if they come from float64."""
    # The array from which the weights are computed: the caller's weights; the tokens,
    # if the weights are 1 or there is no source; otherwise the source.
    decisive = weights
    if isinstance(weights, str):
        arrays = [*sources.arrays().values()]
        decisive = tokens if weights == "uniform" else (arrays or [tokens])[0]
    return accumulation_dtype(decisive.dtype)
