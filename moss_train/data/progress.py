"""A progress bar on standard error, so that standard output carries results only."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def progress_bar(items: Sequence[Item], title: str, shown: bool) -> Iterator[Item]:
    """`items`, with a bar that names them `title` when `shown`."""
    yield from track(items, title, disable=not shown, console=Console(stderr=True), transient=True)
