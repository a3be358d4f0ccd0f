"""`MergedCache(mass="reread")`: the model reads a text again before entries merge."""

import copy

import pytest

torch = pytest.importorskip("torch")
DynamicCache = pytest.importorskip("transformers").DynamicCache
ATTENTION = pytest.importorskip("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
MergedCache = pytest.importorskip("qm_cupy.transformers").MergedCache
merged_layer = pytest.importorskip("qm_cupy.transformers.merged_layer")
second_reading = pytest.importorskip("qm_cupy.caches.second_reading")
tiny_models = pytest.importorskip("tiny_models")
model_of, prompt_of = tiny_models.model_of, tiny_models.prompt_of

LENGTH = 60


@torch.no_grad()
def logits(model, tokens, cache):
    return model(tokens, cache=cache).logits


@pytest.fixture
def merges(monkeypatch):
    """A list of the arguments with which entries are merged."""
    passed = []
    merge_kv_cache = merged_layer.merge_kv_cache

    def merge(keys, values, budget, **options):
        passed.append({"keys": keys, "values": values, **options})
        return merge_kv_cache(keys, values, budget, **options)

    monkeypatch.setattr(merged_layer, "merge_kv_cache", merge)
    return passed


def passes_of(model):
    """Return a list that gets the tokens of each forward pass of the decoder."""
    passes = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].clone()),
        with_kwargs=True,
    )
    return passes


def largest_attention(model, prompt, monkeypatch):
    """Return the scores (L, B, H, N), and the queries, of a second reading.

    The model reads the prompt twice with its own cache. The queries are the last 32 of
    the first reading, and those of the second one.
    """
    seen = []
    sdpa = ATTENTION["sdpa"]

    def attend(module, query, key, *args, **kwargs):
        seen.append((query, key, kwargs["scaling"]))
        return sdpa(module, query, key, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setitem(ATTENTION, "sdpa", attend)
        cache, num_tokens = DynamicCache(config=model.config), prompt.shape[1]
        logits(model, prompt, cache)
        first = [query[:, :, -32:] for query, _, _ in seen]
        seen.clear()
        logits(model, prompt, cache)
    scores = []
    for query, key, scale in seen:
        key = key[:, :, :num_tokens]  # those of the first reading
        heads = key.shape[1]
        key = key.repeat_interleave(query.shape[1] // heads, 1)
        weights = (scale * query @ key.mT).softmax(-1)
        # Over the queries of all heads that read a key head.
        scores.append(weights.unflatten(1, (heads, -1)).amax((2, 3)))
    again = [query for query, _, _ in seen]
    both = [torch.cat(pair, -2) for pair in zip(first, again, strict=True)]
    return torch.stack(scores), torch.stack(both)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("per_layer", [True, False])
def test_scores_are_the_largest_attention(family, per_layer, merges, monkeypatch):
    model, prompt = model_of(family), prompt_of(LENGTH, 2)
    scores, queries = largest_attention(model, prompt, monkeypatch)
    with MergedCache(model, 0.5, mass="reread", per_layer=per_layer) as cache:
        got = logits(model, prompt, cache)
    expected = logits(model, prompt, DynamicCache(config=model.config))
    torch.testing.assert_close(got, expected)
    assert len(merges) == (1 if per_layer else 2)
    passed = {
        name: torch.cat([x[name] for x in merges]) for name in ("attention", "query")
    }
    torch.testing.assert_close(passed["attention"], scores, rtol=1e-4, atol=1e-6)
    assert not any(x["causal"] for x in merges)
    # All of these queries, in the same order for each layer.
    order = torch.cdist(passed["query"][0, 0, 0], queries[0, 0, 0]).argmin(-1)
    assert sorted(order.tolist()) == list(range(32 + LENGTH))
    assert (order[-32:] < 32).any()
    assert (order[-32:] >= 32).any()
    torch.testing.assert_close(
        passed["query"], queries[..., order, :], rtol=1e-4, atol=1e-5
    )


def test_the_cache_has_the_entries_of_one_reading(merges):
    model, prompt = model_of(), prompt_of(LENGTH)
    passes = passes_of(model)
    once = MergedCache(model, 0.5)
    logits(model, prompt, once)
    twice = MergedCache(model, 0.5, mass="reread")
    logits(model, prompt, twice)
    assert [x.shape[1] for x in passes] == [LENGTH] * 3
    for name in ("keys", "values", "positions"):
        torch.testing.assert_close(merges[0][name], merges[1][name])
    assert once.get_seq_length() == twice.get_seq_length() == LENGTH
    assert twice.num_stored == once.num_stored == LENGTH // 2
    assert not merges[0]["attention"].equal(merges[1]["attention"])


def test_short_texts_are_read_once():
    model, prompt = model_of(), prompt_of(LENGTH)
    passes = passes_of(model)
    cache = MergedCache(model, 100, mass="reread")
    for part in prompt.split(20, dim=1):
        logits(model, part, cache)
    assert [x.shape[1] for x in passes] == [20, 20, 20]
    assert cache.num_stored == LENGTH
    # When there are too many entries, all of the text is read again.
    logits(model, prompt, cache)
    assert [x.shape[1] for x in passes[3:]] == [60, 120]
    assert torch.equal(passes[-1], torch.cat([prompt, prompt], 1))
    assert cache.num_stored == 100


def test_parts_have_the_largest_score(merges, monkeypatch):
    """A part is read after the text, but without the parts before it."""
    monkeypatch.setattr(second_reading, "PART", 25)
    model, prompt = model_of(), prompt_of(LENGTH)
    passes = passes_of(model)
    logits(model, prompt, MergedCache(model, 0.5, mass="reread"))
    assert [x.shape[1] for x in passes] == [LENGTH, 25, 25, 10]
    assert torch.equal(torch.cat(passes[1:], 1), prompt)
    wanted = []
    for part in prompt.split(25, dim=1):
        with monkeypatch.context() as patch:
            # The first reading ends with the part, whose scores are taken.
            patch.setattr(second_reading, "PART", LENGTH)
            cache = MergedCache(model, 0.5, mass="reread")
            cache.before_model = lambda inputs, part=part, layers=cache.layers: (
                layers[0].is_read_again
                or layers[0].tokens.extend([("input_ids", part)])
            )
            logits(model, prompt, cache)
            cache.remove()
        wanted.append(merges[-1]["attention"])
    got = merges[0]["attention"]
    torch.testing.assert_close(got, torch.stack(wanted).amax(0))
    # Each of them has the largest score of an entry.
    assert all((got != x).any() for x in wanted)


def test_embeddings_are_read_again(merges):
    model, prompt = model_of(), prompt_of(LENGTH)
    logits(model, prompt, MergedCache(model, 0.5, mass="reread"))
    embeddings = model.get_input_embeddings()(prompt)
    cache = MergedCache(model, 0.5, mass="reread")
    with torch.no_grad():
        # First some ids, then embeddings.
        cache.layers[0].settings = cache.layers[0].settings._replace(merges=False)
        model(prompt[:, :20], cache=cache)
        cache.layers[0].settings = cache.layers[0].settings._replace(merges=True)
        model(inputs_embeds=embeddings[:, 20:], cache=cache)
    torch.testing.assert_close(
        merges[1]["keys"], merges[0]["keys"], rtol=1e-4, atol=1e-5
    )
    assert cache.num_stored == LENGTH // 2
    assert cache.layers[0].tokens == []


def test_while_decoding(merges):
    """Every 10 tokens, those since the last merge are read again."""
    model = model_of()
    passes = passes_of(model)
    cache = MergedCache(model, 50, every=10, mass="reread", per_layer=False)
    logits(model, prompt_of(100), cache)
    kept = cache.layers[0].received
    # Entries that have merged keep the largest score of their members.
    assert kept.shape[-1] == 50
    assert torch.equal(kept.amax(-1), merges[0]["attention"][0].amax(-1))
    stored, new = [], []
    for i in range(20):
        new.append(prompt_of(1, seed=i))
        logits(model, new[-1], cache)
        stored.append(cache.num_stored)
    assert stored == [*range(51, 60), 50] * 2
    again = [x for x in passes if x.shape[1] == 10]
    assert torch.equal(torch.cat(again, 1), torch.cat(new, 1))
    # The attention of the new tokens may be larger.
    later = merges[2]["attention"][0, ..., :50]
    assert (later >= kept).all()
    assert (later > kept).any()
    assert cache.get_seq_length() == 120


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2}])
def test_sequences_are_selected(options):
    model, prompt = model_of(), prompt_of(LENGTH, 2)
    cache = MergedCache(model, 40, every=5, mass="reread", per_layer=False)
    text = model.generate(
        prompt, cache=cache, do_sample=True, max_new_tokens=12, **options
    )
    assert text.shape[1] == LENGTH + 12
    assert cache.num_stored == 41


def test_a_copy_reads_on_by_itself():
    model, prompt = model_of(), prompt_of(LENGTH)
    cache = MergedCache(model, 50, mass="reread")
    logits(model, prompt[:, :40], cache)
    other = copy.deepcopy(cache)
    logits(model, prompt[:, 40:], cache)
    assert (cache.num_stored, other.num_stored) == (50, 40)
    logits(model, prompt[:, 40:], other)
    for a, b in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(a.keys, b.keys)


def test_nothing_is_lost_if_it_fails(monkeypatch):
    model, prompt = model_of(), prompt_of(LENGTH)
    cache = MergedCache(model, 50, mass="reread")

    def fail(*args, **kwargs):
        raise MemoryError("too many scores")

    score_keys = merged_layer.score_keys
    monkeypatch.setattr(merged_layer, "score_keys", fail)
    with pytest.raises(MemoryError):
        logits(model, prompt, cache)
    assert cache.num_stored == cache.get_seq_length() == LENGTH
    # The next pass reads both parts again.
    monkeypatch.setattr(merged_layer, "score_keys", score_keys)
    logits(model, prompt[:, :5], cache)
    assert cache.num_stored == 50
    assert cache.get_seq_length() == LENGTH + 5


def test_reset():
    model, prompt = model_of(), prompt_of(LENGTH)
    cache = MergedCache(model, 100, mass="reread")
    logits(model, prompt, cache)
    cache.reset()
    logits(model, prompt, cache)
    assert cache.layers[0].tokens[0][1].equal(prompt)
    assert len(cache.layers[0].tokens) == 1


def test_a_configuration_cannot_read():
    with pytest.raises(ValueError, match="needs the model"):
        MergedCache(model_of().config, mass="reread")
