"""A progress bar for terminals, by tqdm."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 1.0  # seconds until the bar appears; shorter work needs no bar


@contextmanager
def progress(total: int, unit: str = "tokens") -> Iterator[Callable[[float], None]]:
    """Yield a function that draws a bar: its argument says how much is finished.

    The bar appears if the standard error is a terminal, the work takes longer than
    `PATIENCE`, and tqdm is installed.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    # A file or a pipe must not contain control characters.
    if tqdm is None or sys.stderr is None or not sys.stderr.isatty():
        yield lambda done: None
        return
    tqdm.monitor_interval = 0  # without a thread
    with tqdm(
        total=total, unit=f" {unit}", unit_scale=True, delay=PATIENCE, leave=False
    ) as bar:
        yield lambda done: bar.update(done - bar.n)
