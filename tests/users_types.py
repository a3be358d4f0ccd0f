"""The types that users of NumPy and torch write: `make lint` checks this file.

Every annotation must agree with the return type that the library declares.
"""

import numpy as np
import torch
from numpy.typing import NDArray

import qm_cupy as qm

tokens = np.ones((2, 9, 4), np.float32)
mask = np.ones((2, 9), np.bool_)
mass = np.ones((2, 9))
protect = np.arange(9) < 1
# Integers for labels, counts and positions: they index arrays without a cast.
labels: NDArray[np.int32] = qm.cluster_tokens(tokens, 3, mask=mask, method="ward")
merged: NDArray[np.float32] = qm.merge_tokens(tokens, labels, 3, mass=mass)
sizes: NDArray[np.int32] = qm.group_sizes(labels, 3)
positions: NDArray[np.int32] = qm.group_positions(labels, 3)
back: NDArray[np.float32] = qm.unmerge_tokens(merged, labels)
picked: NDArray[np.int32] = qm.select_tokens(mass, 3, mask=mask)
budget: NDArray[np.int32] = qm.norm_budget(tokens, 0.5, mask=mask)
# The dendrogram is float64, as in SciPy, whatever the dtype of the tokens.
tree: NDArray[np.float64] = qm.linkage(tokens, "average", mask=mask)
cut: NDArray[np.int32] = qm.cut_linkage(tree, num_groups=3, mask=mask)
# A float input gives a float result.
entropy: NDArray[np.float32] = qm.self_attention_entropy(tokens, mask=mask)
scores: NDArray[np.float32] = qm.saliency(entropy, salient="high", mask=mask)
noise: NDArray[np.float32] = qm.gumbel_noise((2, 9), 0)
result: qm.Merged[NDArray[np.float32]] = qm.quickmerge(
    tokens, 3, mask=mask, protect=mask & protect, order="first"
)
into: NDArray[np.int32] = result.labels
count: NDArray[np.int32] = result.sizes
position: NDArray[np.int32] = result.positions
short: NDArray[np.float32] = result.tokens
long: NDArray[np.float32] = result.unmerge()
values: NDArray[np.float64] = result.apply(mass[..., None])
exists: NDArray[np.bool_] = result.valid
loss = qm.alignment_loss(result, qm.MLPPrior.init(4))
total: NDArray[np.float32] = loss.total
error: NDArray[np.float32] = qm.reconstruction_error(
    tokens, merged, labels=labels, mask=mask
)
with qm.use_kernels("basic"), qm.allow_tf32(), qm.check_finite(False):
    pass
# The same functions must also return torch's type for a tensor.
x = torch.ones(2, 9, 4, requires_grad=True)
y: torch.Tensor = qm.merge_tokens(x, qm.cluster_tokens(x, 3), 3)
z: qm.Merged[torch.Tensor] = qm.quickmerge(x, 3, weights="uniform")
n: torch.Tensor = z.labels


def load(path: str) -> qm.Merged[NDArray[np.float32]]:
    return qm.Merged.load(path)


def apply(path: str) -> torch.Tensor:
    return load(path).apply(x)


def misspelt() -> object:
    # A checker must report a name that does not exist, although imports are late.
    return qm.quickmerg  # type: ignore[attr-defined]
