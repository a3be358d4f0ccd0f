"""RULER's retrieval tasks: facts where they should be, lengths, seeds and scores."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
NUMBER, UUID = r"\d{7}", r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
FACT = rf"One of the special magic (\w+) for (\S.*?) is: ({NUMBER}|{UUID})\."
NIAH = {  # facts in a context, answers, and the name of a value
    "niah_single_1": (1, 1, "numbers"),
    "niah_single_2": (1, 1, "numbers"),
    "niah_single_3": (1, 1, "uuids"),
    "niah_multikey_1": (4, 1, "numbers"),
    "niah_multikey_2": (None, 1, "numbers"),  # as many facts as fit
    "niah_multivalue": (4, 4, "numbers"),
    "niah_multiquery": (4, 4, "numbers"),
}
TASKS = *NIAH, "vt", "vt_2hops", "cwe", "fwe"


def whitespace(text):
    """Stand in for a tokenizer: a word is a token."""
    return SimpleNamespace(input_ids=text.split())


def characters(text):
    """Stand in for a tokenizer with long sequences: a character is a token."""
    return SimpleNamespace(input_ids=text)


@pytest.fixture(scope="module")
def ruler():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield __import__("ruler")


@pytest.fixture(scope="module")
def drawn(ruler):
    """Return ten samples of each task, of 700 words."""
    return {task: ruler.samples(task, whitespace, 700, 10, seed=0) for task in TASKS}


def test_all_tasks_are_tested(ruler):
    assert ruler.TASKS == TASKS


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokenizer", [whitespace, characters])
@pytest.mark.parametrize("num_tokens", [700, 5000])
def test_lengths(ruler, task, tokenizer, num_tokens):
    # A word has about five characters, so the contexts are about as long.
    if tokenizer is characters:
        num_tokens *= 5
    for sample in ruler.samples(task, tokenizer, num_tokens, 2, seed=3):
        length = len(tokenizer(sample.context).input_ids)
        assert 0.9 * num_tokens <= length <= num_tokens


@pytest.mark.parametrize("task", TASKS)
def test_a_context_that_is_too_short(ruler, task):
    with pytest.raises(ValueError, match=f"at least .* {task}, got 20"):
        ruler.samples(task, whitespace, 20, 1, seed=0)


def test_an_unknown_task(ruler):
    with pytest.raises(ValueError, match=r"`task` must be one of niah.*, got 'qa_1'"):
        ruler.samples("qa_1", whitespace, 700, 1, seed=0)


@pytest.mark.parametrize("task", TASKS)
def test_seeds(ruler, drawn, task):
    again = ruler.samples(task, whitespace, 700, 3, seed=0)
    assert again == drawn[task][:3]  # also independent of the number of samples
    other = ruler.samples(task, whitespace, 700, 3, seed=1)
    # No two samples have the same context or the same answers.
    every = [*drawn[task], *other]
    assert len({x.context for x in every}) == len(every)
    assert len({tuple(x.answers) for x in every}) == len(every)


def test_another_process_draws_the_same(drawn):
    """The order of a set of words would depend on the process."""
    code = (
        "import ruler, types; w = lambda x: types.SimpleNamespace(input_ids=x.split());"
        "print([ruler.samples(t, w, 700, 1, 0)[0] for t in ruler.TASKS])"
    )
    # Strings have another hash there.
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER, capture_output=True, check=True
    )
    expected = str([drawn[task][0] for task in TASKS])
    assert result.stdout.decode().strip() == expected


def test_torch_is_not_imported():
    code = "import ruler, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=True)


@pytest.mark.parametrize("task", TASKS)
def test_the_question_is_not_in_the_context(drawn, task):
    for sample in drawn[task]:
        # `cwe` has the same question in every sample, so its example has it, too.
        context = sample.context.partition("Below")[2].rpartition("Below")[2]
        context = context if task == "cwe" else sample.context
        assert sample.question.strip() not in context
        assert sample.prefix.strip() not in context
        assert sample.prefix == sample.prefix.rstrip()
        if task in NIAH:  # nor does the introduction say which key will be asked
            assert "?" not in sample.context.partition("\n")[0]


@pytest.mark.parametrize("task", NIAH)
def test_needles(drawn, task):
    num_facts, num_answers, name = NIAH[task]
    for sample in drawn[task]:
        facts = re.findall(FACT, sample.context)
        # A fact is exactly once in the context, and no value has two keys.
        values = [value for _, _, value in facts]
        assert len(set(values)) == len(values)
        assert len(facts) == num_facts if num_facts else len(facts) > 50
        assert {magic for magic, _, _ in facts} == {name}
        # The keys of the question have exactly the values of the answers, in order.
        singular = name if num_answers > 1 else name[:-1]
        pattern = rf"magic {singular} for (.*) mentioned"
        (asked,) = re.findall(pattern, sample.question)
        keys = re.split(r", and |, ", asked)
        expected = [v for key in keys for _, k, v in facts if k == key]
        assert sorted(sample.answers) == sorted(expected)
        assert len(sample.answers) == num_answers
        for key in keys:
            assert key in sample.prefix
        assert all(sample.context.count(answer) == 1 for answer in sample.answers)
    if task == "niah_multikey_1":
        assert len({key for _, key, _ in facts}) == 4
    if task == "niah_multivalue":
        assert len({key for _, key, _ in facts}) == 1


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_needles_are_at_all_depths(ruler, task):
    samples = ruler.samples(task, whitespace, 700, 60, seed=5)
    # Depths in the context are uniform, so no quarter stays almost empty.
    depths = [x.context.index(x.answers[0]) / len(x.context) for x in samples]
    quarters = Counter(int(4 * depth) for depth in depths)
    assert min(quarters[i] for i in range(4)) >= 5


def test_the_answer_of_the_second_query_is_in_the_order_of_the_question(drawn):
    for sample in drawn["niah_multiquery"]:
        (asked,) = re.findall(r"numbers for (.*) mentioned", sample.question)
        # Each of these keys has one value.
        values = {k: v for _, k, v in re.findall(FACT, sample.context)}
        expected = [values[key] for key in re.split(r", and |, ", asked)]
        assert sample.answers == expected


@pytest.mark.parametrize(("task", "hops"), [("vt", 4), ("vt_2hops", 2)])
def test_chains(drawn, task, hops):
    for sample in drawn[task]:
        example, text = sample.context.split("Memorize and track")[1:]
        value = re.search(r"value (\d{5})", sample.question)[1]
        assert value not in example
        # Follow the assignments in the order of the text.
        known = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            assert name not in known
            known[name] = known.get(source, source)
        assert [name for name, x in known.items() if x == value] == sample.answers
        assert len(known) == len(sample.answers) == hops + 1
        assert f" {hops + 1} variables are assigned the value {value}," in sample.prefix
        # The example is solved rightly: its last words are its variables.
        names = re.findall(r"VAR (\w+) = ", example)
        assert example.split()[-hops - 1 :] == names
        assert not {*names} & {*sample.answers}


@pytest.mark.parametrize(
    ("num_tokens", "common", "uncommon", "example"),
    [(700, 6, 1, (3, 1)), (5000, 30, 3, (10, 3))],
)
def test_common_words(ruler, num_tokens, common, uncommon, example):
    # From 4096 tokens on, the words are repeated more often, as in RULER.
    (sample,) = ruler.samples("cwe", whitespace, num_tokens, 1, seed=0)
    shown, text = sample.context.split("Below")[1:]
    counts = [
        # Words between two numbers: some of them have a space.
        Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |\n|$)", part.partition("\n")[2]))
        for part in (shown.partition("\nQuestion")[0], text)
    ]
    assert {*counts[1].values()} == {common, uncommon}
    top = {word for word, count in counts[1].items() if count == common}
    assert top == {*sample.answers}
    assert len(sample.answers) == 10
    assert {*counts[0].values()} == {*example}
    # The numbers of the list are those of its positions.
    numbers = [int(x) for x in re.findall(r"(\d+)\. ", text.partition("\n")[2])]
    assert numbers == list(range(1, len(numbers) + 1))
    assert not counts[0].keys() & counts[1].keys()


@pytest.mark.parametrize("num_tokens", [120, 700, 5000])
def test_frequent_words(ruler, num_tokens):
    for sample in ruler.samples("fwe", whitespace, num_tokens, 5, seed=0):
        text = sample.context.partition("coded words. ")[2]
        counts = Counter(text.split()).most_common()
        # The dots are not a word; then exactly three words are the commonest.
        assert counts[0][0] == "..."
        assert [word for word, _ in counts[1:4]] == sample.answers
        assert counts[3][1] > counts[4][1]
        # The frequencies fall with the square of the rank.
        assert counts[0][1] == pytest.approx(4 * counts[1][1], abs=4)
        assert counts[0][1] == pytest.approx(9 * counts[2][1], abs=9)


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        (" 1234567.", ["1234567"], 1),
        ("The number is 123456", ["1234567"], 0),
        ("ABCDE, xyzzy and fghij", ["abcde", "FGHIJ", "KLMNO", "ABCDE"], 0.75),
        ("", ["a"], 0),
        ("one two", ["two", "one"], 1),  # in any order
    ],
)
def test_scores(ruler, text, answers, expected):
    assert ruler.score(text, answers) == expected
