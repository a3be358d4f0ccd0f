"""The settings: blocks and statements, in threads, asyncio tasks and generators."""

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
    """One of the three: `set(value)` constructs it, `get()` reads what it holds."""

    def __init__(self, construct, get, default, other):
        self.set, self.get, self.default, self.other = construct, get, default, other


SETTINGS = {
    "use_kernels": (qm.use_kernels, settings.implementation, "optimized", "basic"),
    "allow_tf32": (qm.allow_tf32, settings.tf32_allowed, False, True),
    "check_finite": (qm.check_finite, settings.finite_checked, True, False),
}


def in_a_new_context(function):
    """Run a function where nothing is set, as in a new thread."""
    return contextvars.Context().run(function)


@pytest.fixture(params=SETTINGS)
def setting(request):
    return Setting(*SETTINGS[request.param])


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = settings.snapshot()
    yield
    assert settings.snapshot() == before


def in_a_thread(function, *args):
    """Return what a function returns in a thread of its own."""
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


def test_a_statement_holds_from_here_on(setting):
    def statements():
        setting.set(setting.other)
        assert setting.get() == setting.other
        with setting.set(setting.default):
            assert setting.get() == setting.default
        assert setting.get() == setting.other
        setting.set(setting.default)
        assert setting.get() == setting.default

    in_a_new_context(statements)


def test_a_block_takes_back_the_statements_inside(setting):
    with setting.set(setting.other):
        setting.set(setting.default)
        assert setting.get() == setting.default
        setting.set(setting.other)
        setting.set(setting.default)
    assert setting.get() == setting.default
    with setting.set(setting.default):
        setting.set(setting.other)
    assert setting.get() == setting.default


def test_a_block_takes_back_its_construction(setting):
    choice = setting.set(setting.other)
    assert setting.get() == setting.other
    with setting.set(setting.default):  # as functions of the library may do
        pass
    assert setting.get() == setting.other
    with choice:
        assert setting.get() == setting.other
    assert setting.get() == setting.default
    later = setting.set(setting.other)
    with choice:  # entered again, which leaves the construction of the other alone
        pass
    with later:
        assert setting.get() == setting.other
    assert setting.get() == setting.default


def test_a_statement_between_construction_and_block_stays(setting):
    def statements():
        choice = setting.set(setting.other)
        setting.set(setting.default)
        with choice:
            assert setting.get() == setting.other
        assert setting.get() == setting.default

        choice = setting.set(setting.default)
        setting.set(setting.other)
        with choice:
            assert setting.get() == setting.default
        assert setting.get() == setting.other

    in_a_new_context(statements)


def test_one_object_has_several_blocks(setting):
    choice = setting.set(setting.other)
    for _ in range(3):
        with choice:
            assert setting.get() == setting.other
        assert setting.get() == setting.default
    with choice:
        with setting.set(setting.default):
            with choice, choice:
                assert setting.get() == setting.other
            assert setting.get() == setting.default
        assert setting.get() == setting.other
    assert setting.get() == setting.default


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


def test_the_settings_do_not_touch_each_other():
    with qm.use_kernels("basic"):
        with qm.check_finite(False):
            assert settings.snapshot() == ("basic", False, False)
            with qm.allow_tf32():
                assert settings.snapshot() == ("basic", True, False)
        assert settings.snapshot() == ("basic", False, True)


def test_a_thread_starts_from_the_default(setting):
    with setting.set(setting.other):
        assert in_a_thread(setting.get) == setting.default
        inside = contextvars.copy_context()
    assert in_a_thread(inside.run, setting.get) == setting.other  # if it is taken along
    assert setting.get() == setting.default


def test_a_thread_leaves_nothing_behind(setting):
    def statement():
        setting.set(setting.other)
        return setting.get()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(statement).result() == setting.other
        assert pool.submit(setting.get).result() == setting.other  # it is one thread
        assert setting.get() == setting.default
    assert in_a_thread(setting.get) == setting.default


def test_threads_share_an_object(setting):
    """Each opens blocks of the same object, and all are inside at once."""
    choice, threads = setting.set(setting.other), 4
    together, seen = threading.Barrier(threads, timeout=30), []

    def blocks(number):
        values = []
        for turn in range(20):
            together.wait()
            with choice:
                together.wait()
                values.append(setting.get() == setting.other)
                with setting.set(setting.default):
                    together.wait()
                    values.append(setting.get() == setting.default)
                    if (number + turn) % 2:
                        with choice:
                            values.append(setting.get() == setting.other)
            values.append(setting.get() == setting.default)
        seen.extend(values)

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(blocks, number) for number in range(threads)]:
            done.result(timeout=60)
    assert len(seen) >= threads * 20 * 3
    assert all(seen)
    with choice:  # whose construction is still to be taken back here
        pass
    assert setting.get() == setting.default


def test_threads_are_inside_different_blocks(setting):
    inside, over = threading.Event(), threading.Event()

    def other():
        with setting.set(setting.other):
            inside.set()
            assert over.wait(30)
            return setting.get()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(other)
        assert inside.wait(30)
        with setting.set(setting.default):
            assert setting.get() == setting.default
        over.set()
        assert done.result(timeout=30) == setting.other


def test_tasks_take_turns_inside_their_blocks(setting):
    values = setting.default, setting.other
    choices = {}

    async def turns(value):
        seen = []
        for _ in range(5):
            with choices[value]:
                await asyncio.sleep(0)
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
        seen = await asyncio.gather(*(turns(value) for value in values * 3))
        assert setting.get() == setting.default
        return seen

    assert all(all(seen) for seen in asyncio.run(tasks()))


def test_a_task_starts_from_the_task_that_creates_it(setting):
    async def statement():
        seen = setting.get()
        setting.set(setting.default)
        return seen

    async def create():
        with setting.set(setting.other):
            task = asyncio.create_task(statement())
            assert await task == setting.other
            assert setting.get() == setting.other
            return await asyncio.to_thread(setting.get)

    assert asyncio.run(create()) == setting.other
    assert setting.get() == setting.default


def test_generators_close_their_blocks_in_any_order(setting):
    def block(value):
        with setting.set(value):
            yield setting.get()

    for first_closed in (0, 1):
        both = block(setting.other), block(setting.default)
        assert [next(each) for each in both] == [setting.other, setting.default]
        both[first_closed].close()
        still_open = (setting.default, setting.other)[first_closed]
        assert setting.get() == still_open
        both[1 - first_closed].close()
        assert setting.get() == setting.default


def test_a_block_that_ends_elsewhere_changes_nothing_there(setting):
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


def test_statements_do_not_pile_up(setting):
    def statements():
        seen = []
        for _ in range(100):
            seen.append(weakref.ref(setting.set(setting.other)))
            with setting.set(setting.default):
                pass
        return sum(each() is not None for each in seen)

    assert in_a_new_context(statements) <= 2


class Weird:
    """It is equal to everything, has no hash, and fails when it is printed."""

    __hash__ = None

    def __eq__(self, other):
        return True

    def __repr__(self):
        raise RuntimeError


WRONG = [None, 1, 0.0, [], {}, np.True_, np.ones((40, 40)), Weird(), b"basic", bool]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: type(wrong).__name__)
def test_wrong_types(setting, wrong):
    with pytest.raises(TypeError, match="must be") as caught:
        setting.set(wrong)
    message = str(caught.value)
    assert "got " in message
    assert len(message) < 300
    assert "\n" not in message
    assert setting.get() == setting.default


def test_wrong_words():
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


def test_a_word_of_an_enumeration_is_a_word():
    class Words(StrEnum):
        BASIC = "basic"

    for word in (Words.BASIC, np.str_("basic")):
        with qm.use_kernels(word):
            assert type(settings.implementation()) is str
            assert settings.implementation() == "basic"


def test_a_snapshot_is_restored_in_another_thread():
    with qm.use_kernels("basic"), qm.allow_tf32(), qm.check_finite(False):
        kept = settings.snapshot()
    assert kept == ("basic", True, False)
    assert hash(kept) == hash(("basic", True, False))

    def backward():
        qm.allow_tf32()
        before = settings.snapshot()
        with settings.restored(kept):
            inside = settings.snapshot()
            qm.use_kernels("optimized")
            with qm.check_finite(True):
                nested = settings.snapshot()
        return before, inside, nested, settings.snapshot()

    before = "optimized", True, True
    nested = "optimized", True, True
    assert in_a_thread(backward) == (before, kept, nested, before)


def test_a_snapshot_is_restored_within_a_block(setting):
    kept = settings.snapshot()
    with setting.set(setting.other):
        with settings.restored(kept):
            assert setting.get() == setting.default
        with pytest.raises(KeyError), settings.restored(kept):
            raise KeyError
        assert setting.get() == setting.other
    assert setting.get() == setting.default
