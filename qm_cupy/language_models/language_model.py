"""A language model of the Llama family: predictions, and texts that go on.

B sequences have N tokens of width D, or K merged tokens. The vocabulary has V tokens. A
head has the width d.
"""

from typing import Any

import numpy as np

from ..arrays.conversion import (
    Array,
    FloatArray,
    IntArray,
    convert_inputs,
    on_callers_stream,
)
from ..arrays.counts import check_counts
from ..arrays.dtypes import accumulation_dtype
from ..priors.merged_tokens import per_sequence
from .generate import generate_ids
from .llama_model import LlamaModel
from .llama_weights import EMBEDDING
from .model_state import ModelState
from .read_checks import Inputs, check_embeddings, check_ids, check_state, inputs_of
from .reading import predict_logits, read_tokens
from .rereading import read_tokens_again


class LanguageModel(LlamaModel):
    r"""A causal transformer of the Llama family, for inference without a framework.

    It has blocks x += attention(norm(x)), x += MLP(norm(x)), with RMSNorm, rotary
    positions, heads of queries in groups that read one head of keys, and the MLP
    :math:`W_d (\operatorname{silu}(W_g x) \cdot W_u x)` [1]_. Attention adds a bias to
    the scores of each key: log n for a merged token of size n, or the bias of a merged
    entry of the cache.

    Make a model by `from_gguf`, `from_transformers`, `from_state_dict` or `init`. On
    its first use on a GPU, its weights are copied there, and later uses read this copy.
    Computations are float32, or float64 for float64 embeddings or weights.

    Parameters
    ----------
    weights : mapping of str to ndarray
        The weights, by the names of transformers without "model.". They are listed in
        `from_state_dict`.
    num_heads : int
        Number of heads of queries in a layer.
    num_key_heads : int
        Number of heads of keys, which divides `num_heads`.
    rope_base : float, default 10000
        Base of the rotation by positions: pair i of a head, the elements i and
        i + d / 2, turns by base^(-2i / d) radians for each position.
    epsilon : float, default 1e-5
        What RMSNorm adds to the mean of the squares.

    Raises
    ------
    TypeError
        If a weight is not a floating array.
    ValueError
        If a name or shape does not fit, or a weight is not finite.

    See Also
    --------
    qm_cupy.transformers.MergedCache : A cache that merges, for models in torch.

    References
    ----------
    .. [1] H. Touvron et al., "LLaMA: Open and Efficient Foundation Language Models",
       arXiv:2302.13971.

    Examples
    --------
    >>> import numpy as np
    >>> import qm_cupy as qm
    >>> model = qm.LanguageModel.init(50, 16, num_heads=2, num_layers=2, seed=0)
    >>> ids = np.random.default_rng(0).integers(0, 50, 40)
    >>> model.generate(ids, 5, budget=0.5).shape
    (5,)

    Merged embeddings are read with their sizes and positions:

    >>> merged = qm.quickmerge(model.embed(ids), 0.5)
    >>> qm.decode(merged, model).shape
    (20, 50)
    """

    @on_callers_stream
    def embed(self, ids: IntArray) -> FloatArray:
        """Return the embeddings of tokens, which can be merged.

        Parameters
        ----------
        ids : ndarray of int of shape (N,) or (B, N)
            Numbers of the tokens in the vocabulary. On a GPU they are not checked, and
            the nearest valid number is used.

        Returns
        -------
        ndarray of shape (N, D) or (B, N, D)
            float32, or float64 for float64 weights.

        Raises
        ------
        TypeError
            If `ids` are not integers.
        ValueError
            If the shape does not fit or a number is not in the vocabulary.
        """
        convert_back, ids = convert_inputs({"ids": ids})
        return convert_back(self._embedded("ids", ids))

    @on_callers_stream
    def predict(
        self,
        tokens: Array,
        *,
        positions: IntArray | None = None,
        sizes: Any = None,
        num_groups: Any = None,
    ) -> Array:
        """Return the logits of the next token after every token, in one pass.

        Parameters
        ----------
        tokens : ndarray of shape (K, D) or (B, K, D)
            Embeddings, merged or not; float16, bfloat16, float32 or float64.
        positions : ndarray of int of shape (K,) or (B, K), optional
            Position of each token in the unmerged sequence; by default 0..K-1.
        sizes : ndarray of shape (K,) or (B, K), optional
            Number of tokens that each token stands for, ≥ 0; by default 1. A token of
            size 0 is not attended to.
        num_groups : int or ndarray of int of shape (B,), optional
            Number of valid tokens of each sequence. Logits of later tokens, which are
            padding, are undefined.

        Returns
        -------
        ndarray of shape (K, V) or (B, K, V)
            Row t has the logits of the token after token t; float32, or float64 for
            float64 input.

        Raises
        ------
        TypeError
            If `tokens` is not floating, or `positions` or `num_groups` not integer.
        ValueError
            If a shape does not fit, an entry is not finite, or a size is negative.
        """
        convert_back, tokens, positions, sizes, num_groups = convert_inputs(
            {"tokens": tokens, "positions": positions, "sizes": sizes},
            counts={"num_groups": num_groups},
        )
        check_embeddings("tokens", tokens, self._settings, "KD", "BKD")
        check_counts(tokens, num_groups)
        inputs = inputs_of(tokens, positions, sizes, ("positions", "sizes"))
        logits = predict_logits(inputs, self.prepared_weights(inputs.x), self._settings)
        return convert_back(logits.reshape(*tokens.shape[:-1], -1))

    @on_callers_stream
    def read(
        self,
        tokens: Array,
        state: ModelState | None = None,
        *,
        positions: IntArray | None = None,
        sizes: Any = None,
        last_only: bool = False,
    ) -> tuple[FloatArray, ModelState]:
        """Read tokens after those of a state; return their logits and the new state.

        Parameters
        ----------
        tokens : ndarray of int of shape (K,) or (B, K), or of float (K, D) or (B, K, D)
            Numbers of tokens, or embeddings, merged or not.
        state : ModelState, optional
            The state that the last call returned, merged or not; None for a new text.
        positions : ndarray of int of shape (K,) or (B, K), optional
            Positions in the unmerged sequence; by default they go on from the last
            one, which is `num_seen` - 1 if no positions were passed before.
        sizes : ndarray of shape (K,) or (B, K), optional
            Number of tokens that each token stands for, ≥ 0; by default 1.
        last_only : bool, default False
            Whether to return only the logits after the last token, (..., 1, V).

        Returns
        -------
        logits : ndarray of shape (K, V) or (B, K, V)
            As those of `predict` for the whole text.
        state : ModelState
            The state after these tokens; the one that was passed does not change.

        Raises
        ------
        TypeError
            If a dtype is wrong, or `state` is not a state of `read` or `step`.
        ValueError
            If a shape does not fit, an entry is not finite, a number is not in the
            vocabulary, or a size is negative.
        """
        convert_back, tokens, positions, sizes = convert_inputs(
            {"tokens": tokens, "positions": positions, "sizes": sizes}
        )
        tokens = self._rows_of(tokens)
        inputs = inputs_of(tokens, positions, sizes, ("positions", "sizes"))
        logits, state = self._read(inputs, state, convert_back, last_only)
        logits = logits if tokens.ndim > 2 else logits[0]
        return convert_back(logits), state

    @on_callers_stream
    def reread(self, tokens: Array, state: ModelState) -> ModelState:
        """Read tokens of a state a second time, so that it merges by their attention.

        The tokens are read after the text, but their entries are not kept. The next
        merge weighs an entry by the largest attention that it receives from them [1]_,
        and calibrates its bias by them. So it keeps single facts that later tokens may
        ask for, to which the text itself pays little attention.

        Parameters
        ----------
        tokens : ndarray of int of shape (K,) or (B, K), or of float (K, D) or (B, K, D)
            The text that the state has read, or its part since the last merge. They are
            not compared with what it has read.
        state : ModelState
            The state after these tokens.

        Returns
        -------
        ModelState
            A state with the same entries. Reading other tokens ends the effect of the
            second reading: call `reread` just before `ModelState.merge`.

        Raises
        ------
        TypeError
            If a dtype is wrong, or `state` is not a state of `read` or `step`.
        ValueError
            If a shape does not fit, an entry is not finite, a number is not in the
            vocabulary, or there are more tokens than the state has read.

        References
        ----------
        .. [1] J.-H. Kim et al., "KVzip: Query-agnostic KV cache compression with
           context reconstruction", NeurIPS 2025, arXiv:2505.23416.

        Examples
        --------
        >>> import numpy as np
        >>> import qm_cupy as qm
        >>> model = qm.LanguageModel.init(50, 16, num_heads=2, num_layers=2, seed=0)
        >>> ids = np.random.default_rng(0).integers(0, 50, 40)
        >>> _, state = model.read(ids)
        >>> model.reread(ids, state).merge(20, per_head=True)
        ModelState(40 tokens, 20 entries on average in 2 layers, float32)
        """
        _, tokens = convert_inputs({"tokens": tokens})
        tokens = self._rows_of(tokens)
        x = inputs_of(tokens, None, None, ("positions", "sizes")).x
        check_state(state, x, self._settings)
        if not 1 <= x.shape[1] <= state.num_seen:
            raise ValueError(
                f"`tokens` must be among the {state.num_seen} that the state has read, "
                f"got {x.shape[1]} tokens"
            )
        return read_tokens_again(x, state, self.prepared_weights(x), self._settings)

    @on_callers_stream
    def step(
        self,
        token: Array,
        state: ModelState | None = None,
        *,
        position: Any = None,
        size: Any = None,
    ) -> tuple[Array, ModelState]:
        """Read one embedding, and return the logits of the token after it.

        Parameters
        ----------
        token : ndarray of shape (D,) or (B, D)
            The embedding; float16, bfloat16, float32 or float64.
        state : ModelState, optional
            The state that the last call returned; None at the first token.
        position : int or ndarray of int of shape () or (B,), optional
            Position in the unmerged sequence; by default the one after the last.
        size : number or ndarray of shape () or (B,), optional
            Number of tokens that the token stands for, ≥ 0; by default 1.

        Returns
        -------
        logits : ndarray of shape (V,) or (B, V)
            The row of this token in the result of `predict`.
        state : ModelState
            The state to pass to the next step.

        Raises
        ------
        TypeError
            If `token` is not floating or `position` is not integer.
        ValueError
            If a shape does not fit, an entry is not finite, or a size is negative.
        """
        options = {"position": position, "size": size}
        arrays = {key: x for key, x in options.items() if hasattr(x, "__dlpack__")}
        convert_back, token, *converted = convert_inputs({"token": token} | arrays)
        position, size = (options | dict(zip(arrays, converted, strict=True))).values()
        if token.dtype.kind in "iu":
            raise TypeError(
                f"`token` must be an embedding, got {token.dtype}: call `read` for "
                "numbers of tokens, or `embed` them"
            )
        check_embeddings("token", token, self._settings, "D", "BD")
        rows = token.reshape(-1, 1, token.shape[-1])  # (B, 1, D)

        def column(x: Any) -> Any:
            x = per_sequence(x, rows[:, 0])
            return None if x is None else x.reshape(-1, 1)

        names = "position", "size"
        inputs = inputs_of(rows, column(position), column(size), names)
        logits, state = self._read(inputs, state, convert_back)
        return convert_back(logits.reshape(*token.shape[:-1], -1)), state

    @on_callers_stream
    def generate(
        self,
        ids: IntArray,
        num_tokens: int,
        state: ModelState | None = None,
        *,
        budget: Any = None,
        every: int | None = None,
        stop: int | None = None,
        reread: bool = False,
        **options: Any,
    ) -> IntArray:
        """Return the tokens that follow a text: always the one with the highest logit.

        Parameters
        ----------
        ids : ndarray of int of shape (N,) or (B, N)
            The text, or the part of it that follows the state.
        num_tokens : int
            Number T of new tokens.
        state : ModelState, optional
            The state after an earlier part of the text, merged or not. So one text can
            be read and merged once, and be asked many questions.
        budget : int or float, optional
            Entries of each head to which the text's cache is merged after it was read:
            a number, or a fraction within (0, 1] of the tokens read. Shorter texts do
            not merge, nor do those whose budget has no room beside `sinks` and
            `recent`. By default, the cache keeps all entries.
        every : int, optional
            Also merge each time when this many new tokens were read.
        stop : int, optional
            A token that ends a text. Tokens after it are `stop` too, and there are
            fewer than T if all B texts have ended.
        reread : bool, default False
            Whether the tokens since the last merge are read a second time before a
            merge, as in `reread`; those of `state` are not.
        **options
            As in `ModelState.merge`.

        Returns
        -------
        ndarray of shape (T,) or (B, T)
            The new tokens without the text, in the dtype of `ids`.

        Raises
        ------
        TypeError
            If `ids` are not integers or an option has a wrong type.
        ValueError
            If a shape does not fit, a number is not in the vocabulary, or an option is
            out of range.
        """
        rest: Any = {"budget": budget, "every": every, "stop": stop, "reread": reread}
        args = self, self._settings, ids, num_tokens, state
        return generate_ids(*args, **rest, options=options)

    def _embedded(self, name: str, ids: Any) -> Any:
        """Return the embeddings (..., D) of ids (...), or raise."""
        check_ids(name, ids, self._settings)
        dtype = accumulation_dtype(self.weights[EMBEDDING].dtype)
        table = self.prepared_weights(ids, dtype)[EMBEDDING]
        return table[np.clip(ids, 0, len(table) - 1)]

    def _rows_of(self, tokens: Any) -> Any:
        """Return embeddings (..., D) of numbers of tokens or embeddings, or raise."""
        if tokens.dtype.kind in "iu":
            tokens = self._embedded("tokens", tokens)
        check_embeddings("tokens", tokens, self._settings, "KD", "BKD")
        return tokens

    def _read(
        self, inputs: Inputs, state: Any, convert_back: Any, last_only: bool = False
    ) -> tuple[Any, ModelState]:
        if state is not None:
            check_state(state, inputs.x, self._settings)
        weights = self.prepared_weights(inputs.x)
        rest = weights, self._settings, convert_back, bool(last_only)
        return read_tokens(inputs, state, *rest)
