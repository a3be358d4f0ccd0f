"""Retrieval: questions about a context whose cache was shortened before they were read.

The model reads the context of a task of RULER (ruler.py), each method shortens the
cache, and the model then reads the question and the start of the answer, and continues
it greedily. The score is the fraction of the right answers in this text. A task counts
at a length if the mean score with the whole cache is at least `THRESHOLD`.

    python benchmarks/lm_retrieval.py [--json FILE] [--tasks T ...] [--lengths N ...]
    python benchmarks/lm_retrieval.py --full [--json FILE] [--tasks ...]
    python benchmarks/lm_retrieval.py --quick

The file is written after each sample, and what it has is not measured again. `--full`
measures the whole cache alone. `--quick` uses a random model with one short text: it
only shows that the code runs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import smollm2
import torch
from cache_methods import OURS, SELECTED, Shorten
from cache_reading import Shortened, filled_cache, read
from cache_rereading import REREADING
from quality_tables import interval
from report import write_json
from ruler import TASKS, Sample, samples, score

import qm_cupy as qm

Report = dict[str, Any]
THRESHOLD = 0.5
BUDGETS = 0.25, 0.1
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
    tokens: list[list[int]] = [[] for _ in ids]
    texts, done = [""] * len(ids), [False] * len(ids)
    for _ in range(_ANSWER[sample.task]):
        output = model(ids, cache=cache, use_cache=True, logits_to_keep=1)
        # From now on, each row reads the token that it has just written.
        cache, ids = output.cache, output.logits[:, -1].argmax(-1)[:, None]
        for row in np.flatnonzero(~np.array(done)):
            token = int(ids[row])
            done[row] = token == tokenizer.eos_token_id
            if not done[row]:
                tokens[row].append(token)
                text = texts[row] = tokenizer.decode(tokens[row])
                line = len(sample.answers) == 1 and "\n" in text.lstrip()
                done[row] = line or score(text, sample.answers) == 1
        if all(done):
            break
    return texts


def stacked(candidates: list[list[Shortened]]) -> list[Shortened]:
    """Return the layers of several shortened caches as rows of one batch.

    Shorter caches are padded with entries whose bias is -inf.
    """
    layers = []
    for layer in zip(*candidates, strict=True):
        longest = max(x.bias.shape[-1] for x in layer)
        rows = []
        for keys, values, bias in layer:
            missing = longest - bias.shape[-1]
            pad = torch.nn.functional.pad
            rows.append(
                (
                    pad(keys, (0, 0, 0, missing)),
                    pad(values, (0, 0, 0, missing)),
                    pad(bias.float(), (0, missing), value=-torch.inf),
                )
            )
        layers.append(Shortened(*(torch.cat(x) for x in zip(*rows, strict=True))))
    return layers


def full_scores(
    model: Any, tokenizer: Any, some: list[Sample], chat: bool = True
) -> list[float]:
    """Return the score of each sample with the whole cache."""
    result = []
    for sample in some:
        context, question = split_tokens(tokenizer, sample, chat)
        ids = torch.tensor([context + question])
        (text,) = continued(model, tokenizer, None, ids, sample)
        result.append(score(text, sample.answers))
    return result


def scores(
    model: Any,
    tokenizer: Any,
    sample: Sample,
    methods: dict[str, Shorten],
    budgets: tuple[float, ...] = BUDGETS,
    chat: bool = True,
) -> Report:
    """Return the score of each method and budget on one sample, and of the whole cache.

    All methods of a budget answer in one batch.
    """
    context, question = split_tokens(tokenizer, sample, chat)
    prompt = read(model, context, repeated=len(context))
    result: Report = {name: {} for name in methods}
    # Alone, because the shortened caches would be padded to its length.
    cache = filled_cache(model, prompt.whole, prompt.num_tokens)
    ids = torch.tensor([question])
    (text,) = continued(model, tokenizer, cache, ids, sample)
    result["full"] = score(text, sample.answers)
    for budget in budgets:
        count = int(prompt.num_tokens * budget)
        layers = stacked([method(prompt, count) for method in methods.values()])
        ids = torch.tensor([question] * len(methods))
        cache = filled_cache(model, layers, prompt.num_tokens)
        texts = continued(model, tokenizer, cache, ids, sample)
        for name, text in zip(methods, texts, strict=True):
            result[name][str(budget)] = score(text, sample.answers)
    return result


def retrieval(
    model: Any,
    tokenizer: Any,
    cells: list[tuple[str, int]],
    methods: dict[str, Shorten],
    count: int,
    split: str = "held_out",
    budgets: tuple[float, ...] = BUDGETS,
    path: Path | None = None,
) -> Report:
    """Return the scores of all methods, paired by sample.

    `cells` are tasks with their lengths. The result has, for each of them, the scores
    with the whole cache, and the scores of each method and budget. `split` is "tuning"
    or "held_out"; their samples differ. With `path`, the report is written there after
    each sample, and the samples that it has are not measured again.
    """
    report: Report = json.loads(path.read_text()) if path and path.exists() else {}
    for i in range(count):
        for task, num_tokens in cells:
            cell = report.setdefault(task, {}).setdefault(
                str(num_tokens), {"full": [], "methods": {}}
            )
            missing = {
                name: method
                for name, method in methods.items()
                if num_measured(cell["methods"].get(name, {})) <= i
            }
            known = len(cell["full"]) > i
            # An earlier run has it.
            if known and not missing:
                continue
            sample = samples(task, tokenizer, num_tokens, i + 1, SEEDS[split])[i]
            if missing:
                row = scores(model, tokenizer, sample, missing, budgets)
            else:
                row = {"full": full_scores(model, tokenizer, [sample])[0]}
            # The whole cache is measured again with each new method, and is the same.
            full = row.pop("full")
            if not known:
                cell["full"].append(full)
            for name, by_budget in row.items():
                lists = cell["methods"].setdefault(name, {})
                for budget, result in by_budget.items():
                    lists.setdefault(budget, []).append(result)
            if path:
                write_json(path, report)
    return report


def num_measured(lists: dict[str, list[float]]) -> int:
    """Return for how many samples a method has the scores of every budget."""
    return min(map(len, lists.values()), default=0)


def tables(report: Report) -> Report:
    """Print and return mean scores, with 95 % intervals over samples."""
    summary: Report = {}
    for task, lengths in report.items():
        for num_tokens, cell in lengths.items():
            full = float(np.mean(cell["full"]))
            print(f"\n{task}, {num_tokens} tokens, {len(cell['full'])} samples")
            counts = full >= THRESHOLD
            print(f"{'whole cache':44s} {full:.2f}{'' if counts else ', too low'}")
            rows = summary.setdefault(task, {})[num_tokens] = {
                "full": full,
                "counts": counts,
            }
            for name, budgets in cell["methods"].items():
                means = {b: interval(np.array(x)) for b, x in budgets.items()}
                rows[name] = means
                text = "".join(
                    f"  {float(b):4.0%} {mean:.2f} [{low:.2f}, {high:.2f}]"
                    for b, (mean, low, high) in means.items()
                )
                print(f"{name:44s}{text}")
    return summary


METHODS: dict[str, Shorten] = {
    **{name: OURS[name] for name in list(OURS) if name != "merge_kv_cache, per_head"},
    **REREADING,
    **SELECTED,
}
# Tasks of which the whole cache solves enough at 512 tokens.
SOLVED = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multivalue",
    "fwe",
)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tasks", nargs="+", default=SOLVED, choices=TASKS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512])
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--split", choices=SEEDS, default="held_out")
    parser.add_argument("--full", action="store_true", help="the whole cache alone")
    parser.add_argument("--quick", action="store_true", help="a random model, briefly")
    parser.add_argument("--json", type=Path, help="add the results to a file")
    options = parser.parse_args()
    print(f"qm_cupy {qm.__version__}, torch {torch.__version__}")
    methods = {} if options.full else METHODS
    model: Any
    tokenizer: Any
    if options.quick:
        model, tokenizer = smollm2.random_model(), smollm2.ByteTokenizer()
        cells, count = [("niah_single_1", 500)], 1
    else:
        model, tokenizer = smollm2.load()
        cells = [(task, length) for length in options.lengths for task in options.tasks]
        count = options.samples
    arguments = cells, methods, count, options.split
    tables(retrieval(model, tokenizer, *arguments, path=options.json))


if __name__ == "__main__":
    main()
