"""QuickMerge++: token sequences in, shorter token sequences out."""

from ._checks import check_finite
from ._cuda import KernelCompilationError, use_kernels, warmup
from ._precision import allow_tf32
from .alignment import AlignmentLoss, Prior, SteppingPrior, alignment_loss, decode
from .budget import norm_budget, token_budget
from .clustering import cluster_tokens, cosine_similarity, cut_linkage, linkage
from .fidelity import fidelity_loss, norm_mass, reconstruction_error
from .framework import (
    BidirectionalARAlignment,
    DifferentiableTokenMerging,
    EntropyAwareSaliency,
    NormBasedFidelityConstraint,
    QuickMergePP,
    quickmerge_inference,
)
from .merging import (
    Merged,
    group_positions,
    group_sizes,
    merge_tokens,
    unmerge_tokens,
)
from .mlp_prior import MLP, MLPPrior
from .pipeline import Choice, choose_merge, quickmerge
from .saliency import (
    attention_entropy,
    norm_saliency,
    query_key_entropy,
    saliency,
    self_attention_entropy,
)
from .saliency_vjp import (
    attention_entropy_vjp,
    norm_saliency_vjp,
    query_key_entropy_vjp,
    saliency_vjp,
    self_attention_entropy_vjp,
)
from .selection import gumbel_noise, gumbel_softmax, saliency_mass, select_tokens
from .transformer_prior import TransformerPrior
from .workspace import Workspace

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "AlignmentLoss",
    "BidirectionalARAlignment",
    "Choice",
    "DifferentiableTokenMerging",
    "EntropyAwareSaliency",
    "KernelCompilationError",
    "MLPPrior",
    "Merged",
    "NormBasedFidelityConstraint",
    "Prior",
    "QuickMergePP",
    "SteppingPrior",
    "TransformerPrior",
    "Workspace",
    "alignment_loss",
    "allow_tf32",
    "attention_entropy",
    "attention_entropy_vjp",
    "check_finite",
    "choose_merge",
    "cluster_tokens",
    "cosine_similarity",
    "cut_linkage",
    "decode",
    "fidelity_loss",
    "group_positions",
    "group_sizes",
    "gumbel_noise",
    "gumbel_softmax",
    "linkage",
    "merge_tokens",
    "norm_budget",
    "norm_mass",
    "norm_saliency",
    "norm_saliency_vjp",
    "query_key_entropy",
    "query_key_entropy_vjp",
    "quickmerge",
    "quickmerge_inference",
    "reconstruction_error",
    "saliency",
    "saliency_mass",
    "saliency_vjp",
    "select_tokens",
    "self_attention_entropy",
    "self_attention_entropy_vjp",
    "token_budget",
    "unmerge_tokens",
    "use_kernels",
    "warmup",
]
