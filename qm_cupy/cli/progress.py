"""A progress bar for terminals, by tqdm."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 1.0  # seconds until the bar appears; shorter work needs no bar
INTERVAL = 0.1  # seconds between two states of the bar


@contextmanager
def progress(total: int, unit: str = "tokens") -> Iterator[Callable[[float], None]]:
    """Yield a function that draws a bar: its argument says how much is finished.

    The bar appears if the standard error is a terminal, the work takes longer than
    `PATIENCE`, and tqdm is installed.
    """
    # A file or a pipe must not contain control characters.
    shown = sys.stderr.isatty()
    if shown:
        try:
            from tqdm import tqdm
        except ImportError:
            shown = False
    if not shown:
        yield lambda done: None
        return
    tqdm.monitor_interval = 0  # without a thread of its own
    with tqdm(
        total=total,
        unit=f" {unit}",
        unit_scale=True,
        delay=PATIENCE,
        mininterval=INTERVAL,
        # A terminal without a size, as some programs make it, gets a usual line.
        ncols=shutil.get_terminal_size().columns - 1,
        miniters=0,  # draw by time alone: steps differ in length
        leave=False,
        file=sys.stderr,
    ) as bar:
        yield lambda done: bar.update(done - bar.n)
