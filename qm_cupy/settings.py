"""The three settings: which kernels run, whether TF32 is allowed, and finite checks.

Each setting is a context variable. A value that is set in one Python thread or asyncio
task does not change the value in any other.
"""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, NamedTuple

Implementation = Literal["basic", "optimized"]
Snapshot = tuple[Implementation, bool, bool]  # kernels, TF32 allowed, finite checks

# `use_kernels("basic")` sets the value when it constructs the object, so that a
# statement without `with` works. `with use_kernels("basic"):` also constructs the
# object first. Python then calls `__enter__`, when the value is already "basic". The
# end of the block must restore the value from before the construction. The context
# therefore records that value, together with the object that was constructed last.


class _Undo(NamedTuple):
    """The values that the end of a ``with`` block restores."""

    setting: "_Setting"
    """The object whose block restores the values, even if it is not entered yet."""
    value: Any
    """The value before the construction, or before `__enter__` if no record is left."""
    not_entered: "_Undo | None"
    """The record `_State.not_entered` that was replaced together with the value.

    The end of the block restores this record. Example::

        s = use_kernels("basic")        # constructed, but not entered
        with use_kernels("optimized"):  # constructs another object, after s
            ...
        with s:                         # its end restores the value from before line 1
            ...

    The end of the first block restores the record of s, which the second block needs.
    """


class _State(NamedTuple):
    """The value of a context variable.

    It is immutable, because a copied context refers to the same object.
    """

    value: Any
    """The current value of the setting."""
    blocks: tuple[_Undo, ...] = ()
    """The open blocks of this context, the innermost last."""
    not_entered: _Undo | None = None
    """The record of the object that was constructed last, until it is entered."""


def _variable(name: str, default: Any) -> ContextVar[_State]:
    """Return a context variable, which has the default in every new thread."""
    start = _State(default)
    return ContextVar(name, default=start)


class _Setting:
    """Set a value from the construction on, or within a ``with`` block.

    The context, not the object, records which blocks are open. Several threads can
    therefore use one object at the same time, each with its own blocks.
    """

    _state: ClassVar[ContextVar[_State]]

    def __init__(self, value: Any) -> None:
        self._value = value
        now = self._state.get()
        not_entered = now.not_entered
        if not_entered is not None and not_entered.not_entered is not None:
            # Keep at most two records. Each record refers to the one before it. A
            # statement in a loop, such as `use_kernels("basic")`, would otherwise make
            # this chain longer with every repetition.
            not_entered = not_entered._replace(not_entered=None)
        undo = _Undo(self, now.value, not_entered)
        self._state.set(_State(value, now.blocks, undo))

    def __enter__(self) -> None:
        """Keep the value until the end of the ``with``."""
        now = self._state.get()
        if now.not_entered is not None and now.not_entered.setting is self:
            undo = now.not_entered
        else:
            # The object has been entered before, another object was constructed after
            # it, or it was constructed in another context.
            undo = _Undo(self, now.value, now.not_entered)
        self._state.set(_State(self._value, (*now.blocks, undo)))

    def __exit__(self, *exception: object) -> None:
        """Restore the value from before the block."""
        now = self._state.get()
        positions = [i for i, undo in enumerate(now.blocks) if undo.setting is self]
        if positions:
            last = positions[-1]  # the innermost block of this object
            undo = now.blocks[last]
            outer, inner = now.blocks[:last], now.blocks[last + 1 :]
        elif now.not_entered is not None and now.not_entered.setting is self:
            # Constructed in this context, but entered in another one, for example in a
            # copy of this context: restore the value from before the construction.
            undo = now.not_entered
            outer, inner = now.blocks, ()
        else:
            # The object was neither constructed nor entered in this context: there is
            # no value to restore.
            return
        if not inner:  # the usual case: this is the innermost open block
            self._state.set(_State(undo.value, outer, undo.not_entered))
            return
        # Generators may close blocks in any order. If a block inside this one is still
        # open, the current value stays. The inner block takes over the record of this
        # outer block: when the inner block ends, it restores the value from before the
        # outer block.
        taken_over = undo._replace(setting=inner[0].setting)
        self._state.set(now._replace(blocks=(*outer, taken_over, *inner[1:])))


# The settings are classes with names like functions, because users call them as
# statements and also open `with` blocks with them.
class use_kernels(_Setting):  # noqa: N801
    """Select the kernels that run: ``"optimized"`` (the default) or ``"basic"``.

    Parameters
    ----------
    implementation : {"basic", "optimized"}
        In most ``"basic"`` kernels one GPU thread computes one output. These kernels
        are slow and simple. Tests compare the optimized kernels with them.

    Raises
    ------
    TypeError
        If `implementation` is not a string.
    ValueError
        If `implementation` is another string.

    Notes
    -----
    The setting applies from the construction on, in this Python thread or asyncio task
    only. In a ``with`` statement it applies within the block; the end of the block
    restores the value from before the construction. A new thread starts with the
    default, even if a block is open where it starts. A new asyncio task starts with the
    value of the task that creates it. To use your value in a thread, set it in that
    thread, or run the thread's function by ``contextvars.copy_context().run``.

    Examples
    --------
    >>> with use_kernels("basic"):  # within the block, and only there
    ...     ...
    Ellipsis
    >>> setting = use_kernels("optimized")  # from here on
    """

    _state = _variable("use_kernels", "optimized")

    def __init__(self, implementation: Implementation) -> None:
        # Check the type first: `in` uses `==`, and an object of another type may define
        # `==` to be always True.
        wanted = '`implementation` must be "basic" or "optimized", '
        if not isinstance(implementation, str):
            raise TypeError(f"{wanted}got {_shown(implementation)}")
        if implementation not in ("basic", "optimized"):
            raise ValueError(f"{wanted}got {_shown(implementation)}")
        # Store a plain string, even if the argument is of a subclass of `str`.
        super().__init__("basic" if implementation == "basic" else "optimized")


class allow_tf32(_Setting):  # noqa: N801
    """Allow the optimized kernels to multiply float32 as TF32 on tensor cores.

    TF32 keeps 11 significant bits of every factor; sums stay float32. TF32 is not
    allowed by default, and it needs a GPU of sm_80 (Ampere) or later.

    Parameters
    ----------
    enabled : bool, default True
        Whether TF32 is allowed.

    Raises
    ------
    TypeError
        If `enabled` is not a bool.

    Notes
    -----
    A tensor core ignores the last 13 of the 24 bits of each float32 factor, so a factor
    changes by less than 2⁻¹⁰ of its value. A product has two factors, so a sum of
    products changes by at most 2⁻⁹ of the sum of their magnitudes. Results for float64,
    products of 16-bit tokens, and the basic kernels do not change. These results
    change:

    - Cosine similarities change by at most 2⁻⁹ = 0.002. The order of two almost equal
      similarities can therefore change.
    - Scores of queries, keys and hidden states change by at most
      2⁻⁹ · scale · Σ|q_d k_d|, where `scale` is the factor of the scores, by default
      1/√d for width d. An entropy then changes by at most e √(1 + ¼ ln² N) [1]_, where
      e is the largest change of a score in its row. For normally distributed tokens
      with N = 257 and D = 64, the measured change of the entropies is 0.005, and that
      of the gradients 0.3 % of their largest entry. The mean attention of a token
      (`attention_received`) changes by at most a factor of exp(2e), with the largest e
      of all rows.
    - The linear maps of priors change for 16-bit and float32 tokens, because priors
      compute both in float32. The hidden layer of an `MLPPrior` stays float32, because
      the signs of its sums determine which units a gradient passes through. Therefore
      gradients of `alignment_loss` are those of the float32 network, to 0.3 % of their
      largest entry. The measured change of a prediction of a `TransformerPrior` with
      one transformer block is 0.002.

    The setting applies to this Python thread or asyncio task only, as in `use_kernels`.
    A new thread starts without TF32.

    References
    ----------
    .. [1] D. Reeb and M. M. Wolf, "Tight bound on relative entropy by entropy
       difference", IEEE Trans. Inf. Theory 61(3), 2015, arXiv:1304.0036: the variance
       of log p is at most 1 + ¼ ln² (N - 1).

    Examples
    --------
    >>> with allow_tf32():  # within the block, and only there
    ...     ...
    Ellipsis
    >>> setting = allow_tf32(False)  # from here on
    """

    _state = _variable("allow_tf32", False)

    def __init__(self, enabled: bool = True) -> None:
        super().__init__(_bool(enabled))


class check_finite(_Setting):  # noqa: N801
    """Search inputs for NaN and Inf, or skip the search.

    Parameters
    ----------
    enabled : bool
        Whether inputs are searched for NaN and Inf, and weights for negative values. By
        default they are searched, with one pass over each array. CUDA arrays are never
        searched, because the CPU would have to wait for the GPU.

    Raises
    ------
    TypeError
        If `enabled` is not a bool.

    Notes
    -----
    The setting applies to this Python thread or asyncio task only, as in `use_kernels`.
    A new thread starts with the search enabled.

    Examples
    --------
    >>> import numpy as np, qm_cupy
    >>> with qm_cupy.check_finite(False):  # within the block, and only there
    ...     qm_cupy.norm_saliency(np.array([[1.0], [3.0], [2.0]]))
    array([0. , 1. , 0.5])
    >>> setting = qm_cupy.check_finite(True)  # from here on
    """

    _state = _variable("check_finite", True)

    def __init__(self, enabled: bool) -> None:
        super().__init__(_bool(enabled))


def implementation() -> Implementation:
    """Return the current value of `use_kernels`.

    Returns
    -------
    {"basic", "optimized"}
        The folder of ``kernels/`` whose kernels are launched.
    """
    return use_kernels._state.get().value


def tf32_allowed() -> bool:
    """Return whether float32 may be multiplied as TF32 now.

    Returns
    -------
    bool
        The current value of `allow_tf32`.
    """
    return allow_tf32._state.get().value


def finite_checked() -> bool:
    """Return whether inputs are searched for NaN and Inf now.

    Returns
    -------
    bool
        The current value of `check_finite`.
    """
    return check_finite._state.get().value


def snapshot() -> Snapshot:
    """Return the values of all three settings.

    Returns
    -------
    tuple
        The argument of `restored`, in any thread. It is hashable, because JAX needs
        hashable static arguments.
    """
    return implementation(), tf32_allowed(), finite_checked()


@contextmanager
def restored(values: Snapshot) -> Iterator[None]:
    """Run a block with the settings of a snapshot.

    A backward pass needs it, because the settings may have other values where it runs.
    For arrays on a GPU, autograd runs it in threads of its own, in which the settings
    have their defaults.

    Parameters
    ----------
    values : tuple
        The result of `snapshot`.
    """
    variables = use_kernels._state, allow_tf32._state, check_finite._state
    # The states are immutable, so the same objects can be set again at the end.
    before = [variable.get() for variable in variables]
    for variable, value in zip(variables, values, strict=True):
        # The new state has no open blocks, so code in this block cannot close a block
        # of the caller.
        variable.set(_State(value))
    try:
        yield
    finally:
        for variable, state in zip(variables, before, strict=True):
            variable.set(state)


def _bool(enabled: bool) -> bool:
    """Return `enabled`; raise if it is not a bool, because 0 and 1 may be mistakes."""
    if type(enabled) is not bool:
        raise TypeError(f"`enabled` must be True or False, got {_shown(enabled)}")
    return enabled


def _shown(x: object) -> str:
    """Return a short `repr` on one line, even of an object whose own `repr` raises."""
    return " ".join(reprlib.repr(x).split())
