"""RULER's retrieval tasks: facts in a long context, and a question about them.

The tasks, their sentences and their settings are those of RULER [1]_ (NVIDIA/RULER at
commit c3f5e3b); the code is our own. A sample has its context apart from its question,
so that a cache can be shortened before the question is known. What differs from RULER:

- Essays are paragraphs of Python's reference, because those of Paul Graham are not in
  any package. A sample starts at a random paragraph, not always at the first one.
- `num_tokens` limits the context. RULER counts the question and the answer, too.
- The solved example before `vt` has 3 lines of noise, not about 15, and `vt_2hops` is
  `vt` with 2 hops instead of 4.
- Every sample has its own random numbers.
- The prefix of `vt` does not end with a space, which tokenizers join to the next word.

.. [1] C.-P. Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context
   Language Models?", arXiv:2404.06654.
"""

import math
import random
import string
from collections.abc import Callable
from typing import Any, NamedTuple

from ruler_text import (
    NOISE,
    distinct,
    essay,
    hidden,
    key,
    letters,
    magic,
    number,
    numbered,
    sentences,
    words,
)

_DEPTHS = 40  # depths at which an essay can have a needle, from its start to its end
_MANY = 4096  # from this length on, `cwe` repeats its words more often


class Sample(NamedTuple):
    """A question about a context."""

    task: str
    context: str
    question: str  # follows the context
    prefix: str  # the start of the answer, which the model continues
    answers: list[str]


class Needles(NamedTuple):
    """Settings of a task that hides needles: facts that give a key a magic value."""

    haystack: str  # "noise", "essay" or "needle"
    values: str = "numbers"  # or "uuids"
    num_keys: int = 1
    num_values: int = 1  # of each key
    num_queries: int = 1


NIAH = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", "uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_keys=4, num_queries=4),
}
HOPS = {"vt": 4, "vt_2hops": 2}
TASKS = *NIAH, *HOPS, "cwe", "fwe"
Fill = Callable[[int], Sample]  # returns a sample with n units of filling


def samples(
    task: str, tokenizer: Any, num_tokens: int, count: int, seed: int
) -> list[Sample]:
    """Return samples whose contexts have almost `num_tokens` tokens, and never more.

    Parameters
    ----------
    task : str
        A name of `TASKS`.
    tokenizer : callable
        A tokenizer of transformers: ``tokenizer(text).input_ids`` are its tokens.
    num_tokens : int
        Length of a context, in tokens.
    count : int
        Number of samples.
    seed : int
        Seed of the random numbers. The first samples do not depend on `count`.

    Returns
    -------
    list of Sample
        The samples.

    Raises
    ------
    ValueError
        If the task is unknown, or a context without filling has more tokens.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}")
    result = []
    for i in range(count):
        rng = random.Random(f"{task}, {num_tokens} tokens, seed {seed}, sample {i}")
        result.append(_longest(_filling(task, num_tokens, rng), tokenizer, num_tokens))
    return result


def score(text: str, answers: list[str]) -> float:
    """Return the fraction of the answers that a text contains, in any case."""
    text = text.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def _filling(task: str, num_tokens: int, rng: random.Random) -> Fill:
    """Draw what a sample contains."""
    if task in NIAH:
        return _needles(task, num_tokens, rng)
    if task in HOPS:
        return _chain(task, rng)
    return (_common_words if task == "cwe" else _frequent_words)(num_tokens, rng)


def _longest(fill: Fill, tokenizer: Any, num_tokens: int) -> Sample:
    """Return the sample with the largest filling whose context is short enough."""

    def length(units: int) -> int:
        return len(tokenizer(fill(units).context).input_ids)

    if (least := length(0)) > num_tokens:
        raise ValueError(
            f"`num_tokens` must be at least {least} for this sample of "
            f"{fill(0).task}, got {num_tokens}"
        )
    # Each unit has at least one token, so more than num_tokens units never fit.
    low, high = 0, num_tokens
    while low < high:  # `low` units fit, and high + 1 do not
        middle = (low + high + 1) // 2
        if length(middle) <= num_tokens:
            low = middle
        else:
            high = middle - 1
    return fill(low)


def _needles(task: str, num_tokens: int, rng: random.Random) -> Fill:
    """Hide facts in noise, in an essay, or among other facts."""
    settings = NIAH[task]
    haystack, name, num_keys, num_values, num_queries = settings
    # More facts than fit: each of them has more than four tokens.
    num_other = num_tokens // 4 if haystack == "needle" else 0
    num_facts = num_keys * num_values
    keys = distinct(lambda: key(rng), num_keys + num_other)
    values = distinct(lambda: magic(name, rng), num_facts + num_other)
    owners = [k for k in keys[:num_keys] for _ in range(num_values)] + keys[num_keys:]
    facts = [
        f"One of the special magic {name} for {owner} is: {value}."
        for owner, value in zip(owners, values, strict=True)
    ]
    asked = [keys[i] for i in rng.sample(range(num_keys), num_queries)]
    answers = [v for k in asked for o, v in zip(owners, values, strict=True) if o == k]
    needles, other = facts[:num_facts], facts[num_facts:]
    rng.shuffle(needles)
    depths = sorted(x / (_DEPTHS - 1) for x in rng.sample(range(_DEPTHS), num_facts))
    text = essay(rng, num_tokens) if haystack == "essay" else []
    introduction, question, prefix = _quiz(name, asked, len(answers))

    def fill(units: int) -> Sample:
        if haystack == "essay":
            context = " ".join(hidden(sentences(text[:units]), needles, depths))
        else:
            hay = [NOISE] * units if haystack == "noise" else other[:units]
            context = "\n".join(hidden(hay, needles, depths))
        return Sample(task, f"{introduction}\n{context}", question, prefix, answers)

    return fill


def _quiz(values: str, asked: list[str], num_answers: int) -> tuple[str, str, str]:
    """Return introduction, question and prefix; one answer has the singular."""
    keys = ", ".join(asked[:-1]) + ", and " + asked[-1] if asked[1:] else asked[0]
    if num_answers > 1:
        name, some, what, verb = values, "Some", "What are all", "are"
    else:
        name, some, what, verb = values.removesuffix("s"), "A", "What is", "is"
    subject = f"special magic {name} for {keys} mentioned in the provided text"
    introduction = (
        f"{some} special magic {name} {verb} hidden within the following text. Make "
        f"sure to memorize it. I will quiz you about the {name} afterwards."
    )
    return introduction, f"\n{what} the {subject}?", f" The {subject} {verb}"


def _chain(task: str, rng: random.Random) -> Fill:
    """Hide a chain of assignments in noise, after a solved example."""
    hops = HOPS[task]
    # The example has another value, and shorter names.
    example_value, value = distinct(lambda: number(rng, 5), 2)
    lines, names = _assignments(hops, 3, example_value, rng)
    spots = sorted(rng.random() for _ in lines)
    text, question, prefix = _tracking(
        hidden([NOISE] * 3, lines, spots), example_value, hops
    )
    solved = f"{text}{question}{prefix} {' '.join(names)}\n\n"
    chain, answers = _assignments(hops, 5, value, rng)
    depths = sorted(rng.random() for _ in chain)

    def fill(units: int) -> Sample:
        text = hidden([NOISE] * units, chain, depths)
        context, question, prefix = _tracking(text, value, hops)
        return Sample(task, solved + context, question, prefix, answers)

    return fill


def _tracking(lines: list[str], value: str, hops: int) -> tuple[str, str, str]:
    """Return context, question and prefix of a chain in noise."""
    context = (
        "Memorize and track the chain(s) of variable assignment hidden in the "
        "following text.\n\n" + "\n".join(lines)
    )
    question = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the "
        "text above."
    )
    prefix = (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{hops + 1} variables are assigned the value {value}, they are:"
    )
    return context, question, prefix


def _assignments(
    hops: int, num_letters: int, value: str, rng: random.Random
) -> tuple[list[str], list[str]]:
    """Return the lines of a chain, and its variables."""
    draw = lambda: letters(rng, string.ascii_uppercase, num_letters)  # noqa: E731
    names = distinct(draw, hops + 1)
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {names[i + 1]} = VAR {names[i]}" for i in range(hops)]
    return lines, names


def _common_words(num_tokens: int, rng: random.Random) -> Fill:
    """List words of which ten are repeated more often, after a shorter example."""
    long = num_tokens >= _MANY
    often, seldom = (30, 3) if long else (6, 1)
    size, example_often, example_seldom = (40, 10, 3) if long else (20, 3, 1)
    every = words("noun", "adjective", "verb")
    drawn = rng.sample(every, min(size + num_tokens, len(every)))
    example, drawn = drawn[:size], drawn[size:]
    order = rng.getrandbits(64)
    question = "\nQuestion: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"

    def listed(some: list[str], often: int, seldom: int) -> str:
        repeated = some[:10] * often + some[10:] * seldom
        random.Random(order).shuffle(repeated)
        return (
            "Below is a numbered list of words. In these words, some appear more often "
            "than others. Memorize the ones that appear most often.\n"
            + numbered(repeated)
        )

    solved = listed(example, example_often, example_seldom)
    solved += f"{question}{prefix} {numbered(example[:10])}\n"

    def fill(units: int) -> Sample:
        context = solved + listed(drawn[: 10 + units], often, seldom)
        return Sample("cwe", context, question, prefix, drawn[:10])

    return fill


def _frequent_words(num_tokens: int, rng: random.Random) -> Fill:
    """Write coded words with Zipf's frequencies; the commonest one becomes dots."""
    size = max(num_tokens // 50, 5)
    coded = distinct(lambda: letters(rng, string.ascii_lowercase, 6), size)
    order = rng.getrandbits(64)
    question = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    prefix = (
        " Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    )

    def fill(units: int) -> Sample:
        # n k^-2 / ζ(2) of the k-th word. From n = 64 on, the fourth word appears more
        # often than the fifth.
        text: list[str] = []
        for k, word in enumerate(["...", *coded[1:]], 1):
            text += [word] * int((64 + units) / k**2 * 6 / math.pi**2)
        random.Random(order).shuffle(text)
        context = (
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {' '.join(text)}"
        )
        return Sample("fwe", context, question, prefix, coded[1:4])

    return fill
