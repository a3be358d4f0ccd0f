"""The cache in models: where it is exact; positions, masks, biases, and hooks."""

import copy
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
DynamicCache = pytest.importorskip("transformers").DynamicCache
ATTENTION = pytest.importorskip("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
MergedCache = pytest.importorskip("qm_cupy.transformers").MergedCache
merged_layer = pytest.importorskip("qm_cupy.transformers.merged_layer")
tiny_models = pytest.importorskip("tiny_models")
model_of, prompt_of = tiny_models.model_of, tiny_models.prompt_of
FAMILIES, num_hooks = tiny_models.FAMILIES, tiny_models.num_hooks


def generate(model, prompt, cache, count=12, **options):
    options = {"do_sample": False, "max_new_tokens": count, **options}
    torch.manual_seed(1)  # of the samples
    return model.generate(prompt, cache=cache, **options)


@torch.no_grad()
def logits(model, tokens, cache):
    return model(tokens, cache=cache).logits


def filled(model, num_tokens, budget=0.25, batch=1, **options):
    """Return a cache that has seen a prompt, and its length."""
    cache = MergedCache(model, budget, **options)
    logits(model, prompt_of(num_tokens, batch), cache)
    return cache


class TestBudgetOfAll:
    """With budget 1, nothing merges, and the model computes what it always does."""

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("batch", [1, 4])
    def test_greedy(self, family, batch):
        model, prompt = model_of(family), prompt_of(40, batch)
        expected = generate(model, prompt, DynamicCache(config=model.config))
        got = generate(model, prompt, MergedCache(model, 1.0))
        assert torch.equal(got, expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": True},
            {"num_beams": 3},
            {"do_sample": True, "num_return_sequences": 2},
            {"prefill_chunk_size": 16},
        ],
    )
    def test_other_ways_to_generate(self, options):
        model, prompt = model_of(), prompt_of(40, 2)
        expected = generate(model, prompt, DynamicCache(), **options)
        got = generate(model, prompt, MergedCache(model, 1.0), **options)
        assert torch.equal(got, expected)


class TestDuplicates:
    """Equal entries merge to one with bias log 2, which changes nothing."""

    @staticmethod
    def caches(model, budget=41, num_padded=0):
        """Return a full cache with every entry twice, and one that has merged them."""
        once, full = DynamicCache(), DynamicCache()
        logits(model, prompt_of(40, 2), once)
        # By keys alone: with queries, the bias would be calibrated. The rotation is
        # unknown to this cache, so that equal keys at two positions are equal.
        merged = MergedCache(model.config, budget, sinks=0, recent=1)
        for i, layer in enumerate(once.layers):
            twice = [x.repeat_interleave(2, -2) for x in (layer.keys, layer.values)]
            full.update(*twice, i)
            merged.layers[i].rotary = None
            merged.update(*twice, i, kwargs={})
        for layer in merged.layers:
            layer.pad(layer.num_stored + num_padded)
        return full, merged

    @pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma", "Granite"])
    @pytest.mark.parametrize("num_new", [1, 5])
    @pytest.mark.parametrize("num_padded", [0, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_logits(self, family, num_new, num_padded, dtype):
        model = model_of(family, dtype)
        full, merged = self.caches(model, num_padded=num_padded)
        assert merged.num_stored == 41 + num_padded
        assert full.get_seq_length() == merged.get_seq_length() == 80
        assert (merged.layers[0].bias[..., :39] - np.log(2)).abs().max() < 1e-6
        new = prompt_of(num_new, 2, seed=5)
        expected, got = logits(model, new, full), logits(model, new, merged)
        # Rounding of the model itself, in its dtype.
        tolerance = 1e-5 if dtype == torch.float32 else 1e-6
        scale = expected.abs().max()
        assert (got - expected).abs().max() < tolerance * scale

    def test_the_bias_matters(self):
        model = model_of()
        full, merged = self.caches(model)
        for layer in merged.layers:
            # Each merged entry now counts once, not twice.
            layer.bias = torch.zeros_like(layer.bias)
        new = prompt_of(1, 2, seed=5)
        expected, got = logits(model, new, full), logits(model, new, merged)
        assert (got - expected).abs().max() > 1e-4 * expected.abs().max()


class TestQueries:
    """The hooks compute the queries and the attention that the model uses."""

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("per_layer", [True, False])
    def test_hooks(self, family, per_layer, monkeypatch):
        model = model_of(family)
        seen, passed = [], []
        sdpa = ATTENTION["sdpa"]

        def attend(module, query, key, *args, **kwargs):
            seen.append((query, key, kwargs["scaling"]))
            return sdpa(module, query, key, *args, **kwargs)

        def merge(keys, values, budget, **options):
            passed.append(options)
            return merge_kv_cache(keys, values, budget, **options)

        merge_kv_cache = merged_layer.merge_kv_cache
        monkeypatch.setitem(ATTENTION, "sdpa", attend)
        monkeypatch.setattr(merged_layer, "merge_kv_cache", merge)
        filled(model, 60, batch=2, per_layer=per_layer)
        assert len(seen) == 2
        assert len(passed) == (1 if per_layer else 2)
        for i, (query, key, scale) in enumerate(seen):
            # With one budget, the arrays of all layers are merged together.
            options = dict(passed[0 if per_layer else i])
            for name in ("query", "attention"):
                assert len(options[name]) == (2 if per_layer else 1)
                options[name] = options[name][i if per_layer else 0]
            assert options["scale"] == scale
            torch.testing.assert_close(options["query"], query)
            # The mean attention of the queries that may attend to a key.
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            scores = scale * query @ key.mT
            scores.masked_fill_(~torch.ones(60, 60).tril().bool(), -torch.inf)
            received = scores.softmax(-1).sum(-2) / torch.arange(60, 0, -1)
            groups = received.view(2, options["attention"].shape[1], -1, 60).mean(2)
            torch.testing.assert_close(
                options["attention"], groups, rtol=1e-4, atol=1e-6
            )

    @pytest.mark.parametrize(
        ("family", "interleaved"), [("Llama", False), ("Cohere", True), ("Glm", True)]
    )
    def test_pairs(self, family, interleaved):
        cache = filled(model_of(family), 60)
        assert [x.rotary.interleaved for x in cache.layers] == [interleaved] * 2


class TestBudget:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("with_queries", [True, False])
    def test_stored_entries(self, family, with_queries):
        model = model_of(family)
        source = model if with_queries else model.config
        cache = MergedCache(source, 0.25, per_layer=False)
        text = generate(model, prompt_of(200, 2), cache, count=6)
        assert text.shape == (2, 206)
        # 50 of 200, and the generated tokens except the last.
        assert [x.num_stored for x in cache.layers] == [55, 55]
        assert cache.get_seq_length() == 205

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("with_queries", [True, False])
    def test_layers_have_one_budget(self, family, with_queries):
        """Layers keep different numbers, all their heads the same."""
        model = model_of(family)
        source = model if with_queries else model.config
        cache = MergedCache(source, 0.25)
        generate(model, prompt_of(200), cache, count=6)
        stored = [x.num_stored for x in cache.layers]
        # A step of the cut merges in every head, so the sum is exact.
        assert sum(stored) == 2 * 55
        assert cache.num_stored == 55
        for layer in cache.layers:
            assert (layer.bias > -torch.inf).all()  # nothing is padded

    def test_one_token_needs_no_padding(self):
        """Logits are those with layers that are padded to the same length."""
        model = model_of()
        caches = [filled(model, 200) for _ in range(2)]
        lengths = [layer.num_stored for layer in caches[0].layers]
        assert lengths[0] != lengths[1]
        for layer in caches[1].layers:
            layer.pad(max(lengths) + 3)
        for seed in range(3):
            token = prompt_of(1, seed=seed)
            got, expected = (logits(model, token, cache) for cache in caches)
            torch.testing.assert_close(got, expected)
        assert [x.num_stored for x in caches[0].layers] == [n + 3 for n in lengths]

    def test_several_tokens_after_a_merge(self):
        """They are read with padded layers, as one at a time without."""
        model = model_of()
        single, whole = (filled(model, 200) for _ in range(2))
        for cache in (single, whole):
            cache.remove()  # so that the new tokens do not merge
        tokens = prompt_of(5, seed=3)
        got = logits(model, tokens, whole)
        steps = [logits(model, tokens[:, i : i + 1], single) for i in range(5)]
        torch.testing.assert_close(got, torch.cat(steps, 1), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("length", [2, 3, 9, 20, 36])
    def test_short_prompts_stay(self, length):
        """The budget has no room beside the sinks and the recent entries."""
        model, prompt = model_of(), prompt_of(length)
        expected = generate(model, prompt, DynamicCache(), count=3)
        cache = MergedCache(model, 0.25, recent=9)
        assert torch.equal(generate(model, prompt, cache, count=3), expected)
        assert cache.num_stored == length + 2

    @pytest.mark.parametrize("budget", [64, np.int64(64)])
    def test_number(self, budget):
        model = model_of()
        for length, stored in [(50, 50), (64, 64), (65, 64), (200, 64)]:
            assert filled(model, length, budget).num_stored == stored

    @pytest.mark.parametrize("with_queries", [True, False])
    def test_every(self, with_queries):
        model = model_of()
        source = model if with_queries else model.config
        cache = MergedCache(source, 50, every=10)
        stored = []
        logits(model, prompt_of(100), cache)
        for i in range(30):
            logits(model, prompt_of(1, seed=i), cache)
            stored.append(cache.num_stored)
        assert stored == [*range(51, 60), 50] * 3
        assert cache.get_seq_length() == 130
        positions = cache.layers[0].positions
        assert positions.max() == 129
        assert (positions.diff(dim=-1) > 0).all()

    @pytest.mark.parametrize("per_layer", [True, False])
    def test_per_head(self, per_layer):
        """The budget is the mean of the heads; the rest of a head has bias -inf."""
        model = model_of()
        cache = MergedCache(model, 50, per_head=True, per_layer=per_layer, every=5)
        logits(model, prompt_of(200, 2), cache)
        for i in range(12):
            assert torch.isfinite(logits(model, prompt_of(1, 2, seed=i), cache)).all()
        present = torch.stack(
            [(x.bias > -torch.inf).sum(-1).float() for x in cache.layers]
        )  # (L, B, H)
        # Two since the last merge.
        assert (present.mean((0, 2) if per_layer else -1) == 52).all()

    @pytest.mark.parametrize("rotate_at", ["mean", "first", "last"])
    def test_options(self, rotate_at):
        model = model_of()
        cache = MergedCache(
            model, 0.25, rotate_at=rotate_at, every=4, mass="last", window=16
        )
        generate(model, prompt_of(200, 2), cache, count=20)
        positions = cache.layers[0].positions
        assert positions.min() >= 0
        assert positions.max() < 219
        if rotate_at == "first":  # the last members are elsewhere
            assert (positions.diff(dim=-1) < 0).any()

    def test_bfloat16(self):
        model = model_of(dtype=torch.bfloat16)
        full, cache = DynamicCache(), filled(model, 200, batch=2)
        logits(model, prompt_of(200, 2), full)
        assert cache.layers[0].keys.dtype == torch.bfloat16
        new = prompt_of(4, 2, seed=3)
        expected, got = logits(model, new, full), logits(model, new, cache)
        assert got.dtype == torch.bfloat16
        assert (got - expected).norm() < 0.5 * expected.norm()


class TestLaterTokens:
    @pytest.mark.parametrize("per_head", [False, True])
    @pytest.mark.parametrize("family", ["Llama", "Qwen3", "Cohere"])
    def test_many_tokens_are_as_one_by_one(self, family, per_head):
        """Causal: token i attends to all entries and to the new ones up to i."""
        model, new = model_of(family), prompt_of(7, 2, seed=2)
        cache = filled(model, 120, batch=2, per_head=per_head)
        single = copy.deepcopy(cache)
        expected = torch.cat([logits(model, x, single) for x in new.split(1, 1)], 1)
        got = logits(model, new, cache)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert cache.get_seq_length() == single.get_seq_length() == 127
        assert single.layers[0].num_stored >= 37  # not merged again

    def test_positions_continue(self, monkeypatch):
        model, seen = model_of(), []
        hook = model.model.rotary_emb.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"].clone()),
            with_kwargs=True,
        )
        cache = filled(model, 120)
        generate(model, prompt_of(121), cache, count=3)
        hook.remove()
        assert [x.flatten().tolist() for x in seen[1:]] == [[120], [121], [122]]

    def test_turns(self):
        """A longer conversation: each turn appends a prompt, and generates."""
        model, text = model_of(), prompt_of(100)
        cache = MergedCache(model, 60)
        for turn in range(3):
            text = torch.cat([text, prompt_of(30, seed=turn)], 1)
            text = generate(model, text, cache, count=5)
            assert cache.get_seq_length() == text.shape[1] - 1
            assert cache.num_stored == 64
        assert text.shape == (1, 205)

    def test_beams_are_reordered(self):
        """Beam search keeps the entries, biases and positions of each beam together."""
        model = model_of()
        cache = filled(model, 120, batch=3)
        picked = copy.deepcopy(cache)
        order = torch.tensor([2, 0, 0])
        picked.reorder_cache(order)
        new = prompt_of(3, 3, seed=1)
        expected = logits(model, new, cache)[order][0]
        got = logits(model, new[order], picked)[0]
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("per_head", [False, True])
    def test_flex_attention(self, per_head):
        """Both attention functions add the same bias and the same mask."""
        model, results = model_of(), {}
        # Without a compiler: this is about what flex attention gets, not its code.
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without")
            warnings.simplefilter("ignore", DeprecationWarning)  # of the compiler
            for name in ("sdpa", "flex_attention"):
                model.set_attn_implementation(name)
                cache = filled(model, 120, batch=2, per_head=per_head)
                news = prompt_of(3, 2, seed=1), prompt_of(1, 2, seed=2)
                results[name] = [logits(model, new, cache) for new in news]
        for x, y in zip(*results.values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

    def test_reset(self):
        model = model_of()
        cache = filled(model, 120)
        cache.reset()
        assert cache.num_stored == cache.get_seq_length() == 0
        again = logits(model, prompt_of(50), cache)
        torch.testing.assert_close(again, logits(model, prompt_of(50), DynamicCache()))


class TestHooks:
    def test_they_are_removed(self):
        model = model_of()
        before = num_hooks(model)
        cache = MergedCache(model)
        assert num_hooks(model) > before
        cache.remove()
        assert num_hooks(model) == before
        cache.remove()  # again

    def test_with(self):
        model = model_of()
        with pytest.raises(KeyError), MergedCache(model):  # noqa: PT012
            assert num_hooks(model) > 0
            raise KeyError
        assert num_hooks(model) == 0

    def test_a_deleted_cache_has_none(self):
        model = model_of()
        cache = filled(model, 100)
        twin = copy.deepcopy(cache)
        del cache
        assert num_hooks(model) > 0
        del twin
        assert num_hooks(model) == 0

    def test_after_remove_it_does_not_merge_but_still_attends(self):
        model, new = model_of(), prompt_of(5, seed=1)
        cache = filled(model, 100)
        twin = copy.deepcopy(cache)
        cache.remove()
        torch.testing.assert_close(logits(model, new, cache), logits(model, new, twin))
        assert (cache.num_stored, twin.num_stored) == (30, 26)

    def test_other_caches_are_left_alone(self):
        model = model_of()
        merged, other = MergedCache(model), DynamicCache()
        logits(model, prompt_of(100), other)
        assert (merged.num_stored, other.get_seq_length()) == (0, 100)

    def test_a_prompt_is_reused(self):
        """A copy goes on by itself, and the original stays as it was."""
        model = model_of()
        cache = filled(model, 100)
        keys = cache.layers[0].keys.clone()
        for seed in range(2):
            twin = copy.deepcopy(cache)
            logits(model, prompt_of(40, seed=seed), twin)
            assert (twin.num_stored, twin.get_seq_length()) == (35, 140)
        assert torch.equal(cache.layers[0].keys, keys)
        assert cache.get_seq_length() == 100
