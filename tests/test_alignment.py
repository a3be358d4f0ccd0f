import copy
import dataclasses
import pickle

import numpy as np
import oracle
import pytest
from conftest import assert_close

import qm_cupy as qm


def losses_by_loop(merged, prior):
    return oracle.alignment_losses(
        merged,
        lambda x: oracle.mlp(x, *prior.forward),
        lambda x: oracle.mlp(x, *prior.backward),
    )


@pytest.mark.parametrize("num_groups", [1, 2, 3, 17])
def test_losses_oracle(rng, dtype, num_groups):
    prior = qm.MLPPrior.init(5, hidden_dim=7, seed=3)
    merged = rng.standard_normal((2, num_groups, 5)).astype(dtype)
    got = qm.alignment_loss(merged, prior)
    for b in range(2):
        wanted = losses_by_loop(merged[b], prior)
        for loss, truth in zip(got, wanted, strict=True):
            assert loss.dtype == np.result_type(dtype, np.float32)
            assert_close(loss[b], truth, dtype)


def test_padding_does_not_count(rng):
    prior = qm.MLPPrior.init(4, seed=1)
    merged = rng.standard_normal((3, 9, 4))  # the padding is rubbish, not zeros
    counts = np.array([9, 1, 4])
    got = qm.alignment_loss(merged, prior, num_groups=counts)
    for b, count in enumerate(counts):
        wanted = qm.alignment_loss(merged[b, :count], prior)
        assert_close([loss[b] for loss in got], list(wanted))
    assert got.total[1] == 0


def test_one_sequence_gives_scalars(rng):
    loss = qm.alignment_loss(rng.standard_normal((6, 4)), qm.MLPPrior.init(4))
    assert loss.total.shape == ()
    assert_close(loss.total, loss.forward + loss.backward)


def test_reading_backwards_is_the_mirror_image(rng):
    prior = qm.MLPPrior.init(4, seed=2)
    mirrored = qm.MLPPrior(forward=prior.backward, backward=prior.forward)
    merged = rng.standard_normal((8, 4))
    ahead = qm.alignment_loss(merged, prior)
    behind = qm.alignment_loss(merged[::-1], mirrored)
    assert_close(ahead.forward, behind.backward)
    assert_close(ahead.backward, behind.forward)


def test_init_is_seeded_and_bounded():
    prior, same, other = (qm.MLPPrior.init(6, seed=seed) for seed in (4, 4, 5))
    assert prior.forward.weight_in.shape == (256, 6)
    assert prior.forward.weight_out.shape == (6, 256)
    for weights, twin, stranger in zip(
        prior.forward + prior.backward,
        same.forward + same.backward,
        other.forward + other.backward,
        strict=True,
    ):
        np.testing.assert_array_equal(weights, twin)
        assert (weights != stranger).all()
    for ahead, behind in zip(prior.forward, prior.backward, strict=True):
        assert (ahead != behind).all()
    assert abs(prior.forward.weight_in).max() <= 6**-0.5


def test_predict_checks_the_width():
    with pytest.raises(
        ValueError, match="`tokens` must have width D = 6 like the prior"
    ):
        qm.MLPPrior.init(6).predict(np.ones((3, 5)))
    with pytest.raises(ValueError, match="at least 1"):
        qm.MLPPrior.init(0)


@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 4), (2, 5, 1), (2, 1, 4)])
@pytest.mark.parametrize("wrong", [False, True])
def test_prediction_of_another_shape(shape, wrong):
    """`wrong`: the direction whose prediction is of that shape, forward or reverse."""

    class Prior:
        def predict(self, tokens, *, reverse=False, **known):
            return np.ones(shape if reverse == wrong else tokens.shape)

    with pytest.raises(ValueError, match="`prediction` must have shape"):
        qm.alignment_loss(np.ones((2, 5, 4)), Prior())


class TestDecode:
    def test_model_sees_every_prefix_and_nothing_later(self, rng):
        merged = rng.standard_normal((2, 5, 3))
        seen = []

        def model(prefix):
            seen.append(prefix.copy())
            return np.concatenate([prefix, prefix], axis=-1)

        got = qm.decode(merged, model)
        assert got.shape == (2, 5, 6)
        assert_close(got[..., :3], merged)
        for t, prefix in enumerate(seen):
            np.testing.assert_array_equal(prefix, merged[:, : t + 1])

    def test_model_must_return_an_array(self):
        with pytest.raises(TypeError, match="`model` must return an array"):
            qm.decode(np.ones((3, 2)), lambda prefix: 1.0)

    @pytest.mark.parametrize(
        "model",
        [
            lambda prefix: prefix[:, -1:],
            lambda prefix: prefix[..., 0],
            lambda prefix: prefix[0],
            lambda prefix: np.concatenate([prefix, prefix], axis=-2),
        ],
    )
    def test_model_must_answer_every_token(self, model):
        with pytest.raises(ValueError, match="`model` must return shape"):
            qm.decode(np.ones((2, 3, 2)), model)

    @pytest.mark.parametrize("steps", [False, True], ids=["callable", "prior"])
    def test_progress_counts_the_tokens_so_far(self, rng, steps):
        merged, seen = rng.standard_normal((2, 5, 4)), []
        prior = qm.MLPPrior.init(4, hidden_dim=3)

        def model(prefix):
            seen.append(f"prefix of {prefix.shape[-2]}")
            return prefix

        got = qm.decode(merged, prior if steps else model, progress=seen.append)
        assert [x for x in seen if isinstance(x, int)] == [1, 2, 3, 4, 5]
        if not steps:  # after each token, not at the end
            assert seen[:4] == ["prefix of 1", 1, "prefix of 2", 2]
        np.testing.assert_array_equal(got, qm.decode(merged, prior if steps else model))

    def test_nothing_is_drawn_on_a_terminal(self, rng, monkeypatch, capsys):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        monkeypatch.setattr("qm_cupy._progress._PATIENCE", 0)  # seconds before a bar
        qm.decode(rng.standard_normal((3, 4)), qm.MLPPrior.init(4))
        assert capsys.readouterr() == ("", "")

    def test_progress_must_be_callable(self):
        with pytest.raises(TypeError, match="`progress` must be callable or None, got"):
            qm.decode(np.ones((3, 2)), lambda prefix: prefix, progress=True)

    def test_an_error_of_progress_ends_the_decoding(self):
        seen = []

        def stop(done):
            seen.append(done)
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            qm.decode(np.ones((5, 2)), lambda prefix: prefix, progress=stop)
        assert seen == [1, 2]


def test_a_prior_is_pickled_and_copied_without_its_copies_on_gpus():
    prior = qm.MLPPrior.init(4, seed=1)
    prior._copies["a GPU", np.dtype("f4"), False] = prior.forward
    twins = pickle.loads(pickle.dumps(prior)), copy.deepcopy(prior)
    for twin in (*twins, dataclasses.replace(prior)):
        assert twin._copies == {}
        for weights, wanted in zip(twin.forward, prior.forward, strict=True):
            np.testing.assert_array_equal(weights, wanted)
