"""The copies that `quickmerge` makes of traced saliency and weights."""

import importlib

import numpy as np
import pytest


@pytest.mark.parametrize("library", ["torch", "jax.numpy"])
def test_padding_is_zero_even_if_it_is_nan(library):
    make = pytest.importorskip(library).asarray
    name = f"qm_cupy.autodiff.{library.partition('.')[0]}_operators"
    module = importlib.import_module(name)
    x = make(np.array([[1, 2, np.nan, np.inf]], np.float16))
    mask = make(np.array([[True, True, False, False]]))
    actual = np.asarray(module.masked_copy(x, mask))
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, [[1, 2, 0, 0]])
