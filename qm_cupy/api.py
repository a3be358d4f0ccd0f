"""The public names of the package: `qm_cupy` imports them from here when they are used.

This is the only list of these names.
"""

from .caches.attend import attend
from .caches.evict import evict
from .caches.fold_bias import fold_bias
from .caches.join_attention import join_attention
from .caches.kv_cache import KVCache
from .caches.kv_stream import KVStream
from .caches.match_attention import match_attention
from .caches.merge_kv_cache import merge_kv_cache
from .caches.merge_stream import MergeStream
from .caches.score_keys import score_keys
from .choice import choose_merge
from .cuda.compile import KernelCompilationError, warmup
from .cuda.workspace import Workspace
from .language_models.language_model import LanguageModel
from .language_models.model_state import ModelState
from .paper import (
    BidirectionalARAlignment,
    DifferentiableTokenMerging,
    EntropyAwareSaliency,
    NormBasedFidelityConstraint,
    QuickMergePP,
    quickmerge_inference,
)
from .pipeline import quickmerge
from .priors.mlp import MLP
from .priors.mlp_prior import MLPPrior
from .priors.protocols import Prior, SteppingPrior
from .priors.transformer import TransformerPrior
from .results import Choice, Merged
from .settings import allow_tf32, check_finite, use_kernels
from .stages.alignment.alignment_loss import (
    AlignmentLoss,
    alignment_loss,
    alignment_loss_vjp,
)
from .stages.alignment.decode import decode
from .stages.budget import norm_budget, token_budget
from .stages.clustering.cluster_tokens import cluster_tokens
from .stages.clustering.cosine_similarity import cosine_similarity
from .stages.clustering.cut_linkage import cut_linkage
from .stages.clustering.linkage import linkage
from .stages.fidelity.fidelity_loss import fidelity_loss, fidelity_loss_vjp
from .stages.fidelity.norm_mass import norm_mass
from .stages.fidelity.reconstruction_error import (
    reconstruction_error,
    reconstruction_error_vjp,
)
from .stages.merging.groups import group_positions, group_sizes
from .stages.merging.merge_tokens import merge_tokens, merge_tokens_vjp
from .stages.merging.unmerge_tokens import unmerge_tokens, unmerge_tokens_vjp
from .stages.saliency.attention_entropy import attention_entropy, attention_entropy_vjp
from .stages.saliency.attention_mass import attention_mass, attention_mass_vjp
from .stages.saliency.attention_received import (
    attention_received,
    attention_received_vjp,
)
from .stages.saliency.norm_saliency import norm_saliency, norm_saliency_vjp
from .stages.saliency.query_key_entropy import query_key_entropy, query_key_entropy_vjp
from .stages.saliency.saliency import saliency, saliency_vjp
from .stages.saliency.self_attention_entropy import (
    self_attention_entropy,
    self_attention_entropy_vjp,
)
from .stages.selection.gumbel_noise import gumbel_noise
from .stages.selection.gumbel_softmax import gumbel_softmax, gumbel_softmax_vjp
from .stages.selection.saliency_mass import saliency_mass, saliency_mass_vjp
from .stages.selection.select_tokens import select_tokens

__all__ = [
    "MLP",
    "AlignmentLoss",
    "BidirectionalARAlignment",
    "Choice",
    "DifferentiableTokenMerging",
    "EntropyAwareSaliency",
    "KVCache",
    "KVStream",
    "KernelCompilationError",
    "LanguageModel",
    "MLPPrior",
    "MergeStream",
    "Merged",
    "ModelState",
    "NormBasedFidelityConstraint",
    "Prior",
    "QuickMergePP",
    "SteppingPrior",
    "TransformerPrior",
    "Workspace",
    "alignment_loss",
    "alignment_loss_vjp",
    "allow_tf32",
    "attend",
    "attention_entropy",
    "attention_entropy_vjp",
    "attention_mass",
    "attention_mass_vjp",
    "attention_received",
    "attention_received_vjp",
    "check_finite",
    "choose_merge",
    "cluster_tokens",
    "cosine_similarity",
    "cut_linkage",
    "decode",
    "evict",
    "fidelity_loss",
    "fidelity_loss_vjp",
    "fold_bias",
    "group_positions",
    "group_sizes",
    "gumbel_noise",
    "gumbel_softmax",
    "gumbel_softmax_vjp",
    "join_attention",
    "linkage",
    "match_attention",
    "merge_kv_cache",
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
    "score_keys",
    "select_tokens",
    "self_attention_entropy",
    "self_attention_entropy_vjp",
    "token_budget",
    "unmerge_tokens",
    "unmerge_tokens_vjp",
    "use_kernels",
    "warmup",
]
