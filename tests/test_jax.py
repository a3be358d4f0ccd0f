"""The functions of `qm_cupy` with JAX: gradients, and JAX's transformations."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import to_numpy
from gradient_calls import CALLS, CONSTANT, flat
from test_framework import PAPER

import qm_cupy as qm

jax = pytest.importorskip("jax")
qj = pytest.importorskip("qm_cupy.jax")
jnp = jax.numpy
check_grads = pytest.importorskip("jax.test_util").check_grads


# Eager calls have values, jitted ones only tracers: the two ways through the library.
@pytest.fixture(params=["eager", "jit"])
def transform(request):
    return jax.jit if request.param == "jit" else lambda function: function


def arrays(inputs, dtype=np.float64):
    """Convert arrays to JAX, floats in a dtype; leave counts, which decide shapes."""
    converted = {}
    for name, x in inputs.items():
        converted[name] = x
        if isinstance(x, np.ndarray) and name not in ("num_groups", "budget"):
            converted[name] = jnp.asarray(x, dtype if x.dtype.kind == "f" else None)
    return converted


def run(call, inputs, rest):
    return flat(getattr(qm, call.function)(**inputs, **rest))  # floating results only


def total(results):
    """Return the sum of the results, each entry with a random weight of its own.

    A plain sum would hide gradients that are only permuted.
    """
    rng = np.random.default_rng(0)
    return sum((x * rng.standard_normal(x.shape)).sum() for x in results)


class TestNames:
    def test_the_module_has_only_pytrees(self):
        classes = {x for x in qm.__all__ if f"import {x}\n" in PAPER and x[0].isupper()}
        assert set(qj.__all__) == classes | {"MLPPrior"}
        for name in qj.__all__:
            assert getattr(qj, name) is getattr(qm, name)
        # 4 weights of each of 2 MLPs.
        assert len(jax.tree.leaves(qm.QuickMergePP(4))) == 8

    def test_constants_have_no_gradient(self, transform):
        tokens = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 4)))
        labels = qm.cluster_tokens(tokens, 3)
        tree = qm.linkage(tokens).astype(np.float32)
        calls = {
            "cluster_tokens": (tokens, {"num_groups": 3}),
            "cut_linkage": (tree, {"num_groups": 3}),
            "select_tokens": (tokens[..., 0], {"num_groups": 3}),
            "norm_budget": (tokens, {"gamma": 0.5}),
            "group_sizes": (labels, {"num_groups": np.array([3, 3])}),
            "group_positions": (labels, {"num_groups": 3}),
        }
        assert set(calls) == CONSTANT
        # Each must work under jit, give integers, and have gradient 0.
        for name, (x, options) in calls.items():
            function = transform(functools.partial(getattr(qm, name), **options))
            result = function(x)
            assert result.dtype == np.int32
            np.testing.assert_array_equal(result, getattr(qm, name)(x, **options))
            if x.dtype == np.float32:

                def loss(x, function=function):
                    return (function(x) * 1.0).sum()

                assert not jax.grad(loss)(x).any()

    @pytest.mark.parametrize("name", ["cosine_similarity", "linkage", "decode"])
    def test_other_functions_refuse_tracers(self, name):
        more = (lambda x: x,) if name == "decode" else ()
        with pytest.raises(TypeError, match="is a JAX tracer"):
            jax.grad(lambda x: getattr(qm, name)(x, *more).sum())(jnp.ones((5, 3)))


@pytest.mark.parametrize("name", CALLS)
class TestCalls:
    @pytest.mark.parametrize("wide", [False, True])
    def test_results_equal_those_without_jit(self, name, wide, transform):
        call = CALLS[name]
        with jax.enable_x64(wide):
            dtype = np.float64 if wide else np.float32
            inputs, rest = arrays(call.inputs, dtype), arrays(call.rest, dtype)
            got = transform(lambda inputs: run(call, inputs, rest))(inputs)
            wanted = flat(getattr(qm, call.function)(**inputs, **rest))
            for x, y in zip(got, wanted, strict=True):
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)

    def test_check_grads(self, name, transform):
        call = CALLS[name]
        with jax.enable_x64(True):
            inputs, rest = arrays(call.inputs), arrays(call.rest)

            @transform
            def function(*values):
                # check_grads moves the point in NumPy, so these are NumPy arrays.
                values = map(jnp.asarray, values)
                return run(call, dict(zip(inputs, values, strict=True)), rest)

            values = (*inputs.values(),)
            # A step of 1e-5 in float64 leaves about ten
            # correct digits of a difference.
            settings = {"eps": 1e-5, "rtol": 1e-6, "atol": 1e-8}
            check_grads(function, values, order=1, modes=["rev"], **settings)

    def test_gradients_under_transformations(self, name):
        """grad, value_and_grad, both orders of jit and grad, and each input alone."""
        call = CALLS[name]
        inputs, rest = arrays(call.inputs, np.float32), arrays(call.rest, np.float32)

        def loss(inputs):
            return total(run(call, inputs, rest))

        wanted = jax.grad(loss)(inputs)
        value, result = jax.value_and_grad(jax.jit(loss))(inputs)
        assert value == pytest.approx(float(loss(inputs)), rel=1e-5)
        for other in (result, jax.jit(jax.grad(loss))(inputs)):
            for x, y in zip(other.values(), wanted.values(), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        # With one input alone the other arrays are constants.
        for one in inputs:
            alone = jax.grad(lambda x, one=one: loss({**inputs, one: x}))(inputs[one])
            np.testing.assert_array_equal(alone, wanted[one])

    def test_second_derivative(self, name):
        # The gradients are kernels without gradients of their own. A silent 0 would
        # be wrong, so a second derivative must raise.
        call = CALLS[name]
        inputs, rest = arrays(call.inputs, np.float32), arrays(call.rest, np.float32)

        def slope(inputs):
            gradient = jax.grad(lambda x: total([y * y for y in run(call, x, rest)]))
            return sum(x.sum() for x in gradient(inputs).values())

        with pytest.raises(NotImplementedError, match="can be differentiated once"):
            jax.grad(slope)(inputs)

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_halves(self, name, dtype, transform):
        call = CALLS[name]
        inputs, rest = arrays(call.inputs, dtype), arrays(call.rest, dtype)

        def loss(inputs, rest=rest):
            return total([x.astype(np.float32) for x in run(call, inputs, rest)])

        result = transform(jax.grad(loss))(inputs)
        # The same numbers in float32: only the last rounding differs.
        wide = {k: x.astype(np.float32) for k, x in inputs.items()}
        wanted = jax.grad(lambda x: loss(x, arrays(call.rest, np.float32)))(wide)
        for x, y in zip(result.values(), wanted.values(), strict=True):
            assert x.dtype == dtype
            size = float(abs(y).max())
            got = np.asarray(x, np.float32)
            # bfloat16 keeps 8 bits; 2 ** -6 leaves room for a few roundings.
            np.testing.assert_allclose(got, y, rtol=2**-6, atol=2**-6 * size)


class TestVmap:
    @pytest.mark.slow("JAX compiles every call")
    def test_vmap_maps_one_sequence_at_a_time(self, rng):
        tokens = jnp.asarray(rng.standard_normal((3, 9, 4)), np.float32)

        def loss(tokens):
            merged = qm.quickmerge(tokens, 3, weights="mass")
            return (merged.tokens**2).sum() + merged.mass.sum()

        # The expected values: one call for each sequence.
        wanted = [jax.value_and_grad(loss)(x) for x in tokens]
        for function in (jax.vmap, lambda f: jax.jit(jax.vmap(f))):
            values, slopes = function(jax.value_and_grad(loss))(tokens)
            for i, (value, slope) in enumerate(wanted):
                assert float(values[i]) == pytest.approx(float(value), rel=1e-6)
                np.testing.assert_allclose(slopes[i], slope, rtol=1e-5, atol=1e-6)

    def test_arguments_that_are_not_mapped(self, rng):
        tokens = jnp.asarray(rng.standard_normal((3, 5, 4)), np.float32)
        labels = jnp.array([0, 1, 0, 1, 1])
        result = jax.vmap(qm.merge_tokens, in_axes=(0, None, None))(tokens, labels, 2)
        repeated = jnp.broadcast_to(labels, (3, 5))
        np.testing.assert_array_equal(result, qm.merge_tokens(tokens, repeated, 2))

    # jacrev maps the vjp over the rows of the identity.
    def test_a_jacobian(self, rng):
        scores = jnp.asarray(rng.random(4), np.float32)
        result = jax.jacrev(functools.partial(qm.gumbel_softmax, temperature=0.5))(
            scores
        )
        p = np.asarray(qm.gumbel_softmax(scores, temperature=0.5))
        # The Jacobian of a softmax: (diag(p) - p pᵀ) / tau.
        wanted = (np.diag(p) - np.outer(p, p)) / 0.5
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-6)


class TestPrior:
    @pytest.fixture
    def merged(self, rng):
        return jnp.asarray(rng.standard_normal((2, 6, 4)), np.float32)

    def test_weights(self, merged, transform):
        """Compares with JAX's own gradients through the plain formula."""
        prior = qm.MLPPrior.init(4, hidden_dim=5, seed=3)

        def plain(prior, merged):
            steps = jnp.arange(1, 6)[:, None]  # t of the mean over x_1..t
            directions = (prior.forward, merged), (prior.backward, merged[:, ::-1])
            losses = 0
            for (w1, b1, w2, b2), x in directions:
                context = x.cumsum(axis=1)[:, :-1] / steps  # (B, K - 1, D)
                gap = jax.nn.relu(context @ w1.T + b1) @ w2.T + b2 - x[:, 1:]
                losses += (gap**2).mean(axis=(1, 2)).sum()
            return losses

        def ours(prior, merged):
            return qm.alignment_loss(merged, prior).total.sum()

        result = transform(jax.grad(ours, argnums=(0, 1)))(prior, merged)
        wanted = jax.grad(plain, argnums=(0, 1))(prior, merged)
        assert isinstance(result[0], qm.MLPPrior)
        pairs = zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True)
        for x, y in pairs:
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)

    def test_a_pytree_goes_back_to_the_library(self, merged):
        prior = jax.tree.map(jnp.asarray, qm.MLPPrior.init(4))
        back = jax.tree.map(np.asarray, prior)
        np.testing.assert_array_equal(
            qm.alignment_loss(merged, back).total,
            qm.alignment_loss(merged, prior).total,
        )

    def test_a_merged_brings_its_number_of_groups(self):
        tokens = jnp.arange(40.0).reshape(2, 5, 4) ** 2
        prior, counts = qm.MLPPrior.init(4), np.array([4, 2])
        result = qm.quickmerge(tokens, counts)
        wanted = qm.alignment_loss(result.tokens, prior, num_groups=counts).total
        np.testing.assert_array_equal(qm.alignment_loss(result, prior).total, wanted)
        # Without the counts the zeros of padded groups would count as tokens.
        assert (qm.alignment_loss(result.tokens, prior).total != wanted).any()

    def test_a_merged_may_be_traced(self, rng):
        tokens = jnp.asarray(rng.standard_normal((2, 9, 4)), np.float32)
        prior = qm.MLPPrior.init(4)

        def loss(tokens):
            return qm.alignment_loss(qm.quickmerge(tokens, 3), prior).total

        np.testing.assert_allclose(jax.jit(loss)(tokens), loss(tokens), rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(loss)(tokens), loss(tokens), rtol=1e-5)

    # Optimizers return weights as JAX arrays, not as NumPy's.
    def test_a_trained_prior_predicts(self, merged):
        prior = qm.MLPPrior.init(4, hidden_dim=5)
        trained = jax.tree.map(jnp.asarray, prior)
        np.testing.assert_array_equal(trained.predict(merged), prior.predict(merged))
        token, _ = trained.step(merged[:, 0])
        np.testing.assert_array_equal(token, prior.step(merged[:, 0])[0])
        assert qm.decode(merged, trained).shape == merged.shape

    def test_other_priors_have_no_gradient(self, merged):
        class Zero:
            def predict(self, tokens, **known):  # num_groups and others
                return 0 * tokens

        assert qm.alignment_loss(merged, Zero()).total.shape == (2,)
        with pytest.raises(TypeError, match="`merged` is a JAX tracer"):
            jax.grad(lambda x: qm.alignment_loss(x, Zero()).total.sum())(merged)


class TestQuickMergePP:
    def test_losses_equal_those_without_jit(self, rng, transform):
        tokens = jnp.asarray(rng.standard_normal((2, 30, 8)), np.float32)
        mask, counts = jnp.asarray(rng.random((2, 30)) < 0.9), np.array([6, 3])
        model = qj.QuickMergePP(8, seed=3)
        call = transform(lambda model, x: model(x, counts, 0.5, mask=mask))
        merged, losses = call(model, tokens)
        wanted, floats = qm.QuickMergePP(8, seed=3)(tokens, counts, 0.5, mask=mask)
        np.testing.assert_array_equal(merged, wanted)
        assert {k: float(x) for k, x in losses.items()} == pytest.approx(floats)

    def test_steps_lower_the_loss(self, rng):
        tokens = jnp.asarray(rng.standard_normal((2, 30, 8)), np.float32)
        model = qj.QuickMergePP(8)
        step = jax.jit(jax.value_and_grad(lambda model: model(tokens, 6)[1]["total"]))
        values = []
        for _ in range(4):
            value, slope = step(model)
            # Gradient descent.
            model = jax.tree.map(lambda w, g: w - 0.05 * g, model, slope)
            values.append(float(value))
        assert values == sorted(values, reverse=True)
        assert step._cache_size() == 2  # NumPy weights first, then JAX weights
        assert isinstance(model.ar_alignment, qj.BidirectionalARAlignment)

    def test_equal_models_have_equal_structures(self):
        """The structure has the options, which decide what `jax.jit` compiles."""
        structure = jax.tree.structure
        model = structure(qj.QuickMergePP(8, seed=3))
        assert model == structure(qj.QuickMergePP(8, seed=3))
        assert hash(model) == hash(structure(qj.QuickMergePP(8, seed=3)))
        for options in ({"seed": 4}, {"gamma": 0.5}, {"num_layers": 2}):
            assert model != structure(qj.QuickMergePP(8, **{"seed": 3, **options}))
        one = qj.EntropyAwareSaliency(8), qj.NormBasedFidelityConstraint(0.5)
        assert jax.tree.leaves(one) == []
        assert structure(one[0]) == structure(qj.EntropyAwareSaliency(8))
        assert structure(one[1]) != structure(qj.NormBasedFidelityConstraint(0.6))

    def test_an_equal_model_is_not_compiled_again(self):
        tokens = jnp.sin(jnp.arange(96.0)).reshape(2, 12, 4)
        merge = jax.jit(lambda model: model(tokens, 3)[0])
        results = [merge(qj.QuickMergePP(4)) for _ in range(2)]
        np.testing.assert_array_equal(*results)
        assert merge._cache_size() == 1
        two = jax.tree.map(lambda x, y: x + y, qj.QuickMergePP(4), qj.QuickMergePP(4))
        assert type(two.token_merger) is qm.DifferentiableTokenMerging
        assert vars(two.token_merger) == vars(qm.DifferentiableTokenMerging())

    def test_inference(self, rng):
        tokens = jnp.asarray(rng.standard_normal((30, 8)), np.float32)
        merged, predictions = qj.QuickMergePP(8).inference(tokens, 6, jnp.tanh)
        wanted = qm.quickmerge(tokens, 6, weights="mass", noise_seed=0)
        np.testing.assert_array_equal(merged, wanted.tokens)
        np.testing.assert_allclose(predictions, jnp.tanh(merged), rtol=1e-6)

    def test_the_other_classes(self, rng):
        tokens = jnp.asarray(rng.standard_normal((2, 9, 4)), np.float32)

        def loss(tokens):
            scores = qm.EntropyAwareSaliency(4)(tokens)
            merged, mask = qm.DifferentiableTokenMerging()(tokens, scores, 3)
            fidelity = qm.NormBasedFidelityConstraint().compute_fidelity_loss(
                tokens, merged
            )
            return fidelity + (mask * mask).sum()

        assert jax.jit(jax.grad(loss))(tokens).any()


class TestErrors:
    # Shapes and seeds must be known while JAX traces.
    @pytest.mark.parametrize(
        ("name", "call"),
        [
            ("seed", lambda x, k: qm.gumbel_softmax(x[0], seed=k)),
            ("temperature", lambda x, k: qm.gumbel_softmax(x[0], temperature=k)),
            ("num_groups", lambda x, k: qm.select_tokens(x[0], k)),
            ("num_groups", lambda x, k: qm.group_sizes(jnp.zeros(3, int), k[None])),
            ("budget", lambda x, k: qm.quickmerge(x, k)),
            ("noise_seed", lambda x, k: qm.quickmerge(x, 2, noise_seed=k)),
            ("mask", lambda x, k: qm.quickmerge(x, 0.5, mask=x[:, 0] > 0)),
        ],
    )
    def test_options_are_static(self, name, call):
        with pytest.raises(TypeError, match=f"`{name}` is a JAX tracer, but its value"):
            jax.jit(call)(jnp.ones((5, 3)), 2)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda x: jax.jit(lambda y: qm.merge_tokens(y, [0], 1))(x), TypeError,
             "`labels` must be a jax.Array, got list"),
            (lambda x: qm.quickmerge(x, 2, mask=jnp.ones(3, bool)), ValueError,
             r"`mask` must have shape .* \(B, N\) = \(2, 5\), got \(3,\)"),
            (lambda x: qm.quickmerge(x, 6), ValueError,
             r"`budget` must lie in 1..5 \(its tokens\), got 6"),
            (lambda x: qm.gumbel_softmax(x[0], seed=-1), ValueError, "`seed`"),
            (lambda x: qm.merge_tokens(x, x, 2), TypeError,
             "`labels` must be integers"),
            (lambda x: qm.group_sizes(jnp.zeros(3, int), np.ones(2)), TypeError,
             "`num_groups` must be integers, got float64"),
            (lambda x: qm.norm_saliency(x / 0), ValueError, "`tokens` must be finite"),
            (lambda x: jax.jit(qm.norm_saliency)(x / 0), Exception,
             "`tokens` must be finite"),
            (lambda x: jax.jvp(qm.norm_saliency, (x,), (x,)), TypeError,
             "forward-mode"),
        ],
    )  # fmt: skip
    def test_error_messages(self, call, error, message):
        with pytest.raises(error, match=message):
            call(jnp.ones((2, 5, 3)))


def test_numpy_beside_a_tracer(rng):
    tokens, weights = rng.standard_normal((2, 9, 4)), rng.random((2, 9))
    result = jax.jit(lambda weights: qm.quickmerge(tokens, 3, weights=weights))(weights)
    assert all(isinstance(x, jax.Array) for x in result)
    assert result.tokens.dtype == np.float32  # JAX's default width
    assert to_numpy(result.labels).tolist() == qm.cluster_tokens(tokens, 3).tolist()


def test_counts_that_decide_no_shape_may_be_traced():
    scores = jnp.asarray([0.1, 0.4, 0.2])
    result = jax.jit(lambda k: qm.gumbel_softmax(scores, seed=None, hard=k))(2)
    assert result.tolist() == [0, 1, 1]  # the two largest of 0.1, 0.4, 0.2


def test_callbacks_return_large_arrays():
    """A callback that waited for the thread it runs in would hang."""
    tokens = jnp.ones((4, 2048, 256)) * jnp.arange(2048)[:, None]  # 8 MiB
    slope = jax.jit(jax.grad(lambda x: qm.norm_saliency(x * 2).sum()))(tokens)
    assert slope.shape == tokens.shape


def test_settings_hold_in_callbacks(monkeypatch):
    """A callback has the settings of the trace, even if it runs in another thread."""
    tokens, labels = jnp.ones((3, 2)), jnp.zeros(3, int)
    mass, plain = jnp.array([-1.0, 2.0, 3.0]), jax.pure_callback

    def elsewhere(function, results, *arguments, **options):
        def in_a_thread(*x):
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(function, *x).result()

        return plain(in_a_thread, results, *arguments, **options)

    monkeypatch.setattr(jax, "pure_callback", elsewhere)

    def merge(mass):
        return qm.merge_tokens(tokens, labels, 1, mass=mass)

    # The negative mass is refused by the check, which is
    # on unless it is switched off.
    with pytest.raises(Exception, match="`mass` must be ≥ 0"):
        jax.jit(merge)(mass)
    with qm.check_finite(False):
        result = jax.jit(lambda mass: merge(mass))(mass)
    # All tokens are ones, so every weighted mean is 1: (-1 + 2 + 3) / 4.
    np.testing.assert_allclose(result, np.ones((1, 2)))
