"""What a merged cache does not support raises, and names the reason and the way out."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
MergedCache = pytest.importorskip("qm_cupy.transformers").MergedCache
tiny_models = pytest.importorskip("tiny_models")
model_of, prompt_of = tiny_models.model_of, tiny_models.prompt_of
num_hooks = tiny_models.num_hooks

EAGER = {"attn_implementation": "eager"}  # Gemma 2 has no other with its soft cap


def generate(model, cache, length=60, **options):
    options = {"max_new_tokens": 3, "do_sample": False, **options}
    return model.generate(prompt_of(length), cache=cache, **options)


class TestModels:
    def test_eager(self):
        model = model_of()
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match=r"'eager' ignores the bias .*sdpa"):
            MergedCache(model)
        # Also if the model changes later, or only its configuration was passed.
        for of_model in (True, False):
            model.set_attn_implementation("sdpa")
            cache = MergedCache(model if of_model else model.config)
            model.set_attn_implementation("eager")
            with pytest.raises(ValueError, match="'eager' ignores the bias"):
                generate(model, cache)

    def test_flash_attention(self):
        model = model_of()
        # The package itself is not needed to refuse it.
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="takes no bias for each key"):
            MergedCache(model)

    @pytest.mark.parametrize(
        ("family", "options", "message"),
        [
            # Attention to the last tokens only.
            ("Mistral", {}, "MistralConfig has sliding_attention"),
            ("Gemma2", EAGER, "Gemma2Config has sliding_attention"),
            ("Gemma3", {"layer_types": None}, "Gemma3TextConfig has sliding"),
            (
                "Gemma2",
                # Without the windows, the soft cap is left.
                {**EAGER, "layer_types": ["full_attention"] * 2},
                "soft-capped scores, which Gemma2Config has",
            ),
            ("SmolLM3", {"no_rope_layers": [1, 0]}, "do not rotate their keys"),
            (
                "Llama",
                {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
                'rope_type="dynamic", whose frequencies depend on the length',
            ),
        ],
    )
    def test_configurations(self, family, options, message):
        if "rope_parameters" in options:
            options["rope_parameters"]["rope_theta"] = 1e4
        model = model_of(family, **options)
        for source in (model, model.config):
            with pytest.raises(ValueError, match=message):
                MergedCache(source)
        assert num_hooks(model) == 0

    def test_encoder_decoder(self):
        config = transformers.T5Config()
        with pytest.raises(ValueError, match="encoder-decoder models, got T5Config"):
            MergedCache(config)

    @pytest.mark.parametrize("family", ["Phi3", "GPTNeoX", "Falcon"])
    def test_no_queries(self, family):
        model = model_of(family)
        with pytest.raises(ValueError, match=r"no `q_proj`.*pass `model\.config`"):
            MergedCache(model)
        assert num_hooks(model) == 0

    @pytest.mark.parametrize("family", ["Olmo2", "Phi", "StableLm"])
    def test_other_queries(self, family):
        """Norms of other widths, or rotations of a part, in the attention module."""
        model = model_of(family)
        with (
            MergedCache(model) as cache,
            pytest.raises(ValueError, match=rf"keys of {family}Attention are not"),
        ):
            generate(model, cache)
        # By keys alone it works.
        cache = MergedCache(model.config, 20)
        generate(model, cache)
        assert cache.num_stored == 22

    def test_a_rotation_that_differs_from_the_configuration(self):
        model = model_of()
        cache = MergedCache(model)
        with torch.no_grad():
            model.model.rotary_emb.inv_freq.mul_(0.5)
        with pytest.raises(ValueError, match="does not rotate its keys as"):
            generate(model, cache)

    def test_attention_without_arguments(self):
        cache = MergedCache(model_of("GPTNeoX").config)
        with pytest.raises(ValueError, match="does not pass its arguments"):
            generate(model_of("GPTNeoX"), cache)

    def test_another_model(self):
        cache = MergedCache(model_of())
        with pytest.raises(RuntimeError, match="no hook of this cache has run"):
            generate(model_of(), cache)

    @pytest.mark.parametrize("model", [None, "gpt2", dict])
    def test_no_model(self, model):
        with pytest.raises(TypeError, match="`model` must be a model of transformers"):
            MergedCache(model)


class TestInputs:
    @staticmethod
    def left_padded():
        mask = torch.ones(1, 60, dtype=torch.long)
        mask[0, :5] = 0
        return mask

    def test_padding(self):
        model = model_of()
        mask, message = self.left_padded(), "does not support padded batches"
        with pytest.raises(ValueError, match=message):
            generate(model, MergedCache(model), attention_mask=mask)
        with torch.no_grad():
            for call, options in [
                (model, {"attention_mask": mask}),
                (model.model, {"attention_mask": mask}),
            ]:
                with pytest.raises(ValueError, match=message):
                    call(prompt_of(60), cache=MergedCache(model), **options)
            with pytest.raises(ValueError, match=message):
                model(prompt_of(60), mask, cache=MergedCache(model))

    def test_padding_by_positions(self):
        """Without a model, `generate` shows padding by its positions."""
        model = model_of()
        with pytest.raises(ValueError, match=r"needs positions 0\.\.59"):
            generate(
                model, MergedCache(model.config), attention_mask=self.left_padded()
            )

    def test_positions(self):
        model = model_of()
        cache = MergedCache(model)
        generate(model, cache)
        with torch.no_grad(), pytest.raises(ValueError, match=r"positions 62\.\.64"):
            model(prompt_of(3), position_ids=torch.arange(3)[None], cache=cache)

    def test_other_masks(self):
        model = model_of()
        mask = torch.ones(1, 1, 60, 60, dtype=torch.bool).tril()
        with torch.no_grad(), pytest.raises(ValueError, match="needs causal attention"):
            model(prompt_of(60), attention_mask=mask, cache=MergedCache(model))

    def test_gradients(self):
        model = model_of()
        with pytest.raises(RuntimeError, match="a merged cache has no gradients"):
            model(prompt_of(60), cache=MergedCache(model))

    @pytest.mark.parametrize("how", ["prompt_lookup", "assistant"])
    def test_assisted_decoding(self, how):
        model = model_of()
        options = {"prompt_lookup_num_tokens": 2}
        if how == "assistant":
            options = {"assistant_model": copy.deepcopy(model)}
        with pytest.raises(ValueError, match="requires a cache that can be cropped"):
            generate(model, MergedCache(model), **options)

    def test_crop(self):
        model = model_of()
        cache = MergedCache(model)
        generate(model, cache)
        cache.crop(0)
        with pytest.raises(NotImplementedError, match="use transformers' DynamicCache"):
            cache.crop(-1)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"budget": 0}, ValueError, "`budget` must be at least 1 entry"),
            ({"budget": 1.5}, ValueError, r"`budget` must lie in \(0, 1\]"),
            ({"budget": float("nan")}, ValueError, r"`budget` must lie in \(0, 1\]"),
            ({"budget": True}, TypeError, "`budget` must be an integer"),
            ({"budget": 5}, ValueError, "no room beside `sinks` and `recent`, got 5"),
            ({"budget": 40, "recent": 36}, ValueError, "no room beside"),
            ({"every": 0}, ValueError, "`every` must be at least 1"),
            ({"mass": "all"}, ValueError, "`mass` must be"),
            ({"sinks": -1}, ValueError, "`sinks`"),
            ({"recent": 1.5}, TypeError, "`recent`"),
            ({"rotate_at": "middle"}, ValueError, "`rotate_at` must be"),
            ({"window": 1}, ValueError, "`window`"),
            ({"per_head": 2}, TypeError, "`per_head`"),
        ],
    )
    def test_options(self, options, error, message):
        model = model_of()
        with pytest.raises(error, match=message):
            MergedCache(model, **options)
        assert num_hooks(model) == 0
