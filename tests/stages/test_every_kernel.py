"""Properties that the kernels of all stages have in common.

They concern labels and counts out of range, the alignment and the layout of arrays, one
sequence without a batch axis, and empty batches. The fixture `kernels` runs a test with
basic and with optimized kernels, in the PTX interpreter (tests/ptx), which raises if a
kernel accesses memory outside its arrays.
"""

import numpy as np
import pytest
from kernel_cases import dtypes, labels_of, mask_of, random
from seam import cuda

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
def test_labels_out_of_range_count_as_padding(dtype):
    """Labels on a GPU are not checked, so kernels must accept any value."""
    num_groups = 5
    tokens, merged = random((2, 70, 9), dtype), random((2, num_groups, 9), dtype, 1)
    padded = labels_of(2, 70, num_groups).astype(np.int32)
    padded[:, 60:] = -1
    # The same labels, but the padding has labels out of range: K itself, above K, below
    # -1, and the ends of int32.
    out_of_range = padded.copy()
    out_of_range[:, 60:] = np.array(
        [5, 6, -2, 1000, -1000, 2**31 - 1, -(2**31), 70, 99, 5]
    )
    for operation in (
        lambda labels: qm.merge_tokens(tokens, labels, num_groups),
        lambda labels: qm.unmerge_tokens(merged, labels),
        lambda labels: qm.group_sizes(labels, num_groups),
        lambda labels: qm.group_positions(labels, num_groups),
        lambda labels: qm.reconstruction_error(tokens, merged, labels=labels),
    ):
        np.testing.assert_array_equal(operation(out_of_range), operation(padded))


@dtypes
def test_counts_out_of_range_are_clamped(dtype, monkeypatch):
    # The public functions check counts, so the test replaces the function that passes
    # them to the kernels. It returns (counts on the device, the largest K).
    merged, tokens = random((2, 6, 9), dtype), random((2, 40, 9), dtype, 1)
    prior = qm.MLPPrior.init(9, hidden_dim=5)
    out_of_range, clamped = np.array([-3, 1000], np.int32), np.array([0, 6], np.int32)
    results = []
    # Counts below 0 and above K = 6 are clamped to 0 and 6.
    for counts in (out_of_range, clamped):
        monkeypatch.setattr(
            cuda, "counts_on_device", lambda *_, counts=counts: (counts, 6)
        )
        error = qm.reconstruction_error(tokens, merged)
        results.append([*qm.alignment_loss(merged, prior), error])
        if counts is clamped:
            # With a limit of 40 instead of 6, the counts 0 and 6 are used unchanged.
            monkeypatch.setattr(cuda, "counts_on_device", lambda *_: (clamped, 40))
        results[-1].append(qm.select_tokens(tokens[..., 0], 6))
    for got, wanted in zip(*results, strict=True):
        np.testing.assert_array_equal(got, wanted)


def shifted(x, elements):
    """Return a copy that starts a number of elements after a 16-byte aligned address.

    The copy ends where its memory ends, so the interpreter notices a load beyond the
    last element.
    """
    raw = np.empty(elements + x.size, x.dtype)
    assert raw.ctypes.data % 16 == 0
    raw[elements:] = x.ravel()
    return raw[elements:].reshape(x.shape)


@dtypes
# 20 and 50 elements are whole vectors of 16 bytes for some dtypes only; 37 are not for
# any dtype.
@pytest.mark.parametrize("dim", [20, 37, 50])
def test_results_do_not_depend_on_alignment(dtype, dim):
    """An unaligned row is read one element at a time, with the same sums as vectors."""
    tokens, other = random((2, 33, dim), dtype), random((2, 5, dim), dtype, 1)
    attention = abs(random((1, 2, 1, dim, dim), dtype, 2))
    labels, mass = labels_of(2, 33, 5), abs(random((2, 33), np.float32, 3))

    def results(shift):
        x, y, a = (shifted(z, shift) for z in (tokens, other, attention))
        yield qm.cosine_similarity(x)
        yield qm.self_attention_entropy(x)
        yield qm.query_key_entropy(x[:, None], x[:, None])
        yield qm.attention_entropy(a)
        yield qm.attention_entropy_vjp(a[..., 0], a)
        yield qm.attention_received(a)
        yield qm.attention_received(query=x[:, None], key=x[:, None])
        yield qm.attention_received_vjp(a[..., 0], a)[0]
        pair = {"query": x[:, None], "key": x[:, None]}
        yield from qm.attention_received_vjp(x[:, None, :, 0], **pair)[1:]
        yield qm.norm_saliency(x)
        yield qm.merge_tokens(x, labels, 5)
        yield qm.unmerge_tokens(y, labels)
        yield qm.unmerge_tokens_vjp(x, labels, 5)
        yield from qm.merge_tokens_vjp(y, x, labels, 5, mass=mass)
        yield qm.reconstruction_error(x, y)
        yield from qm.reconstruction_error_vjp(np.ones(2), x, y)

    wanted = list(results(0))
    # A shift of 4 float32 elements is 16 bytes, so rows are aligned again. After a
    # shift of 1 or 2 float32 elements they are not aligned.
    for shift in (1, 2, 4):
        for x, z in zip(results(shift), wanted, strict=True):
            np.testing.assert_array_equal(x, z)


def test_one_sequence_gives_the_bits_of_a_batch_of_one():
    """Without a batch axis the same launchers run, and the result has no batch axis."""
    tokens, scores = random((40, 9), np.float32), abs(random(40, np.float32))
    # Padding on the left, so that a launcher that forgets the mask is noticed.
    labels, mask = labels_of(1, 40, 5)[0], mask_of(3, 40)[0]
    attention = abs(random((40, 40), np.float32))
    prior = qm.MLPPrior.init(9, hidden_dim=5)
    for operation, *arrays in (
        (lambda a, m: qm.attention_entropy(a, mask=m), attention, mask),
        (lambda q, m: qm.query_key_entropy(q, q, mask=m), tokens, mask),
        (lambda a, m: qm.attention_received(a, mask=m), attention, mask),
        (lambda q, m: qm.attention_received(query=q, key=q, mask=m), tokens, mask),
        (lambda x, m: qm.self_attention_entropy(x, mask=m), tokens, mask),
        (lambda h, m: qm.saliency(h, mask=m), scores, mask),
        (lambda x, m: qm.norm_saliency(x, mask=m), tokens, mask),
        (lambda s, m: qm.gumbel_softmax(s, mask=m), scores, mask),
        (lambda s, m: qm.gumbel_softmax(s, hard=3, mask=m), scores, mask),
        (lambda s: qm.attention_mass(s, s), abs(scores)),
        (lambda s: qm.saliency_mass(s, s), scores),
        (lambda s, m: qm.select_tokens(s, 4, mask=m), scores, mask),
        (lambda x, g: qm.merge_tokens(x, g, 5), tokens, labels),
        (lambda x, g: qm.unmerge_tokens(x, g), tokens, labels),
        (lambda g: qm.group_sizes(g, 5), labels),
        (lambda g: qm.group_positions(g, 5), labels),
        (lambda x: qm.alignment_loss(x, prior).total, tokens),
        (lambda x, m: qm.norm_mass(x, 5, mask=m), tokens, mask),
        (lambda x, m: qm.reconstruction_error(x, x[..., :7, :], mask=m), tokens, mask),
        (lambda x: qm.cosine_similarity(x), tokens),
    ):
        single = operation(*arrays)
        batch = operation(*(x[None] for x in arrays))
        np.testing.assert_array_equal(np.asarray(single)[None], batch)


def test_views_give_the_results_of_their_copies():
    """Kernels have no strides, so launchers copy arrays that are not C-contiguous."""
    wide = random((80, 2, 18), np.float16)
    tokens = wide.transpose(1, 0, 2)[:, ::2, ::2]  # (2, 40, 9)
    labels = labels_of(40, 2, 5).T
    for function in (
        qm.norm_saliency,
        qm.self_attention_entropy,
        qm.cosine_similarity,
    ):
        np.testing.assert_array_equal(function(tokens), function(tokens.copy()))
    got = qm.merge_tokens(tokens, labels, 5)
    wanted = qm.merge_tokens(tokens.copy(), np.ascontiguousarray(labels), 5)
    np.testing.assert_array_equal(got, wanted)


def test_empty_batches_launch_nothing():
    # A grid of 0 blocks is an error in CUDA, so no kernel may be launched.
    tokens = np.zeros((0, 5, 3), np.float32)
    assert qm.self_attention_entropy(tokens).shape == (0, 5)
    assert qm.attention_received(query=tokens, key=tokens).shape == (0, 5)
    assert qm.attention_received(np.zeros((0, 5, 5))).shape == (0, 5)
    assert qm.select_tokens(tokens[..., 0], 2).shape == (0, 2)
    assert qm.merge_tokens(tokens, np.zeros((0, 5), int), 2).shape == (0, 2, 3)
    assert qm.cosine_similarity(tokens).shape == (0, 5, 5)
