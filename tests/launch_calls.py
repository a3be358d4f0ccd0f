"""Calls of every public function that launches kernels, at any sizes."""

import functools
from typing import Any, NamedTuple
from unittest import mock

import device_array
import numpy as np
from cache_launches import CACHE_OPERATIONS
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.clustering.cluster_tokens import METHODS
from qm_cupy.stages.clustering.linkage import LINKAGES

HEADS, HEAD_DIM = 2, 40
WEIGHTED = "average", "ward"  # methods that accept masses
# Elements of the inputs of calls that read all of them on the host between launches;
# larger inputs are skipped.
_MAX_READ = 1 << 16
_TOKEN_STEPS = 3  # steps of `decode`; every step launches the same kernels


class Case(NamedTuple):
    """Sizes and dtype of the inputs; their values are arbitrary."""

    num_tokens: int
    dim: int = 3
    batch: int = 3
    dtype: Any = np.float32

    def array(self, *shape: int, dtype: Any = None) -> Any:
        """Return an input array of a user."""
        # A user's array is a plain one, not a `DeviceArray`.
        x = device_array.empty(shape, dtype or self.dtype)
        return x.view(np.ndarray)

    @property
    def rows(self) -> tuple[int, int]:
        return self.batch, self.num_tokens

    @property
    def num_groups(self) -> int:
        """K, a third of the tokens."""
        return max(self.num_tokens // 3, 1)

    @property
    def ragged(self) -> Any:
        """K of each sequence; the second sequence has fewer than the others."""
        counts = np.full(self.batch, self.num_groups)
        counts[1:2] = max(self.num_groups // 2, 1)
        return counts

    @property
    def tokens(self) -> Any:
        return self.array(*self.rows, self.dim)

    @property
    def merged(self) -> Any:
        return self.array(self.batch, self.num_groups, self.dim)

    @property
    def heads(self) -> Any:
        return self.array(self.batch, HEADS, self.num_tokens, HEAD_DIM)

    @property
    def attention(self) -> Any:
        return self.array(self.batch, HEADS, self.num_tokens, self.num_tokens)

    @property
    def one_head(self) -> Any:
        return self.array(self.batch, 1, self.num_tokens, self.num_tokens)

    @property
    def head_rows(self) -> Any:
        return self.array(self.batch, HEADS, self.num_tokens)

    @property
    def scores(self) -> Any:
        return self.array(*self.rows)

    @property
    def mass(self) -> Any:
        return self.array(*self.rows)

    @property
    def mask(self) -> Any:
        return self.array(*self.rows, dtype=np.bool_)

    @property
    def protect(self) -> Any:
        return self.mask

    @property
    def anchors(self) -> Any:
        return self.array(self.batch, self.num_groups, dtype=np.int32)

    @property
    def labels(self) -> Any:
        return self.array(*self.rows, dtype=np.int32)


@functools.cache
def mlp(dim: int) -> qm.MLPPrior:
    return qm.MLPPrior.init(dim, hidden_dim=20)


@functools.cache
def transformer(dim: int, learned: bool) -> qm.TransformerPrior:
    # Learned positions must cover the longest sequence of the tests.
    positions = {"norm": "layer", "num_positions": 6000} if learned else {}
    shape = {"hidden_dim": 24, "num_heads": 2, "num_layers": 1, "mlp_dim": 30}
    return qm.TransformerPrior.init(dim, **shape, **positions)


def _clusterings():
    """Yield calls of every method: plain, ragged, padded and protected."""

    def call(c, method, names, ragged=False):
        options = {name: getattr(c, name) for name in names}
        counts = c.ragged if ragged else c.num_groups
        return qm.cluster_tokens(c.tokens, counts, method=method, **options)

    option_sets = [(), ("mask",), ("protect",), ("mask", "protect")]
    for method in METHODS:
        for names in [
            *option_sets,
            *([("mass", "mask")] if method in WEIGHTED else []),
        ]:
            # Calls with none or two of the options also get a K of each sequence.
            ragged = len(names) != 1
            label = ", ".join([f"cluster_tokens {method}", *names])
            yield (
                label,
                functools.partial(call, method=method, names=names, ragged=ragged),
            )
    for names in [("anchors",), ("anchors", "protect")]:
        label = ", ".join(["cluster_tokens nearest", *names])
        yield label, functools.partial(call, method="nearest", names=names)


def _quickmerges():
    """Yield calls with every source of saliency, and with every method."""
    # Every case names its sources by the keyword of `quickmerge`.
    sources = {
        "tokens": lambda c: {},
        "hidden_states": lambda c: {"hidden_states": c.tokens},
        "attention": lambda c: {"attention": c.attention},
        "query": lambda c: {"query": c.heads, "key": c.heads},
        "layers": lambda c: {"attention": (c.attention, c.one_head)},
        "saliency": lambda c: {"saliency": c.scores},
    }

    def call(c, source, **options):
        masked = {"mask": c.mask} if options.pop("masked", False) else {}
        alone = {"protect": c.mask} if options.pop("protected", False) else {}
        inputs = {**sources[source](c), **masked, **alone, **options}
        return qm.quickmerge(c.tokens, c.num_groups, **inputs)

    for source in sources:
        yield (
            f"quickmerge of {source}",
            functools.partial(call, source=source, masked=source != "tokens"),
        )
        yield (
            f"quickmerge of {source}, mass",
            functools.partial(
                call, source=source, masked=source != "tokens", weights="mass"
            ),
        )
    # The loop above uses the first method.
    for method in METHODS[1:]:
        yield (
            f"quickmerge {method}",
            functools.partial(
                call, source="saliency", method=method, order="first", weights="uniform"
            ),
        )
    yield (
        "quickmerge nearest, protect",
        functools.partial(
            call, source="saliency", method="nearest", masked=True, protected=True
        ),
    )
    yield (
        "quickmerge ward, weighted",
        functools.partial(
            call, source="saliency", method="ward", weighted_linkage=True
        ),
    )


def _norm_budget(c):
    if c.num_tokens * c.dim <= _MAX_READ:
        qm.norm_budget(c.tokens, mask=c.mask)


def _fit(c):
    # A prior learns from pairs of neighbours, so one token is not enough.
    if c.num_tokens > 1 and c.batch * c.num_tokens * c.dim <= _MAX_READ:
        mlp(c.dim).fit(c.tokens, steps=2)


def _decode(prior):
    """Return a call of `decode` with the prior that `prior` makes for a case."""

    def call(c):
        tokens = c.array(c.batch, min(c.num_tokens, _TOKEN_STEPS), c.dim)
        qm.decode(tokens, prior(c))

    return call


def _merged(c):
    per_group = c.array(c.batch, c.num_groups, dtype=np.int32)
    return qm.Merged(c.merged, c.labels, per_group, per_group, c.mass)


def _choose(c):
    # The budget K + 1 must not exceed N.
    if c.num_tokens > c.num_groups:
        candidates = [
            {"method": "nearest"},
            {"saliency": c.scores, "budget": c.num_groups},
        ]
        options = {"budget": c.num_groups + 1, "method": "bipartite", "mask": c.mask}
        qm.choose_merge(c.tokens, candidates, mlp(c.dim), **options)


def _in_a_graph(call):
    """Return a call during which `is_capturing` is true: counts become arguments."""

    def run(c):
        with mock.patch.object(cuda, "is_capturing", return_value=True):
            call(c)

    return run


def _slopes(c):
    """Return upstream gradients of the forward, backward and total losses."""
    return tuple(np.ones(c.batch, np.float32) for _ in range(3))


# A title starts with the public name that it calls; test_launches.py compares these
# names with `qm.__all__`.
OPERATIONS = {
    "attention_entropy": lambda c: qm.attention_entropy(c.attention, mask=c.mask),
    "attention_entropy_vjp": lambda c: qm.attention_entropy_vjp(
        c.head_rows, c.attention, mask=c.mask
    ),
    "attention_received": lambda c: qm.attention_received(c.attention, mask=c.mask),
    "attention_received, causal": lambda c: qm.attention_received(
        c.attention, causal=True
    ),
    "attention_received, queries and keys": lambda c: qm.attention_received(
        query=c.heads, key=c.heads, mask=c.mask
    ),
    "attention_received, queries and keys, causal": lambda c: qm.attention_received(
        query=c.heads, key=c.heads, causal=True
    ),
    "attention_received_vjp": lambda c: qm.attention_received_vjp(
        c.head_rows, c.attention, mask=c.mask
    ),
    "attention_received_vjp, queries and keys": lambda c: qm.attention_received_vjp(
        c.head_rows, query=c.heads, key=c.heads, causal=True, mask=c.mask
    ),
    "query_key_entropy": lambda c: qm.query_key_entropy(c.heads, c.heads, mask=c.mask),
    "query_key_entropy, causal": lambda c: qm.query_key_entropy(
        c.heads, c.heads, causal=True
    ),
    "query_key_entropy_vjp": lambda c: qm.query_key_entropy_vjp(
        c.head_rows, c.heads, c.heads, causal=True, mask=c.mask
    ),
    "self_attention_entropy": lambda c: qm.self_attention_entropy(c.tokens),
    "self_attention_entropy, mask": lambda c: qm.self_attention_entropy(
        c.tokens, mask=c.mask
    ),
    "self_attention_entropy_vjp": lambda c: qm.self_attention_entropy_vjp(
        c.scores, c.tokens, mask=c.mask
    ),
    "attention_mass": lambda c: qm.attention_mass(abs(c.scores), abs(c.scores)),
    "attention_mass, causal heads": lambda c: qm.attention_mass(
        abs(c.head_rows), abs(c.head_rows), causal=True, mask=c.mask
    ),
    "attention_mass_vjp": lambda c: qm.attention_mass_vjp(
        c.scores, abs(c.head_rows), abs(c.head_rows)
    ),
    "saliency": lambda c: qm.saliency(c.scores, mask=c.mask),
    "saliency, heads": lambda c: qm.saliency(c.head_rows, salient="high"),
    "saliency_vjp": lambda c: qm.saliency_vjp(c.scores, c.head_rows, mask=c.mask),
    "norm_saliency": lambda c: qm.norm_saliency(c.tokens, mask=c.mask),
    "norm_saliency_vjp": lambda c: qm.norm_saliency_vjp(c.scores, c.tokens),
    "gumbel_softmax": lambda c: qm.gumbel_softmax(c.scores),
    "gumbel_softmax, no noise": lambda c: qm.gumbel_softmax(c.scores, seed=None),
    "gumbel_softmax, hard": lambda c: qm.gumbel_softmax(
        c.scores, hard=c.ragged, mask=c.mask
    ),
    "gumbel_softmax_vjp": lambda c: qm.gumbel_softmax_vjp(
        c.scores, c.scores, mask=c.mask
    ),
    "saliency_mass": lambda c: qm.saliency_mass(c.scores, c.scores),
    "saliency_mass_vjp": lambda c: qm.saliency_mass_vjp(c.scores, c.scores, c.scores),
    "select_tokens": lambda c: qm.select_tokens(c.scores, c.ragged, mask=c.mask),
    "select_tokens, in a graph": _in_a_graph(
        lambda c: qm.select_tokens(c.scores, c.ragged)
    ),
    "cosine_similarity": lambda c: qm.cosine_similarity(c.tokens),
    **{
        f"linkage {method}": lambda c, m=method: qm.linkage(c.tokens, m, mask=c.mask)
        for method in LINKAGES
    },
    "linkage ward, mass": lambda c: qm.linkage(c.tokens, "ward", mass=c.mass),
    "linkage euclidean": lambda c: qm.linkage(
        c.tokens, metric="euclidean", mask=c.mask
    ),
    **{
        f"cluster_tokens {method}, euclidean": lambda c, m=method: qm.cluster_tokens(
            c.tokens,
            c.num_groups,
            method=m,
            metric="euclidean",
            protect=c.protect,
            mask=c.mask,
        )
        for method in ("ward", "nearest", "bipartite", "contiguous")
    },
    "cluster_tokens bipartite, step": lambda c: qm.cluster_tokens(
        c.tokens, c.num_groups, method="bipartite", step=max(c.num_tokens // 8, 1)
    ),
    "cut_linkage": lambda c: qm.cut_linkage(
        c.array(c.batch, c.num_tokens - 1, 4), num_groups=c.ragged, mask=c.mask
    ),
    "cut_linkage, max_distance": lambda c: qm.cut_linkage(
        c.array(c.batch, c.num_tokens - 1, 4), max_distance=0.1
    ),
    "cluster_tokens ward, max_error": lambda c: qm.cluster_tokens(
        c.tokens, max_error=0.1, method="ward", mass=c.mass, protect=c.protect
    ),
    **{
        f"cluster_tokens {method}, max_distance": lambda c, m=method: qm.cluster_tokens(
            c.tokens, max_distance=0.5, method=m, protect=c.protect, mask=c.mask
        )
        for method in ("average", "contiguous")
    },
    **dict(_clusterings()),
    "merge_tokens": lambda c: qm.merge_tokens(c.tokens, c.labels, c.num_groups),
    "merge_tokens, mass": lambda c: qm.merge_tokens(
        c.tokens, c.labels, c.ragged, mass=c.mass
    ),
    "merge_tokens_vjp": lambda c: qm.merge_tokens_vjp(
        c.merged, c.tokens, c.labels, c.num_groups
    ),
    "merge_tokens_vjp, mass": lambda c: qm.merge_tokens_vjp(
        c.merged, c.tokens, c.labels, c.ragged, mass=c.mass
    ),
    "unmerge_tokens": lambda c: qm.unmerge_tokens(c.merged, c.labels),
    "unmerge_tokens_vjp": lambda c: qm.unmerge_tokens_vjp(
        c.tokens, c.labels, c.num_groups
    ),
    "group_sizes": lambda c: qm.group_sizes(c.labels, c.ragged),
    "group_positions": lambda c: qm.group_positions(c.labels, c.num_groups),
    "norm_mass": lambda c: qm.norm_mass(c.tokens, c.ragged, mask=c.mask),
    "norm_budget": _norm_budget,
    "reconstruction_error": lambda c: qm.reconstruction_error(
        c.tokens, c.merged, labels=c.labels, mask=c.mask
    ),
    "reconstruction_error, nearest": lambda c: qm.reconstruction_error(
        c.tokens, c.merged, num_groups=c.ragged
    ),
    "reconstruction_error_vjp": lambda c: qm.reconstruction_error_vjp(
        c.array(c.batch), c.tokens, c.merged, labels=c.labels, mask=c.mask
    ),
    "fidelity_loss": lambda c: qm.fidelity_loss(c.tokens, c.merged),
    "fidelity_loss_vjp": lambda c: qm.fidelity_loss_vjp(1.0, c.tokens, c.merged),
    "alignment_loss, MLP": lambda c: qm.alignment_loss(
        c.merged, mlp(c.dim), num_groups=c.ragged
    ),
    "alignment_loss, Merged": lambda c: qm.alignment_loss(_merged(c), mlp(c.dim)),
    "alignment_loss, transformer": lambda c: qm.alignment_loss(
        c.merged, transformer(c.dim, True)
    ),
    "alignment_loss_vjp": lambda c: qm.alignment_loss_vjp(
        _slopes(c), c.merged, mlp(c.dim)
    ),
    "MLPPrior.predict": lambda c: mlp(c.dim).predict(c.tokens),
    "MLPPrior.fit": _fit,
    "TransformerPrior.predict": lambda c: transformer(c.dim, False).predict(
        c.tokens, reverse=True, num_groups=c.ragged, sizes=c.labels
    ),
    "decode, MLP": _decode(lambda c: mlp(c.dim)),
    "decode, transformer": _decode(lambda c: transformer(c.dim, False)),
    "decode, learned positions": _decode(lambda c: transformer(c.dim, True)),
    "decode, callable": _decode(lambda c: mlp(c.dim).predict),
    "choose_merge": _choose,
    **dict(_quickmerges()),
    **CACHE_OPERATIONS,
}
