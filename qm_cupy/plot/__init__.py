"""Pictures of what was merged and of what it cost; they take matplotlib.

Every function draws on matplotlib's axes and returns them, and shows nothing. Colours
are Okabe and Ito's, or cividis, and never speak alone: lines differ in dashes and
markers too, and cividis grows lighter with the value, so that grey prints say the same.
"""

try:
    import matplotlib as _  # noqa: F401
except ImportError as error:
    _message = 'qm_cupy.plot needs matplotlib: pip install "qm-cupy[demo]"'
    raise ImportError(_message) from error

from .budget import plot_budget
from .dendrogram import plot_dendrogram
from .groups import plot_groups
from .saliency import plot_saliency
from .similarity import plot_similarity

__all__ = [
    "plot_budget",
    "plot_dendrogram",
    "plot_groups",
    "plot_saliency",
    "plot_similarity",
]
