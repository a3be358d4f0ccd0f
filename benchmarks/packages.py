"""Peers that are packages of their own; each runs its own code, if it is installed.

    pip install --target FOLDER --no-deps tomesd sentence-transformers pylate
    pip install --target FOLDER transformers regex datasets
    python benchmarks/quality.py --peers FOLDER

Only the files that merge vectors are used. sentence-transformers also imports
`transformers` and `regex`, and PyLate imports `datasets`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from contenders import Contender, Grouping, Inside, size

# Takes vectors (N, D), the factor by which they become fewer, and how many of the first
# vectors are protected. Returns vectors (K, D).
Pooler = Callable[[np.ndarray, int, int], np.ndarray]
STRIDE = 2  # tomesd keeps one of 2 × 2 tokens at least; its authors' default


def sentence_transformers() -> Pooler:
    """Return the hierarchical pooler of sentence-transformers."""
    from sentence_transformers.multi_vector_encoder.modules import token_pooling

    def run(vectors: np.ndarray, factor: int, num_protected: int) -> np.ndarray:
        pooler = token_pooling.HierarchicalTokenPooling(
            factor, num_protected_tokens=num_protected
        )
        return pooler.pool_one(_tensor(vectors)).numpy()

    return run


def pylate() -> Pooler:
    """Return the hierarchical pooler of PyLate."""
    from pylate.models.colbert import ColBERT

    def run(vectors: np.ndarray, factor: int, num_protected: int) -> np.ndarray:
        # This method does not use the model.
        (pooled,) = ColBERT.pool_embeddings_hierarchical(
            None, [_tensor(vectors)], factor, num_protected
        )
        return pooled.numpy()

    return run


def tomesd() -> Contender:
    """Return the matching of tomesd [1]_ for square pictures, in one step.

    In each field of 2 × 2 tokens, one token is drawn at random. The others may merge
    into any drawn token, so at least a quarter of the tokens remain.

    .. [1] D. Bolya and J. Hoffman, "Token merging for fast Stable Diffusion", CVPR
       Workshops 2023, arXiv:2303.17604.
    """
    import tomesd.merge
    import torch

    def run(inside: Inside, num_groups: int) -> Grouping:
        batch, count, _ = inside.tokens.shape
        side = round(count**0.5)
        if side**2 != count or num_groups < (side // STRIDE) ** 2:
            raise ValueError(f"tomesd cannot merge {count} tokens to {num_groups}")
        _, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
            _tensor(inside.tokens), side, side, STRIDE, STRIDE, count - num_groups,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        # Unmerged, the number of a group goes to all of its members.
        numbers = torch.arange(num_groups).expand(batch, num_groups)
        return unmerge(numbers[..., None])[..., 0].numpy(), size(inside)

    return run


def installed(
    peers: dict[str, Callable[[], Any]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the peers that can be imported, and why the others cannot."""
    present, missing = {}, {}
    for name, load in peers.items():
        try:
            present[name] = load()
        except ImportError as error:
            missing[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: not run, {missing[name]}")
    return present, missing


def _tensor(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(x, np.float32))
