"""The settings, in blocks and statements, threads, asyncio tasks and generators."""

import asyncio
import contextvars
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum

import numpy as np
import pytest

import qm_cupy as qm
from qm_cupy import settings


class Setting:
    """One of the settings: `set(value)` constructs it, `get()` reads its value."""

    def __init__(self, construct, get, default, other):
        self.set, self.get, self.default, self.other = construct, get, default, other


# name: constructor, reader, default value, another value
SETTINGS = {
    "use_kernels": (qm.use_kernels, settings.implementation, "optimized", "basic"),
    "allow_tf32": (qm.allow_tf32, settings.tf32_allowed, False, True),
    "check_finite": (qm.check_finite, settings.finite_checked, True, False),
}


def in_a_new_context(function):
    """Run a function in a context in which nothing is set, as in a new thread."""
    return contextvars.Context().run(function)


@pytest.fixture(params=SETTINGS)
def setting(request):
    return Setting(*SETTINGS[request.param])


@pytest.fixture(autouse=True)
def no_setting_remains():
    # A setting that stays would change every later test of the process.
    before = settings.snapshot()
    yield
    assert settings.snapshot() == before


def in_a_thread(function, *args):
    """Return the result of a function that runs in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(timeout=30)


def test_a_block_ends(setting):
    assert setting.get() == setting.default
    with setting.set(setting.other):
        assert setting.get() == setting.other
        with setting.set(setting.default):
            assert setting.get() == setting.default
        assert setting.get() == setting.other
    assert setting.get() == setting.default


def test_a_statement_applies_until_the_next_one(setting):
    def statements():
        setting.set(setting.other)
        assert setting.get() == setting.other
        with setting.set(setting.default):
            assert setting.get() == setting.default
        assert setting.get() == setting.other
        setting.set(setting.default)
        assert setting.get() == setting.default

    in_a_new_context(statements)


def test_a_block_undoes_the_statements_inside(setting):
    with setting.set(setting.other):
        setting.set(setting.default)
        assert setting.get() == setting.default
        setting.set(setting.other)
        setting.set(setting.default)
    assert setting.get() == setting.default
    with setting.set(setting.default):
        setting.set(setting.other)
    assert setting.get() == setting.default


def test_a_block_undoes_its_construction(setting):
    # `with f(x):` constructs first: until then it looks like a statement.
    choice = setting.set(setting.other)
    assert setting.get() == setting.other
    with setting.set(setting.default):  # functions of the library may do this
        pass
    assert setting.get() == setting.other
    with choice:
        assert setting.get() == setting.other
    assert setting.get() == setting.default
    later = setting.set(setting.other)
    with choice:  # entered again: this does not undo the construction of `later`
        pass
    with later:
        assert setting.get() == setting.other
    assert setting.get() == setting.default


def test_a_statement_between_construction_and_block_remains(setting):
    def statements():
        choice = setting.set(setting.other)
        setting.set(setting.default)
        with choice:
            assert setting.get() == setting.other
        # The end of a block restores the value from before the block, not from before
        # the construction, because a statement came in between.
        assert setting.get() == setting.default

        choice = setting.set(setting.default)
        setting.set(setting.other)
        with choice:
            assert setting.get() == setting.default
        assert setting.get() == setting.other

    in_a_new_context(statements)


def test_one_object_opens_several_blocks(setting):
    choice = setting.set(setting.other)
    for _ in range(3):
        with choice:
            assert setting.get() == setting.other
        assert setting.get() == setting.default
    with choice:
        with setting.set(setting.default):
            with choice, choice:  # twice at once
                assert setting.get() == setting.other
            assert setting.get() == setting.default
        assert setting.get() == setting.other
    assert setting.get() == setting.default


# An exception inside a block must not leave its value behind.
def test_an_exception_ends_a_block(setting):
    def fail():
        with setting.set(setting.other):
            with pytest.raises(ZeroDivisionError), setting.set(setting.default):
                raise ZeroDivisionError
            assert setting.get() == setting.other
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert setting.get() == setting.default


def test_the_settings_do_not_affect_each_other():
    with qm.use_kernels("basic"):
        with qm.check_finite(False):
            # Kernels, TF32, finite checks.
            assert settings.snapshot() == ("basic", False, False)
            with qm.allow_tf32():
                assert settings.snapshot() == ("basic", True, False)
        assert settings.snapshot() == ("basic", False, True)


def test_a_thread_starts_with_the_default(setting):
    with setting.set(setting.other):
        assert in_a_thread(setting.get) == setting.default
        context = contextvars.copy_context()
    assert in_a_thread(context.run, setting.get) == setting.other  # taken along
    assert setting.get() == setting.default


def test_a_thread_changes_no_other(setting):
    def statement():
        setting.set(setting.other)
        return setting.get()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(statement).result() == setting.other
        assert pool.submit(setting.get).result() == setting.other  # the same thread
        assert setting.get() == setting.default
    assert in_a_thread(setting.get) == setting.default


def test_threads_use_one_object_at_the_same_time(setting):
    """Each thread opens blocks of the same object, and all are inside at once."""
    choice, threads = setting.set(setting.other), 4
    barrier, seen = threading.Barrier(threads, timeout=30), []

    def blocks(number):
        values = []
        for turn in range(20):
            barrier.wait()
            with choice:
                barrier.wait()
                values.append(setting.get() == setting.other)
                with setting.set(setting.default):
                    barrier.wait()
                    values.append(setting.get() == setting.default)
                    # Half of the threads nest the object once more, in turns.
                    if (number + turn) % 2:
                        with choice:
                            values.append(setting.get() == setting.other)
            values.append(setting.get() == setting.default)
        seen.extend(values)  # a list's `extend` is atomic

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(blocks, number) for number in range(threads)]:
            done.result(timeout=60)
    # Three values in each turn of each thread, and more where blocks are nested.
    assert len(seen) >= threads * 20 * 3
    assert all(seen)
    with choice:  # the construction in this thread is not undone yet
        pass
    assert setting.get() == setting.default


def test_threads_are_in_different_blocks(setting):
    inside, finished = threading.Event(), threading.Event()

    def other():
        with setting.set(setting.other):
            inside.set()
            assert finished.wait(30)
            return setting.get()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(other)
        assert inside.wait(30)
        with setting.set(setting.default):
            assert setting.get() == setting.default
        finished.set()
        # The block of this thread began and ended while the
        # other one was inside its own.
        assert done.result(timeout=30) == setting.other


def test_tasks_alternate_inside_their_blocks(setting):
    values = setting.default, setting.other
    choices = {}

    async def turns(value):
        seen = []
        for _ in range(5):
            with choices[value]:
                await asyncio.sleep(0)  # lets the other tasks run
                seen.append(setting.get() == value)
                setting.set(value)
                await asyncio.sleep(0)
                with setting.set(value):
                    await asyncio.sleep(0)
                    seen.append(setting.get() == value)
            await asyncio.sleep(0)
            seen.append(setting.get() == setting.default)
        return seen

    async def tasks():
        for value in values:
            choices[value] = setting.set(value)
        setting.set(setting.default)
        # Six tasks, three with each value: every wait changes the task.
        seen = await asyncio.gather(*(turns(value) for value in values * 3))
        assert setting.get() == setting.default
        return seen

    assert all(all(seen) for seen in asyncio.run(tasks()))


def test_a_task_starts_with_the_value_of_its_creator(setting):
    async def statement():
        seen = setting.get()
        setting.set(setting.default)
        return seen

    async def create():
        with setting.set(setting.other):
            task = asyncio.create_task(statement())
            assert await task == setting.other
            # The task has a copy of the context, so its
            # statement changed only the copy.
            assert setting.get() == setting.other
            return await asyncio.to_thread(setting.get)

    assert asyncio.run(create()) == setting.other
    assert setting.get() == setting.default


# A generator runs in its caller's context: its block may end before an inner one.
def test_generators_close_their_blocks_in_any_order(setting):
    def block(value):
        with setting.set(value):
            yield setting.get()

    for first_closed in (0, 1):
        both = block(setting.other), block(setting.default)
        assert [next(generator) for generator in both] == [
            setting.other,
            setting.default,
        ]
        both[first_closed].close()
        # If the outer one (0) closes first, the value of the inner one stays.
        still_open = (setting.default, setting.other)[first_closed]
        assert setting.get() == still_open
        both[1 - first_closed].close()
        assert setting.get() == setting.default


def test_the_end_of_a_block_changes_no_other_thread(setting):
    choice = setting.set(setting.other)

    def elsewhere():
        with setting.set(setting.other):
            choice.__exit__()
            assert setting.get() == setting.other
        return setting.get()

    with choice:
        assert in_a_thread(elsewhere) == setting.default
        assert setting.get() == setting.other
    assert setting.get() == setting.default


def test_statements_use_no_growing_memory(setting):
    def statements():
        seen = []
        for _ in range(100):
            seen.append(weakref.ref(setting.set(setting.other)))
            with setting.set(setting.default):
                pass
        return sum(reference() is not None for reference in seen)

    # The latest object and the one before it may stay, but not a chain of a hundred.
    assert in_a_new_context(statements) <= 2


class Weird:
    """An object that is equal to everything, has no hash, and cannot be printed."""

    __hash__ = None

    def __eq__(self, other):
        return True

    def __repr__(self):
        raise RuntimeError


WRONG = [None, 1, 0.0, [], {}, np.True_, np.ones((40, 40)), Weird(), b"basic", bool]


# The error must itself not fail: it may not compare, hash
# or print such a value in full.
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: type(wrong).__name__)
def test_wrong_types(setting, wrong):
    with pytest.raises(TypeError, match="must be") as caught:
        setting.set(wrong)
    message = str(caught.value)
    assert "got " in message
    assert len(message) < 300
    assert "\n" not in message
    assert setting.get() == setting.default


def test_wrong_strings():
    for setting in (qm.allow_tf32, qm.check_finite):
        with pytest.raises(TypeError, match="must be True or False, got 'yes'"):
            setting("yes")
    for word in ("", "Basic", "fast" * 100):
        with pytest.raises(
            ValueError, match='must be "basic" or "optimized"'
        ) as caught:
            qm.use_kernels(word)
        assert len(str(caught.value)) < 300
    assert settings.snapshot() == ("optimized", False, True)


def test_a_subclass_of_str_is_a_string():
    class Words(StrEnum):
        BASIC = "basic"

    for word in (Words.BASIC, np.str_("basic")):
        with qm.use_kernels(word):
            # Not the subclass, which could behave differently.
            assert type(settings.implementation()) is str
            assert settings.implementation() == "basic"


def test_a_snapshot_is_restored_in_another_thread():
    with qm.use_kernels("basic"), qm.allow_tf32(), qm.check_finite(False):
        saved = settings.snapshot()
    assert saved == ("basic", True, False)
    assert hash(saved) == hash(("basic", True, False))

    # As torch's backward pass runs: in a thread that has settings of its own.
    def backward():
        qm.allow_tf32()
        before = settings.snapshot()
        with settings.restored(saved):
            inside = settings.snapshot()
            # Both changes are within the block, so its end undoes them.
            qm.use_kernels("optimized")
            with qm.check_finite(True):
                nested = settings.snapshot()
        return before, inside, nested, settings.snapshot()

    before = "optimized", True, True
    nested = "optimized", True, True
    assert in_a_thread(backward) == (before, saved, nested, before)


def test_a_snapshot_is_restored_within_a_block(setting):
    saved = settings.snapshot()
    with setting.set(setting.other):
        with settings.restored(saved):
            assert setting.get() == setting.default
        with pytest.raises(KeyError), settings.restored(saved):
            raise KeyError
        assert setting.get() == setting.other
    assert setting.get() == setting.default
