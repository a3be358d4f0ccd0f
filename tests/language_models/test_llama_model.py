"""`LanguageModel` computes what transformers computes, in one pass or in parts."""

import copy
import pickle

import numpy as np
import pytest
from llama_models import VOCABULARY, ids_of, in_transformers, random_model

import qm_cupy as qm

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def logits_of(model, ids):
    """Return the logits of a model of transformers in NumPy."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


# The expected values come from torch, and not from code of this library.
class TestAgainstTransformers:
    @TIED
    def test_logits(self, tied):
        theirs, ids = in_transformers(tied), ids_of(2, 60)
        model = qm.LanguageModel.from_transformers(theirs)
        wanted = logits_of(theirs, ids)
        # The default computes in float32, whatever the library of the ids is.
        got = model.predict(model.embed(ids))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, atol=1e-4)
        assert np.abs(wanted).max() > 3  # so the tolerance is small
        assert ("lm_head.weight" in model.weights) == (not tied)
        # A sequence alone has the same logits as in a batch.
        alone = model.predict(model.embed(ids[1]))
        np.testing.assert_allclose(alone, got[1], atol=1e-4)

    # transformers rotates in float32, even if the weights are float64.
    # So the tolerance is that of float32.
    @TIED
    def test_logits_in_float64(self, tied):
        theirs, ids = in_transformers(tied).double(), ids_of(1, 40)
        model = qm.LanguageModel.from_transformers(theirs)
        tokens = model.embed(ids)
        assert tokens.dtype == np.float64
        got = model.predict(tokens)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, logits_of(theirs, ids), atol=2e-5)

    @pytest.mark.parametrize(
        "options",
        [
            # A head of keys for each head of queries, and one for all.
            {"num_key_value_heads": 4},
            {"num_key_value_heads": 1},
            {"head_dim": 12},  # queries are wider than tokens
            {"num_hidden_layers": 1, "intermediate_size": 7},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            {"rms_norm_eps": 0.5},
        ],
        ids=lambda x: next(iter(x)),
    )
    def test_other_sizes(self, options):
        theirs, ids = in_transformers(**options), ids_of(2, 30)
        model = qm.LanguageModel.from_transformers(theirs)
        got = model.predict(model.embed(ids))
        np.testing.assert_allclose(got, logits_of(theirs, ids), atol=1e-4)

    def test_state_dict(self):
        theirs, ids = in_transformers(), ids_of(9)
        state = theirs.state_dict()
        options = {"num_heads": 4, "num_key_heads": 2, "epsilon": 1e-2}
        arrays = {name: x.numpy() for name, x in state.items()}
        # Tensors and arrays.
        wanted = logits_of(theirs, ids[None])[0]
        # Tensors of torch, and arrays of NumPy.
        for weights in (state, arrays):
            model = qm.LanguageModel.from_state_dict(weights, **options)
            got = model.predict(model.embed(ids))
            np.testing.assert_allclose(got, wanted, atol=1e-4)
        # The weights are copies, so training goes on without an effect.
        arrays["model.norm.weight"] *= 2
        np.testing.assert_array_equal(model.predict(model.embed(ids)), got)

    @TIED
    def test_generate(self, tied):
        torch = pytest.importorskip("torch")
        theirs, ids = in_transformers(tied), ids_of(2, 20)
        model = qm.LanguageModel.from_transformers(theirs)
        # transformers needs a mask to know that nothing is padding.
        text = torch.from_numpy(ids)
        mask = torch.ones_like(text)
        wanted = theirs.generate(
            text, attention_mask=mask, max_new_tokens=25, do_sample=False
        )
        got = model.generate(ids, 25)
        np.testing.assert_array_equal(got, wanted[:, 20:].numpy())
        assert got.dtype == ids.dtype
        assert len(np.unique(got)) > 5  # not always the same token

    def test_generate_with_a_budget_is_that_of_a_merged_cache(self):
        merged_cache = pytest.importorskip("qm_cupy.transformers").MergedCache
        torch = pytest.importorskip("torch")
        theirs, ids = in_transformers(), ids_of(2, 120)
        model = qm.LanguageModel.from_transformers(theirs)
        # A merge that differs in one entry changes one of 40 tokens at least.
        text, same = torch.from_numpy(ids), []
        options = {"attention_mask": torch.ones_like(text), "do_sample": False}
        # Without a budget, for comparison.
        plain = model.generate(ids, 20)
        # By default, all layers have one budget.
        alone = {"per_layer": False}
        for settings in (
            {},
            {"per_head": True, **alone},
            {"every": 6},
            {"every": 5, "rotate_at": "first", **alone},
        ):
            cache = merged_cache(theirs, 0.3, **settings)
            wanted = theirs.generate(text, cache=cache, max_new_tokens=20, **options)
            got = model.generate(ids, 20, budget=0.3, **settings)
            same.append(np.array_equal(got, wanted[:, 120:].numpy()))
            assert not np.array_equal(got, plain)  # the merge has an effect
        assert all(same)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"hidden_act": "gelu"}, "hidden_act='silu'"),
            ({"attention_bias": True}, "attention_bias=False"),
            ({"mlp_bias": True}, "mlp_bias=False"),
            (
                {
                    "rope_parameters": {
                        "rope_type": "linear",
                        "factor": 2.0,
                        "rope_theta": 1e4,
                    }
                },
                "scaled rotations",
            ),
        ],
    )
    def test_other_configurations_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            qm.LanguageModel.from_transformers(in_transformers(**options))

    def test_other_models_are_refused(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(TypeError, match="must be a model of transformers, such as"):
            qm.LanguageModel.from_transformers(torch.nn.Linear(2, 2))
        # The architecture is that of a Llama, but the name is not.
        theirs = in_transformers()
        # Other networks may have weights of the same names.
        theirs.config.model_type = "gemma"
        with pytest.raises(ValueError, match="\"llama\", got 'gemma'"):
            qm.LanguageModel.from_transformers(theirs)


class TestParts:
    """Reading in any parts gives the logits of one pass."""

    def test_steps(self):
        model, ids = random_model(), ids_of(2, 19)
        tokens, state = model.embed(ids), None
        wanted = model.predict(tokens)
        # A new state has memory for 16 tokens, so it grows.
        for t in range(19):
            logits, state = model.step(tokens[:, t], state)
            np.testing.assert_allclose(logits, wanted[:, t], atol=1e-4)
            assert state.num_seen == t + 1

    def test_steps_with_positions_and_sizes(self):
        model, rng = random_model(), np.random.default_rng(0)
        tokens = model.embed(ids_of(2, 12))
        sizes = rng.integers(1, 5, (2, 12))
        sizes[0, 3] = 0  # is not attended to
        positions = np.cumsum(sizes, axis=-1)
        wanted = model.predict(tokens, positions=positions, sizes=sizes)
        state = None
        # One token at a time, with the same positions and sizes.
        for t in range(12):
            logits, state = model.step(
                tokens[:, t], state, position=positions[:, t], size=sizes[:, t]
            )
            np.testing.assert_allclose(logits, wanted[:, t], atol=1e-4)
        # `read` takes them too, and continues after the last position.
        logits, read = model.read(tokens, positions=positions, sizes=sizes)
        np.testing.assert_allclose(logits, wanted, atol=1e-4)
        np.testing.assert_array_equal(read.next_position, positions[:, -1] + 1)
        # Ids after embeddings, without positions.
        more = ids_of(2, 3, seed=1)
        # Later tokens have size 1.
        whole, _ = model.read(
            np.concatenate([tokens, model.embed(more)], axis=1),
            positions=np.concatenate(
                [positions, positions[:, -1:] + [[1, 2, 3]]], axis=1
            ),
            sizes=np.concatenate([sizes, np.ones((2, 3), int)], axis=1),
        )
        np.testing.assert_allclose(model.read(more, read)[0], whole[:, 12:], atol=1e-4)

    @pytest.mark.parametrize("cuts", [(5,), (1, 2, 40), (39,), (16, 32)])
    def test_reads(self, cuts):
        model, ids = random_model(), ids_of(2, 41)
        wanted, whole = model.read(ids)
        np.testing.assert_array_equal(wanted, model.read(model.embed(ids))[0])
        # Parts of any length, also of one token.
        state, parts = None, []
        for part in np.split(ids, cuts, axis=-1):
            logits, state = model.read(part, state)
            parts.append(logits)
        np.testing.assert_allclose(np.concatenate(parts, 1), wanted, atol=1e-4)
        # What the merge needs is the same too.
        for name in ("keys", "values", "bias"):
            np.testing.assert_allclose(
                getattr(state, name), getattr(whole, name), atol=1e-4
            )
        np.testing.assert_allclose(
            state.attended.query(), whole.attended.query(), atol=1e-4
        )
        for name in ("received", "counts"):
            np.testing.assert_allclose(
                getattr(state.attended, name), getattr(whole.attended, name), atol=1e-4
            )
        # The head is the largest matrix, so `generate` runs it for one token.
        last, _ = model.read(ids, last_only=True)
        np.testing.assert_allclose(last, wanted[:, -1:], atol=1e-4)

    def test_texts_that_branch(self):
        """Two texts continue from one state, and do not disturb each other."""
        model, ids = random_model(), ids_of(10)
        _, state = model.read(ids)
        # The second and third text find the slots after the state in use.
        before = state.keys
        branches = [ids_of(4, seed=seed) for seed in (1, 2, 3)]
        read = [model.read(branch, state) for branch in branches]
        for branch, (logits, after) in zip(branches, read, strict=True):
            whole = np.concatenate([ids, branch])
            np.testing.assert_allclose(logits, model.read(whole)[0][10:], atol=1e-4)
            # A branch can go on, too.
            again, _ = model.read(branch, after)
            np.testing.assert_allclose(
                again, model.read(np.concatenate([whole, branch]))[0][14:], atol=1e-4
            )
        np.testing.assert_array_equal(state.keys, before)

    def test_padding_changes_nothing_before_it(self):
        model = random_model()
        tokens = model.embed(ids_of(2, 9))
        # Attention is causal, so later tokens are not seen anyway.
        wanted = model.predict(tokens[:, :6])
        got = model.predict(tokens, num_groups=np.array([6, 9]))
        np.testing.assert_allclose(got[:, :6], wanted, atol=1e-4)

    def test_a_size_counts_as_so_many_tokens(self):
        """Three equal keys at one position are one key of size three."""
        model = random_model()
        # The last token attends to a key three times, or once with size 3.
        a, b = model.embed(ids_of(2))
        many = model.predict(np.stack([a, a, a, b]), positions=np.array([0, 0, 0, 5]))
        merged = model.predict(
            np.stack([a, b]), positions=np.array([0, 5]), sizes=np.array([3, 1])
        )
        np.testing.assert_allclose(merged[-1], many[-1], atol=1e-4)

    @pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1)])
    def test_one_token(self, shape):
        model, ids = random_model(), ids_of(*shape)
        logits, state = model.read(ids)
        assert logits.shape == (*shape, VOCABULARY)
        np.testing.assert_allclose(logits, model.predict(model.embed(ids)), atol=1e-5)
        assert state.num_stored == 1
        assert model.generate(ids, 2).shape == (*shape[:-1], 2)


class TestLibrary:
    """The functions of the library take the model as it is."""

    def test_decode(self):
        model = random_model()
        # The decoder passes sizes and positions of merged tokens.
        merged = qm.quickmerge(model.embed(ids_of(2, 40)), 0.5)
        # `decode` calls `step` for one merged token at a time.
        got = qm.decode(merged, model)
        wanted = model.predict(
            merged.tokens, positions=merged.positions, sizes=merged.sizes
        )
        np.testing.assert_allclose(got, wanted, atol=1e-4)

    def test_inference_of_the_paper(self):
        model = random_model()
        tokens, logits = qm.quickmerge_inference(model.embed(ids_of(40)), model, 0.5)
        assert tokens.shape == (20, 32)
        assert logits.shape == (20, VOCABULARY)
        assert np.isfinite(logits).all()

    def test_torch(self):
        torch = pytest.importorskip("torch")
        model, ids = random_model(), ids_of(2, 20)
        # Integers of torch give embeddings of torch.
        tokens = model.embed(torch.from_numpy(ids))
        assert isinstance(tokens, torch.Tensor)
        wanted = model.predict(model.embed(ids))
        np.testing.assert_allclose(model.predict(tokens).numpy(), wanted, atol=1e-5)
        logits, state = model.step(tokens[:, 0])
        assert isinstance(logits, torch.Tensor)
        assert isinstance(state.keys, torch.Tensor)
        new = model.generate(torch.from_numpy(ids), 3)
        assert isinstance(new, torch.Tensor)
        np.testing.assert_array_equal(new.numpy(), model.generate(ids, 3))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_dtypes_of_embeddings(self, dtype):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        model, name = random_model(), dtype
        dtype = getattr(ml_dtypes, name, None) or np.dtype(name)
        tokens = model.embed(ids_of(8)).astype(dtype)
        # Embeddings in half precision are computed in float32.
        got = model.predict(tokens)
        assert got.dtype == (np.float64 if name == "float64" else np.float32)
        # Narrow embeddings are widened without a loss.
        wanted = model.predict(tokens.astype(np.float64))
        np.testing.assert_allclose(got, wanted, atol=1e-4)

    def test_copies(self):
        model, ids = random_model(), ids_of(5)
        wanted = model.predict(model.embed(ids))
        # Copies leave out the weights that are ready for use.
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            np.testing.assert_array_equal(twin.predict(twin.embed(ids)), wanted)
        assert repr(model) == (
            "LanguageModel(3 layers, width 32, 4 heads (2 of keys), 101 tokens)"
        )

    def test_seeds(self):
        ids = ids_of(5)
        first, again, other = (random_model(seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first.embed(ids), again.embed(ids))
        assert (first.embed(ids) != other.embed(ids)).any()
