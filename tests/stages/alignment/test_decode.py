"""Decoding: which prefixes a model reads, and calls of `progress`."""

import numpy as np
import pytest
from conftest import assert_close

import qm_cupy as qm


class TestDecode:
    def test_model_reads_every_prefix_and_nothing_later(self, rng):
        merged = rng.standard_normal((2, 5, 3))
        seen = []

        def model(prefix):
            seen.append(prefix.copy())
            return np.concatenate([prefix, prefix], axis=-1)

        got = qm.decode(merged, model)
        assert got.shape == (2, 5, 6)  # E may differ from D
        assert_close(got[..., :3], merged)
        for t, prefix in enumerate(seen):
            np.testing.assert_array_equal(prefix, merged[:, : t + 1])

    def test_model_must_return_an_array(self):
        with pytest.raises(TypeError, match="`model` must return an array"):
            qm.decode(np.ones((3, 2)), lambda prefix: 1.0)

    @pytest.mark.parametrize(
        "model",
        [
            lambda prefix: prefix[:, -1:],  # only the last row
            lambda prefix: prefix[..., 0],  # no axis E
            lambda prefix: prefix[0],  # no axis B
            lambda prefix: np.concatenate([prefix, prefix], axis=-2),  # 2 t rows
        ],
    )
    def test_model_must_return_one_row_for_every_token(self, model):
        with pytest.raises(ValueError, match="`model` must return shape"):
            qm.decode(np.ones((2, 3, 2)), model)

    @pytest.mark.parametrize("is_prior", [False, True], ids=["callable", "prior"])
    def test_progress_counts_the_tokens_so_far(self, rng, is_prior):
        merged, seen = rng.standard_normal((2, 5, 4)), []
        prior = qm.MLPPrior.init(4, hidden_dim=3)

        def model(prefix):
            seen.append(f"prefix of {prefix.shape[-2]}")
            return prefix

        got = qm.decode(merged, prior if is_prior else model, progress=seen.append)
        assert [x for x in seen if isinstance(x, int)] == [1, 2, 3, 4, 5]
        if not is_prior:  # `progress` is called after each token, not only at the end
            assert seen[:4] == ["prefix of 1", 1, "prefix of 2", 2]
        np.testing.assert_array_equal(
            got, qm.decode(merged, prior if is_prior else model)
        )

    def test_decode_draws_no_progress_bar(self, rng, monkeypatch, capsys):
        # On a terminal, the command line draws a bar after `PATIENCE` seconds. The
        # library must not draw one.
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        monkeypatch.setattr("qm_cupy.cli.progress.PATIENCE", 0)  # seconds before a bar
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
                raise KeyboardInterrupt  # as if the user pressed Ctrl+C

        with pytest.raises(KeyboardInterrupt):
            qm.decode(np.ones((5, 2)), lambda prefix: prefix, progress=stop)
        assert seen == [1, 2]
