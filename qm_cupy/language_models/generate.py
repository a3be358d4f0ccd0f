"""Generation of text, with or without merges of the cache."""

from typing import Any, Protocol

import numpy as np

from ..arrays.checks import check_integer
from ..arrays.conversion import convert_inputs
from ..caches.budgets import head_budgets
from ..caches.cache_checks import check_count, check_flag
from ..caches.cache_entries import num_mergeable
from ..cuda.device import to_host
from .llama_weights import Settings
from .model_state import ModelState, check_options
from .read_checks import check_ids


class Reader(Protocol):
    """A model that reads tokens."""

    def read(
        self, tokens: Any, state: ModelState | None = None, *, last_only: bool = False
    ) -> tuple[Any, ModelState]:
        """Return logits and the state after tokens."""

    def reread(self, tokens: Any, state: ModelState) -> ModelState:
        """Return a state that merges by a second reading of tokens."""


def generate_ids(
    model: Reader,
    settings: Settings,
    ids: Any,
    num_tokens: Any,
    state: Any,
    *,
    budget: Any,
    every: Any,
    stop: Any,
    reread: Any,
    options: dict[str, Any],
) -> Any:
    """Return the tokens (..., T) with the highest logits after a state and ids."""
    convert_back, text = convert_inputs({"ids": ids})
    check_ids("ids", text, settings)
    wanted = check_count("num_tokens", num_tokens)
    stop = None if stop is None else check_count("stop", stop)
    if check_flag("reread", reread) and budget is None:
        raise TypeError("`reread` needs a `budget`, which is None")
    _check_budget(budget, every, options)
    if wanted == 0:
        return convert_back(text[..., :0].copy())
    logits, state = model.read(text, state, last_only=True)
    merge = _Merge(budget, options, model if reread else None)
    state, since_merge = merge(state, text), 0
    new: list[Any] = []
    while True:
        token = np.argmax(logits, axis=-1).astype(text.dtype)  # (..., 1)
        if stop is not None and new:
            token = np.where(new[-1] == stop, new[-1], token)
        new.append(token)
        ended = stop is not None and bool(to_host((token == stop).all()))
        if len(new) == wanted or ended:
            return convert_back(np.concatenate(new, axis=-1))
        logits, state = model.read(token, state)
        since_merge += 1
        if every is not None and since_merge >= every:
            state, since_merge = merge(state, *new[-since_merge:]), 0


def _check_budget(budget: Any, every: Any, options: dict[str, Any]) -> None:
    """Raise if a budget is wrong, or options are passed without one."""
    if every is not None and check_integer("every", every) < 1:
        raise ValueError(f"`every` must be at least 1, got {every}")
    check_options(options)
    if budget is None:
        names = ["every"] * (every is not None) + [*options]
        if names:
            raise TypeError(f"`{names[0]}` needs a `budget`, which is None")
        return
    head_budgets(budget, (), np.array(2**31 - 1))  # raises for a wrong budget
    for name in ("sinks", "recent"):
        if options.get(name) is not None:
            check_count(name, options[name])


class _Merge:
    """Merges states to a budget, and has their tokens read again before."""

    def __init__(self, budget: Any, options: dict[str, Any], again: Any) -> None:
        self.budget, self.options = budget, options
        self.again = again  # the model, or None: then nothing is read again
        self.tokens: list[Any] = []  # since the last merge

    def __call__(self, state: ModelState, *tokens: Any) -> ModelState:
        """Return a merged state after new tokens, or the state if it is short enough.

        A fraction is one of all tokens read.
        """
        budget, options = self.budget, self.options
        if budget is None:
            return state
        self.tokens += tokens
        count, seen = budget, np.array(state.num_seen)
        if isinstance(budget, float):
            count = int(head_budgets(budget, (), seen))
        own = {name: options[name] for name in ("sinks", "recent") if name in options}
        room = num_mergeable(count, **own, causal=self.again is None)
        if count >= state.mean_stored() or room < 1:
            return state
        if self.again is not None:
            state = self.again.reread(np.concatenate(self.tokens, axis=-1), state)
        self.tokens = []
        return state.merge(count, **options)
