"""A listener gets the progress of calls, and changes no result."""

import threading

import numpy as np
import pytest

import qm_cupy as qm
from qm_cupy.progress import listen, listening, report, span
from qm_cupy.stages.clustering.checks import WEIGHTED_METHODS
from qm_cupy.stages.clustering.cluster_tokens import METHODS
from qm_cupy.stages.clustering.linkage import LINKAGES

NUM_TOKENS = 3000
rng = np.random.default_rng(0)
TOKENS = rng.standard_normal((NUM_TOKENS, 16), dtype=np.float32)
SHORT = rng.standard_normal((4, 60, 8), dtype=np.float32)
QUERY = rng.standard_normal((4, 3, 60, 5), dtype=np.float32)
ATTENTION = rng.random((4, 3, 60, 60), dtype=np.float32)
WEIGHTS = rng.random((4, 60), dtype=np.float32)


def heard(call):
    """Return the result of a call, and all its fractions."""
    fractions = []
    with listen(fractions.append):
        result = call()
    return result, fractions


def check(fractions):
    assert fractions[0] == 0
    assert fractions[-1] == 1
    assert fractions == sorted(fractions)
    assert {type(x) for x in fractions} == {float}


class TestSpans:
    def test_parts_of_parts(self):
        got = []
        with listen(got.append), span(0, 1):
            with span(0.25, 0.75):
                report(0.5)
                with span(0.5, 1):
                    report(0.5)
            report(0.875)
        assert got == [0, 0.25, 0.5, 0.5, 0.625, 0.75, 0.75, 0.875, 1]

    @pytest.mark.parametrize("count", [3, 7, 10, 49])
    def test_rounding_never_goes_back(self, count):
        got = []
        with listen(got.append), span(0, 1):
            for outer in range(count):
                with span(outer / count, (outer + 1) / count):
                    for inner in range(count):
                        with span(inner / count, (inner + 1) / count):
                            report(1 - 2**-53)
        check(got)

    def test_without_a_listener(self):
        with span(0, 1):
            report(0.5)
        assert not listening()

    def test_the_inner_listener_gets_the_reports(self):
        outer, inner = [], []
        with listen(outer.append):
            with listen(inner.append):
                report(0.5)
            report(0.25)
        assert (outer, inner) == ([0.25], [0.5])


SOURCES = {
    "tokens": {"weights": "saliency"},
    "hidden_states": {"hidden_states": (SHORT, SHORT)},
    "attention": {"attention": (ATTENTION, ATTENTION)},
    "query": {"query": QUERY, "key": QUERY, "causal": True},
    "saliency": {"saliency": WEIGHTS, "weights": "mass"},
    "array": {"weights": WEIGHTS, "method": "ward", "weighted_linkage": True},
    "both": {"attention": ATTENTION, "method": "nearest"},
}


class TestQuickmerge:
    @pytest.mark.parametrize(
        ("method", "weighted"),
        [(method, False) for method in METHODS] + [(x, True) for x in WEIGHTED_METHODS],
    )
    def test_one_long_sequence(self, method, weighted):
        options = {"method": method, "weighted_linkage": weighted}
        if weighted:
            options["weights"] = np.linspace(1, 2, NUM_TOKENS, dtype=np.float32)
        merged, fractions = heard(lambda: qm.quickmerge(TOKENS, 0.1, **options))
        check(fractions)
        # SciPy's linkage cannot report.
        least = 3 if method in LINKAGES and not weighted else 10
        assert len({*fractions}) >= least
        for x, y in zip(merged, qm.quickmerge(TOKENS, 0.1, **options), strict=True):
            np.testing.assert_array_equal(x, y, strict=True)

    @pytest.mark.parametrize("source", SOURCES)
    @pytest.mark.parametrize("masked", [False, True])
    def test_batches_and_sources(self, source, masked):
        options = dict(SOURCES[source])
        if masked:
            options["mask"] = np.arange(60) < np.array([[60], [31], [1], [59]])
        merged, fractions = heard(lambda: qm.quickmerge(SHORT, 0.2, **options))
        check(fractions)
        assert len({*fractions}) >= 6  # the four sequences, and 0 and 1
        for x, y in zip(merged, qm.quickmerge(SHORT, 0.2, **options), strict=True):
            np.testing.assert_array_equal(x, y, strict=True)

    def test_each_call_starts_at_zero(self):
        _, once = heard(lambda: qm.quickmerge(SHORT, 3))
        _, twice = heard(lambda: [qm.quickmerge(SHORT, 3) for _ in range(2)])
        assert twice == 2 * once

    def test_part_of_a_longer_work(self):
        def work():
            for i in range(2):
                with span(i / 2, (i + 1) / 2):
                    qm.quickmerge(SHORT, 3)

        _, fractions = heard(work)
        check(fractions)
        assert 0.5 in fractions

    def test_a_limit_instead_of_a_budget(self):
        _, fractions = heard(lambda: qm.quickmerge(SHORT, max_error=0.2))
        check(fractions)

    def test_an_empty_batch(self):
        _, fractions = heard(lambda: qm.quickmerge(SHORT[:0], 3, weights="saliency"))
        check(fractions)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    @pytest.mark.parametrize("when", [0.0, 0.3, 1.0])
    def test_an_exception_stops_the_call(self, error, when):
        def stop(fraction):
            if fraction >= when:
                raise error("stop")

        with pytest.raises(error, match="stop"), listen(stop):
            qm.quickmerge(SHORT, 3, weights="saliency")
        assert not listening()

    def test_the_listener_stays_after_an_exception(self):
        """The user may catch the exception inside the block."""
        got = []

        def stop(fraction):
            got.append(fraction)
            if fraction == 1:
                raise KeyboardInterrupt

        with listen(stop):
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    qm.quickmerge(SHORT, 3)
        assert got.count(0.0) >= 2
        assert got[len(got) // 2 :] == got[: len(got) // 2]

    def test_threads_have_their_own_listeners(self):
        got, seen = {0: [], 1: []}, []
        barrier = threading.Barrier(2, timeout=30)

        def work(number):
            seen.append(listening())  # not the listener of the main thread
            with listen(got[number].append):
                barrier.wait()
                qm.quickmerge(SHORT[: number + 1], 3)

        main = []
        with listen(main.append):
            threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert (main, seen) == ([], [False, False])
        for number, fractions in got.items():
            _, alone = heard(lambda n=number: qm.quickmerge(SHORT[: n + 1], 3))
            assert fractions == alone


@pytest.mark.parametrize("function", [qm.linkage, lambda x: qm.cluster_tokens(x, 3)])
def test_stages_alone(function):
    _, fractions = heard(lambda: function(SHORT))
    assert fractions == sorted(fractions)
    assert {0, 0.25, 0.5, 0.75, 1} <= {*fractions}  # the four sequences
