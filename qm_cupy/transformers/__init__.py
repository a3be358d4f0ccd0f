"""Caches of merged keys and values for models of Hugging Face transformers.

This package needs torch and transformers (the extra ``transformers``).
"""

from .merged_cache import MergedCache

__all__ = ["MergedCache"]
