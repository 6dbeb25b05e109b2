"""A progress bar on standard error, so that standard output carries results only."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def progress_bar(items: Sequence[Item], title: str, shown: bool) -> Iterator[Item]:
    """`items`, with a bar that names them `title` when `shown` and somebody looks: a file gets no trace of it."""
    console = Console(stderr=True)
    yield from track(items, title, disable=not (shown and console.is_terminal), console=console, transient=True)
