"""Retrieval: questions about a context whose cache was shortened before they were read.

The model reads the context of a task of RULER (ruler.py), each method shortens the
cache, and the model then reads the question and the start of the answer, and continues
it greedily. The score is the fraction of the right answers in this text. A task counts
at a length if the mean score with the whole cache is at least `THRESHOLD`.
"""

from typing import Any

import numpy as np
import torch
from cache_methods import Method
from cache_reading import Prompt, Shortened, filled_cache, read
from quality_tables import interval
from ruler import TASKS, Sample, samples, score

Report = dict[str, Any]
THRESHOLD = 0.5
BUDGETS = 0.5, 0.25, 0.1
SEEDS = {"tuning": 1, "held_out": 2}
# Tokens that an answer may have. A digit is a token.
_ANSWER = dict.fromkeys(TASKS, 32) | {
    "niah_single_3": 48,
    "niah_multivalue": 56,
    "niah_multiquery": 56,
    "cwe": 80,
}


def split_tokens(
    tokenizer: Any, sample: Sample, chat: bool
) -> tuple[list[int], list[int]]:
    """Return the tokens of the context, and those of the question and the prefix.

    `chat` puts both into the chat template of the model.
    """
    before, between = "", ""
    if chat:
        message = [{"role": "user", "content": "\0"}]
        text = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        before, between = text.split("\0")
    context = tokenizer(before + sample.context).input_ids
    question = tokenizer(sample.question + between + sample.prefix).input_ids
    return context, question


@torch.no_grad()
def continued(
    model: Any, tokenizer: Any, cache: Any, ids: torch.Tensor, sample: Sample
) -> list[str]:
    """Return the texts after these tokens (B, T), each token the most probable one.

    A text ends where the model ends it. It may end earlier, if the rest cannot change
    the score: when it has all answers, or at the end of a line with the only answer.
    """
    num_rows = len(ids)
    tokens: list[list[int]] = [[] for _ in range(num_rows)]
    texts, done = [""] * num_rows, [False] * num_rows
    for _ in range(_ANSWER[sample.task]):
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1)[:, None]
        for row in range(num_rows):
            if done[row] or int(ids[row]) == tokenizer.eos_token_id:
                done[row] = True
                continue
            tokens[row].append(int(ids[row]))
            text = texts[row] = tokenizer.decode(tokens[row])
            line = len(sample.answers) == 1 and "\n" in text.lstrip()
            done[row] = line or score(text, sample.answers) == 1
        if all(done):
            break
    return texts
