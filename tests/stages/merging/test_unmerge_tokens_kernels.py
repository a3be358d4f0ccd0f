"""The kernels of the gradient of `unmerge_tokens`.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). test_merge_tokens_kernels.py tests the kernel of
`unmerge_tokens` itself.
"""

import pytest
from kernel_cases import dtypes, labels_of, random
from vjp_cases import WIDTHS, assert_gradient, vjp_sizes, wide

import qm_cupy as qm
from qm_cupy.stages.merging.unmerge_tokens import unmerge_tokens_vjp_reference

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@vjp_sizes
def test_unmerge_tokens_vjp(dtype, num_tokens):
    num_groups = max(num_tokens // 4, 1)
    labels = labels_of(2, num_tokens, num_groups)
    for dim in WIDTHS:
        gradient = random((2, num_tokens, dim), dtype)
        got = qm.unmerge_tokens_vjp(gradient, labels, num_groups)
        # The expected value is the NumPy reference in float64. Other tests compare this
        # reference with finite differences.
        wanted = unmerge_tokens_vjp_reference(wide(gradient), labels, num_groups)
        assert_gradient(got, wanted, dtype)
