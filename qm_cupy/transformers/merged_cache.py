"""A key-value cache for transformers, whose entries are merged.

B sequences of n tokens were seen. A layer has H key heads, and stores N entries.
"""

import copy
import weakref
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ..arrays.checks import check_choice, check_integer
from ..caches.budgets import head_budgets
from ..caches.cache_checks import check_count, check_flag, check_window
from ..caches.cache_entries import num_mergeable
from ..caches.merge_kv_cache import WINDOW, RotateAt, check_rotate_at
from .merged_layer import MergedLayer, MergeSettings, exceeds_budget
from .query_hooks import check_positions, install
from .second_reading import read_again
from .support import check_attention, check_config, rotary_of


class MergedCache(Cache):
    """A cache that merges its entries after the prompt, so that attention reads fewer.

    Pass it to a model of transformers: ``model.generate(..., cache=cache)``, or
    ``model(..., cache=cache)`` under ``torch.no_grad()``. The prompt is read with all
    its keys and values. As soon as a layer has attended to them, they are merged by
    `merge_kv_cache`. The tokens that follow attend to the merged entries, by their
    biases. A later forward pass of several tokens, such as the next message of a chat,
    is treated like the prompt.

    Parameters
    ----------
    model : transformers.PreTrainedModel or transformers.PreTrainedConfig
        The model, with ``attn_implementation="sdpa"`` or ``"flex_attention"``. Hooks on
        its attention modules bring the cache the queries, until `remove` is called or
        the cache is deleted. With a configuration instead of a model, entries are
        merged by their keys alone. This needs no hooks, but changes the output of the
        model more: a quarter of the entries can then predict worse than the last
        quarter of the prompt would. It assumes that keys are rotated in pairs
        (i, i + r/2), as in Llama, and padding is then refused only if positions show
        it, as they do in `generate`.
    budget : int or float, default 0.25
        Entries of each head after a merge: a number, or a fraction within (0, 1] of the
        tokens seen. Fewer tokens do not merge, nor do texts so short that the budget
        has no room beside `sinks` and `recent`.
    every : int, optional
        Also merge while decoding, each time when this many tokens were added. By
        default, the tokens that the model generates do not merge.
    mass : {"received", "last", "reread"}, default "received"
        Which attention decides the weights of entries. "received": that of all queries,
        and that of the last 32. "last": only that of the last 32, which is faster for
        long prompts; the time of the others grows with the square of the prompt's
        length, as that of the model's own attention does. "reread": before entries
        merge, the model reads their tokens a second time, after the text, and the
        weight is the largest attention that an entry receives then. Use it if single
        facts of the text will be asked for: a model looks at them when it copies them,
        and not when it first reads them. It takes the time of a second prompt, and
        positions of up to 2,048 more tokens. Pass ``per_head=True`` with it, so that
        more facts are found. `recent` is then an eighth of the budget by default.
    per_layer : bool, default True
        As in `merge_kv_cache`: the budget is the mean of the layers. They merge when
        the last layer has read the prompt, and need memory for a copy of their entries
        then. With False, each layer merges as soon as it has read the prompt, but the
        output of the model changes more. With ``"flex_attention"``, and where several
        tokens follow a merge, layers are padded to the largest.
    per_head : bool, default False
        As in `merge_kv_cache`: the budget is also the mean of the heads. Heads are
        padded to the largest of their layer, so that more memory is used than without
        it, for an output that is nearer to that of the full cache.
    sinks, recent, calibrate, rotate_at, window
        As in `merge_kv_cache`.

    Raises
    ------
    TypeError
        If `model` is neither a model nor a configuration, or an option has a wrong
        type.
    ValueError
        If an option is out of range; if the model has sliding windows, soft-capped
        scores, an encoder, frequencies that depend on the length, or another attention
        function; while it runs, also for padded batches.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from qm_cupy.transformers import MergedCache
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2,
    ... )
    >>> model = LlamaForCausalLM(config).eval()
    >>> cache = MergedCache(model, budget=0.25)
    >>> prompt = torch.arange(200)[None] % 64
    >>> text = model.generate(prompt, cache=cache, min_new_tokens=5, max_new_tokens=5)
    >>> text.shape[1], cache.get_seq_length()
    (205, 204)
    """

    layers: Any  # a list of `MergedLayer`

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        budget: float = 0.25,
        *,
        every: int | None = None,
        mass: Literal["received", "last", "reread"] = "received",
        per_layer: bool = True,
        per_head: bool = False,
        sinks: int = 4,
        recent: int | None = None,
        calibrate: bool = True,
        rotate_at: RotateAt = "mean",
        window: int = WINDOW,
    ) -> None:
        is_model = isinstance(model, PreTrainedModel)
        if not is_model and not isinstance(model, PreTrainedConfig):
            raise TypeError(
                "`model` must be a model of transformers or its configuration, got "
                f"{type(model).__name__}"
            )
        config = check_config(model.config if is_model else model)
        if is_model:
            check_attention(config)
        if isinstance(budget, int | np.integer):
            budget = check_integer("budget", budget)
        large = np.array(2**31 - 1)
        head_budgets(budget, (), large)  # raises for a wrong budget
        if every is not None and check_integer("every", every) < 1:
            raise ValueError(f"`every` must be at least 1, got {every}")
        check_choice("mass", mass, ("received", "last", "reread"))
        if mass == "reread" and not is_model:
            raise ValueError(
                '`mass="reread"` needs the model, got its configuration: pass the model'
            )
        rotary = rotary_of(config, model if is_model else None)
        options: dict[str, Any] = {
            "per_layer": check_flag("per_layer", per_layer),
            "per_head": check_flag("per_head", per_head),
            "sinks": check_count("sinks", sinks),
            "recent": None if recent is None else check_count("recent", recent),
            "calibrate": check_flag("calibrate", calibrate),
            "rotate_at": check_rotate_at(rotate_at, rotary),
            "window": check_window(window),
        }
        if (
            isinstance(budget, int)
            and num_mergeable(
                budget, options["sinks"], options["recent"], causal=mass != "reread"
            )
            < 1
        ):
            raise ValueError(
                f"`budget` has no room beside `sinks` and `recent`, got {budget}: "
                "raise the budget, or lower these"
            )
        settings = MergeSettings(budget, every, options, rotary, is_model, mass)
        count = config.num_hidden_layers
        super().__init__(layers=[MergedLayer(settings, config) for _ in range(count)])
        for layer in self.layers:
            layer.of_cache = self.layers
        self._config = config
        self._reads_again = False
        self._attach(model if is_model else None)

    def _attach(self, model: Any) -> None:
        """Add the hooks to a model; None adds none."""
        self._model = None if model is None else weakref.ref(model)
        handles = [] if model is None else install(self, model)
        self._remove = weakref.finalize(self, _remove_all, handles)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MergedCache":
        """Return a copy with hooks of its own, such as for a prompt that is reused."""
        memo[id(self._config)] = self._config  # the model may change it
        made = object.__new__(type(self))
        memo[id(self)] = made
        own = {"_model", "_remove"}
        rest = {name: x for name, x in vars(self).items() if name not in own}
        vars(made).update(copy.deepcopy(rest, memo))
        made._attach(self._model() if self._model and self._remove.alive else None)
        return made

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of a layer, and return those for attention."""
        if layer_idx == 0 and key_states.shape[-2] > 1:
            ids = (kwargs.get("kwargs") or {}).get("position_ids")
            check_positions(ids, self.layers[0].seen)
        keys, values = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return keys, values

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys of the next mask, and its offset.

        One mask serves all layers, so those that store fewer entries are padded. A
        single new token of sdpa needs no mask.
        """
        if query_length > 1 or self._config._attn_implementation != "sdpa":
            longest = max(layer.num_stored for layer in self.layers)
            for layer in self.layers:
                layer.pad(longest)
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def before_model(self, inputs: dict[str, Any]) -> None:
        """Note the tokens of a forward pass, if they are to be read again."""
        first = self.layers[0]
        if first.settings.mass != "reread" or self._reads_again:
            return
        for name in ("input_ids", "inputs_embeds"):
            if inputs.get(name) is not None:
                first.tokens.append((name, inputs[name].detach()))

    def after_model(self, decoder: Any, name: str) -> None:
        """Read the tokens again and merge, if that is due after a forward pass.

        `name` is the name by which the decoder takes the cache.
        """
        first = self.layers[0]
        if first.settings.mass != "reread" or self._reads_again:
            return
        if not first.is_due(first.tokens[-1][1].shape[1]):
            return
        groups = (
            [self.layers]
            if first.settings.options["per_layer"]
            else [[layer] for layer in self.layers]
        )
        if any(map(exceeds_budget, groups)):
            self._reads_again = True
            try:
                read_again(self, decoder, name)
            finally:
                self._reads_again = False
            for layer in self.layers:
                layer.merge()
        for layer in self.layers:
            layer.since_merge = 0

    @property
    def num_stored(self) -> int:
        """Number of stored entries of each head, the mean of the layers, rounded up.

        It counts the padding of heads that have fewer than others of their layer.
        """
        total = sum(layer.num_stored for layer in self.layers)
        return -(-total // len(self.layers))

    def remove(self) -> None:
        """Remove the hooks from the model. The cache no longer merges."""
        self._remove()
        for layer in self.layers:
            settings = layer.settings._replace(every=None, from_queries=False)
            layer.settings = settings._replace(merges=False)

    def __enter__(self) -> "MergedCache":
        """Return the cache, whose hooks are removed at the end of the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the hooks from the model."""
        self.remove()


def _remove_all(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
