"""Plots of saliency, similarities, groups and errors. They need matplotlib.

Every function draws on matplotlib axes and returns the axes. It does not call `show`.
Curves and arcs have the colours of Okabe and Ito, images have the colour map cividis,
and outlines, cuts and bounds are dark red. Up to 8 curves also differ in dashes and
markers, up to 4 groups of arcs differ in dashes, and cividis is lighter for larger
values. A grey print therefore contains the same information.
"""

# Import matplotlib first, so that the error says how to install it.
try:
    import matplotlib as _  # noqa: F401
except ImportError as error:
    from ..install_advice import install_command

    _message = f"qm_cupy.plot needs matplotlib: {install_command('plot')}"
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
