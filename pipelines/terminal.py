"""How commands speak to a person: one console, one way to say what went wrong."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

console = Console()


@contextmanager
def told() -> Iterator[None]:
    """Turns what a user can mend into one line; everything else keeps its traceback."""
    try:
        yield
    except ValueError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def say(lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
