"""QuickMerge++: token sequences in, shorter token sequences out."""

from ._cuda import KernelCompilationError, warmup
from .budget import norm_budget, token_budget
from .clustering import cluster_tokens, cosine_similarity, cut_linkage, linkage
from .fidelity import fidelity_loss, norm_mass, reconstruction_error
from .fidelity_vjp import fidelity_loss_vjp, reconstruction_error_vjp
from .framework import (
    BidirectionalARAlignment,
    DifferentiableTokenMerging,
    EntropyAwareSaliency,
    NormBasedFidelityConstraint,
    QuickMergePP,
    quickmerge_inference,
)
from .merging import (
    group_positions,
    group_sizes,
    merge_tokens,
    unmerge_tokens,
)
from .merging_vjp import merge_tokens_vjp, unmerge_tokens_vjp
from .pipeline import choose_merge, quickmerge
from .priors.mlp import MLP
from .priors.mlp_prior import MLPPrior
from .priors.protocols import Prior, SteppingPrior
from .priors.transformer import TransformerPrior
from .results import AlignmentLoss, Choice, Merged
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
from .selection_vjp import gumbel_softmax_vjp, saliency_mass_vjp
from .settings import allow_tf32, check_finite, use_kernels
from .stages.alignment.alignment_loss import alignment_loss, alignment_loss_vjp
from .stages.alignment.decode import decode
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
    "alignment_loss_vjp",
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
    "fidelity_loss_vjp",
    "group_positions",
    "group_sizes",
    "gumbel_noise",
    "gumbel_softmax",
    "gumbel_softmax_vjp",
    "linkage",
    "merge_tokens",
    "merge_tokens_vjp",
    "norm_budget",
    "norm_mass",
    "norm_saliency",
    "norm_saliency_vjp",
    "query_key_entropy",
    "query_key_entropy_vjp",
    "quickmerge",
    "quickmerge_inference",
    "reconstruction_error",
    "reconstruction_error_vjp",
    "saliency",
    "saliency_mass",
    "saliency_mass_vjp",
    "saliency_vjp",
    "select_tokens",
    "self_attention_entropy",
    "self_attention_entropy_vjp",
    "token_budget",
    "unmerge_tokens",
    "unmerge_tokens_vjp",
    "use_kernels",
    "warmup",
]
