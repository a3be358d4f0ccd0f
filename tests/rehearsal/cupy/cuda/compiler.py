"""The error of a kernel that does not compile."""

from typing import Any

__all__ = ["CompileException"]


class CompileException(Exception):  # noqa: N818
    """A failed compilation, with the compiler's log."""

    def __init__(
        self, msg: str, source: str, name: str, options: Any, backend: str = "nvrtc"
    ) -> None:
        self._msg = msg  # the log
        self.source = source
        self.name = name
        self.options = options
        self.backend = backend
        super().__init__()

    def __str__(self) -> str:
        return self._msg
