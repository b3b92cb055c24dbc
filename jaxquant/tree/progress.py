"""Progress of long operations: a bar on standard error, or the caller's function."""

import contextlib
from collections.abc import Callable, Iterator

# Steps done, steps in total (None if unknown), and the name of the last step.
Progress = Callable[[int, int | None, str], None]


def check_progress(progress: object) -> None:
    """Checks the argument of `progress_bar`, for functions that compute before they show it.

    Raises:
        ValueError: it is neither True, False, None nor a function.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise ValueError(
            "progress must be True for a bar, a function of (done, total, what), or None; got "
            f"{progress!r}."
        )


@contextlib.contextmanager
def progress_bar(
    progress: Progress | bool | None, total: int | None, task: str = "Quantizing"
) -> Iterator[Progress]:
    """Yields the function to call after each step.

    Args:
        progress: True for a bar, a function to call instead, or None for neither.
        total: number of steps, or None if it is not known.
        task: text beside the bar until the first step is done.

    Raises:
        ValueError: as for `check_progress`.
    """
    check_progress(progress)
    if callable(progress):
        yield progress
    elif progress:
        with _bar(task, total) as update:
            yield update
    else:
        yield lambda done, total, what: None


@contextlib.contextmanager
def _bar(task, total):
    # rich is slow to import, and only a bar needs it.
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True) as bar:
        number = bar.add_task(task, total=total)
        yield lambda done, total, what: bar.update(
            number, completed=done, total=total, description=what
        )
