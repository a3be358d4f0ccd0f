"""The three settings: which kernels run, whether TF32 is allowed, and finite checks.

Each setting is a context variable. A value that is set in one thread or asyncio task
does not change the value in any other.
"""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, NamedTuple

Implementation = Literal["basic", "optimized"]
Snapshot = tuple[Implementation, bool, bool]  # kernels, TF32 allowed, finite checks

# `use_kernels("basic")` sets the value when it is constructed, so that the plain
# statement works. `with use_kernels("basic"):` constructs the same object and then
# enters it. The context therefore remembers the object that was constructed last. If
# this object is entered next, its block restores the value before the construction.


class _Undo(NamedTuple):
    """The values that the end of a ``with`` block restores."""

    setting: "_Setting"
    """The object that opened the block."""
    value: Any
    """The value before the object was constructed, or before it was entered again."""
    unused: "_Undo | None"
    """The field `unused` of the state at that time."""


class _State(NamedTuple):
    """The value of a context variable.

    It is immutable, because a copied context refers to the same object.
    """

    value: Any
    """The current value of the setting."""
    blocks: tuple[_Undo, ...] = ()
    """The open blocks of this context, the innermost last."""
    unused: _Undo | None = None
    """The undo record of the object that was constructed last, until it is entered.

    ``with use_kernels("basic"):`` first constructs and then enters. The end of the
    block must restore the value before the construction.
    """


def _variable(name: str, default: Any) -> ContextVar[_State]:
    start = _State(default)
    return ContextVar(name, default=start)


class _Setting:
    """Set a value from the construction on, or within a ``with`` block.

    Open blocks are recorded in the context and not in the object. Several threads can
    therefore use one object at the same time, each with its own blocks.
    """

    _state: ClassVar[ContextVar[_State]]

    def __init__(self, value: Any) -> None:
        self._value = value
        now = self._state.get()
        unused = now.unused
        if unused is not None and unused.unused is not None:
            # Keep two records at most. Otherwise a statement that a loop repeats, such
            # as `use_kernels("basic")`, would make the chain longer each time.
            unused = unused._replace(unused=None)
        undo = _Undo(self, now.value, unused)
        self._state.set(_State(value, now.blocks, undo))  # valid from now on

    def __enter__(self) -> None:
        """Keep the value until the end of the ``with``."""
        now = self._state.get()
        if now.unused is not None and now.unused.setting is self:
            undo = now.unused
        else:  # it is entered again, or in another context than it was constructed in
            undo = _Undo(self, now.value, now.unused)
        self._state.set(_State(self._value, (*now.blocks, undo)))

    def __exit__(self, *exception: object) -> None:
        """Restore the value from before the block."""
        now = self._state.get()
        positions = [i for i, undo in enumerate(now.blocks) if undo.setting is self]
        if positions:
            last = positions[-1]  # the innermost block of this object
            undo = now.blocks[last]
            outer, inner = now.blocks[:last], now.blocks[last + 1 :]
        elif now.unused is not None and now.unused.setting is self:
            undo = now.unused  # constructed in this context, but not entered in it
            outer, inner = now.blocks, ()
        else:
            return  # the block was opened in another context
        if not inner:  # the usual case: this is the innermost open block
            self._state.set(_State(undo.value, outer, undo.unused))
            return
        # Generators may close blocks in any order. If an inner block is still open, its
        # value stays, and its own end later restores the value of this block.
        heir = undo._replace(setting=inner[0].setting)
        self._state.set(now._replace(blocks=(*outer, heir, *inner[1:])))


# The settings are classes with names like functions, because users call them as
# statements and also open `with` blocks with them.
class use_kernels(_Setting):  # noqa: N801
    """Select the kernels that run: ``"optimized"`` (the default) or ``"basic"``.

    Parameters
    ----------
    implementation : {"basic", "optimized"}
        In the ``"basic"`` kernels one thread computes one output. They are slow and
        simple, and results of the optimized kernels are checked against them.

    Raises
    ------
    TypeError
        If `implementation` is not a string.
    ValueError
        If `implementation` is another string.

    Notes
    -----
    The setting applies from the construction on, in this thread or asyncio task only.
    In a ``with`` statement it applies within the block; the end of the block restores
    the value from before the construction. A new thread starts with the default, even
    inside a block. A new asyncio task starts with the value of the task that creates
    it. To use your value in a thread, set it in that thread, or run the thread's
    function by ``contextvars.copy_context().run``.

    Examples
    --------
    >>> with use_kernels("basic"):  # within the block, and only there
    ...     ...
    Ellipsis
    >>> setting = use_kernels("optimized")  # from here on
    """

    _state = _variable("use_kernels", "optimized")

    def __init__(self, implementation: Implementation) -> None:
        # TypeError first: `in` compares, and an object may be equal to everything.
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
    A sum of products changes by at most 2⁻⁹ of the sum of their magnitudes. Results for
    float64, products of 16-bit tokens, and the basic kernels do not change. These
    results change:

    - Cosine similarities, by at most 2⁻⁹ = 0.002, and near ties between them.
    - Scores of `query_key_entropy` and `self_attention_entropy`, by at most
      e = 2⁻⁹ · scale · Σ|q_d k_d|. An entropy then changes by at most
      e √(1 + ¼ ln² N) [1]_, where e is the largest of its row: by 0.005 for normal
      tokens at N = 257, D = 64. Gradients changed by 0.3 % of their largest entry.
    - The linear maps of priors, for every dtype of the tokens. The hidden layer of an
      `MLPPrior` stays float32, because the signs of its sums determine which units a
      gradient passes through. Therefore gradients of `alignment_loss` are those of the
      float32 network, to 0.3 % of their largest entry. A prediction of a
      `TransformerPrior` of one block changed by 0.002.

    The setting applies to this thread or asyncio task only, as in `use_kernels`. A new
    thread starts without TF32.

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

    # Off by default, because TF32 keeps fewer significant bits than float32.
    _state = _variable("allow_tf32", False)

    def __init__(self, enabled: bool = True) -> None:
        super().__init__(_bool(enabled))


class check_finite(_Setting):  # noqa: N801
    """Search inputs for NaN and Inf, or skip the search.

    Parameters
    ----------
    enabled : bool
        Whether inputs are searched for NaN and Inf, and weights for negative values. By
        default they are, with one pass over each array. CUDA arrays are never searched,
        because the CPU would have to wait for the GPU.

    Raises
    ------
    TypeError
        If `enabled` is not a bool.

    Notes
    -----
    The setting applies to this thread or asyncio task only, as in `use_kernels`. A new
    thread starts with the search enabled.

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

    A backward needs it, because autograd runs it in threads with default settings.

    Parameters
    ----------
    values : tuple
        The result of `snapshot`.
    """
    variables = use_kernels._state, allow_tf32._state, check_finite._state
    # The states are immutable, so that they can be set again at the end.
    before = [variable.get() for variable in variables]
    for variable, value in zip(variables, values, strict=True):
        variable.set(_State(value))  # without open blocks: these belong to `before`
    try:
        yield
    finally:
        for variable, state in zip(variables, before, strict=True):
            variable.set(state)


def _bool(enabled: bool) -> bool:
    """Return `enabled`; raise if it is not a bool. 0 and 1 are likely mistakes."""
    if type(enabled) is not bool:
        raise TypeError(f"`enabled` must be True or False, got {_shown(enabled)}")
    return enabled


def _shown(x: object) -> str:
    """Return a short `repr` on one line, even for objects whose own `repr` fails."""
    return " ".join(reprlib.repr(x).split())
