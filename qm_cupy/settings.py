"""The three settings: which kernels run, whether TF32 is allowed, and finite checks.

Each is a context variable: what one thread or asyncio task sets, no other sees.
"""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, NamedTuple

Implementation = Literal["basic", "optimized"]
Snapshot = tuple[Implementation, bool, bool]


class _Undo(NamedTuple):
    """What the end of a block brings back."""

    setting: "_Setting"
    """The object whose block it is."""
    value: Any
    """The value before its construction, or before it was entered again."""
    unused: "_Undo | None"
    """The `unused` of the state at that time."""


class _State(NamedTuple):
    """What a context variable holds. Immutable: contexts share it and never write."""

    value: Any
    blocks: tuple[_Undo, ...] = ()
    """The open blocks of this context, the innermost last."""
    unused: _Undo | None = None
    """Of the object that was constructed last, until it is entered."""


def _variable(name: str, default: Any) -> ContextVar[_State]:
    start = _State(default)
    return ContextVar(name, default=start)


class _Setting:
    """A value from the construction on, or within a ``with``.

    Blocks are recorded in the context and not in the object, so that threads can use
    one object at once, each with its own blocks.
    """

    _state: ClassVar[ContextVar[_State]]

    def __init__(self, value: Any) -> None:
        self._value = value
        now = self._state.get()
        unused = now.unused
        if unused is not None and unused.unused is not None:
            # Two objects at most: a statement that is repeated must not pile them up.
            unused = unused._replace(unused=None)
        undo = _Undo(self, now.value, unused)
        self._state.set(_State(value, now.blocks, undo))

    def __enter__(self) -> None:
        """Keep the value until the end of the ``with``."""
        now = self._state.get()
        if now.unused is not None and now.unused.setting is self:
            undo = now.unused
        else:  # it is entered again, or not where it was constructed
            undo = _Undo(self, now.value, now.unused)
        self._state.set(_State(self._value, (*now.blocks, undo)))

    def __exit__(self, *exception: object) -> None:
        """Go back to the value before."""
        now = self._state.get()
        places = [i for i, undo in enumerate(now.blocks) if undo.setting is self]
        if places:
            last = places[-1]
            undo = now.blocks[last]
            outer, inner = now.blocks[:last], now.blocks[last + 1 :]
        elif now.unused is not None and now.unused.setting is self:
            undo = now.unused
            outer, inner = now.blocks, ()
        else:
            return  # the block was opened in another context
        if not inner:
            self._state.set(_State(undo.value, outer, undo.unused))
            return
        # Generators may close blocks in any order: an inner block that is still open
        # takes over what this one would have brought back.
        heir = undo._replace(setting=inner[0].setting)
        self._state.set(now._replace(blocks=(*outer, heir, *inner[1:])))


class use_kernels(_Setting):  # noqa: N801
    """Choose the kernels that run: ``"optimized"`` (the default) or ``"basic"``.

    Parameters
    ----------
    implementation : {"basic", "optimized"}
        ``"basic"`` is one thread, one output: slow, plain, and the cross-check.

    Raises
    ------
    TypeError
        If it is not a string.
    ValueError
        If it is another word.

    Notes
    -----
    The choice holds from the construction on, in this thread or asyncio task only. In a
    ``with`` it holds within the block, and the choice before the construction comes
    back. A new thread starts from the default, even inside a block; a new asyncio task
    starts from the choice of the task that creates it. To give a thread your choice,
    set it there, or run the thread's function by ``contextvars.copy_context().run``.

    Examples
    --------
    >>> with use_kernels("basic"):  # within the block, and only there
    ...     ...
    Ellipsis
    >>> choice = use_kernels("optimized")  # from here on
    """

    _state = _variable("use_kernels", "optimized")

    def __init__(self, implementation: Implementation) -> None:
        wanted = '`implementation` must be "basic" or "optimized", '
        if not isinstance(implementation, str):
            raise TypeError(f"{wanted}got {_shown(implementation)}")
        if implementation not in ("basic", "optimized"):
            raise ValueError(f"{wanted}got {_shown(implementation)}")
        super().__init__("basic" if implementation == "basic" else "optimized")


class allow_tf32(_Setting):  # noqa: N801
    """Let the optimized kernels multiply float32 as TF32 on tensor cores, or not.

    TF32 keeps 11 significant bits of every factor; sums stay float32. It is off unless
    it is allowed, and needs a GPU of sm_80 (Ampere) or later.

    Parameters
    ----------
    enabled : bool, default True
        Whether TF32 is allowed.

    Raises
    ------
    TypeError
        If it is no bool.

    Notes
    -----
    A sum of products changes by at most 2⁻⁹ of the sum of their magnitudes. float64,
    products of 16-bit tokens and the basic kernels stay as they are. What changes:

    - Cosine similarities, by at most 2⁻⁹ = 0.002, and near ties between them.
    - Scores of `query_key_entropy` and `self_attention_entropy`, by at most
      e = 2⁻⁹ · scale · Σ|q_d k_d|. An entropy then changes by at most
      e √(1 + ¼ ln² N) [1]_, where e is the largest of its row: by 0.005 for normal
      tokens at N = 257, D = 64. Gradients changed by 0.3 % of their largest entry.
    - The linear maps of priors, whatever dtype the tokens have. The hidden layer of an
      `MLPPrior` stays float32, because the signs of its sums decide which units a
      gradient passes. So gradients of `alignment_loss` are those of the float32
      network, to 0.3 % of their largest entry. A prediction of a `TransformerPrior`
      of one block changed by 0.002.

    The setting belongs to this thread or asyncio task, as that of `use_kernels` does. A
    new thread starts without TF32.

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
    >>> choice = allow_tf32(False)  # from here on
    """

    _state = _variable("allow_tf32", False)

    def __init__(self, enabled: bool = True) -> None:
        super().__init__(_bool(enabled))


class check_finite(_Setting):  # noqa: N801
    """Search inputs for NaN and Inf, or not.

    Parameters
    ----------
    enabled : bool
        Whether inputs are searched, for negative weights too. They are by default,
        with one pass over each; CUDA arrays never, as the CPU would have to wait.

    Raises
    ------
    TypeError
        If it is not a bool.

    Notes
    -----
    The setting belongs to this thread or asyncio task, as that of `use_kernels` does. A
    new thread starts with the search.

    Examples
    --------
    >>> import numpy as np, qm_cupy
    >>> with qm_cupy.check_finite(False):  # within the block, and only there
    ...     qm_cupy.norm_saliency(np.array([[1.0], [3.0], [2.0]]))
    array([0. , 1. , 0.5])
    >>> choice = qm_cupy.check_finite(True)  # from here on
    """

    _state = _variable("check_finite", True)

    def __init__(self, enabled: bool) -> None:
        super().__init__(_bool(enabled))


def implementation() -> Implementation:
    """Return which kernels run now.

    Returns
    -------
    {"basic", "optimized"}
        The folder of ``kernels/`` that launches take.
    """
    return use_kernels._state.get().value


def tf32_allowed() -> bool:
    """Return whether float32 may be multiplied as TF32 now.

    Returns
    -------
    bool
        As `allow_tf32` set it.
    """
    return allow_tf32._state.get().value


def finite_checked() -> bool:
    """Return whether inputs are searched for NaN and Inf now.

    Returns
    -------
    bool
        As `check_finite` set it.
    """
    return check_finite._state.get().value


def snapshot() -> Snapshot:
    """Return the values of all three settings.

    Returns
    -------
    tuple
        Hashable; what `restored` takes, in any thread.
    """
    return implementation(), tf32_allowed(), finite_checked()


@contextmanager
def restored(values: Snapshot) -> Iterator[None]:
    """Run a block with the settings of a snapshot, in a thread of autograd for one.

    Parameters
    ----------
    values : tuple
        What `snapshot` returned.
    """
    variables = use_kernels._state, allow_tf32._state, check_finite._state
    before = [variable.get() for variable in variables]
    for variable, value in zip(variables, values, strict=True):
        variable.set(_State(value))
    try:
        yield
    finally:
        for variable, state in zip(variables, before, strict=True):
            variable.set(state)


def _bool(enabled: bool) -> bool:
    if type(enabled) is not bool:
        raise TypeError(f"`enabled` must be True or False, got {_shown(enabled)}")
    return enabled


def _shown(x: object) -> str:
    """Return a short `repr` in one line, even of objects whose own `repr` fails."""
    return " ".join(reprlib.repr(x).split())
