"""How commands speak to a person: one console, one way to say what went wrong."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer
from rich import box
from rich.console import Console
from rich.table import Table

console = Console()
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


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


def framed(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def size(count: float) -> str:
    """Bytes with three digits: 43.6 MB, 87.3 TB."""
    for unit in _UNITS:
        if count < 999.5 or unit == _UNITS[-1]:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    raise AssertionError


def amount(value: float) -> str:
    """A number with three digits at least: 0.0123, 4.02, 1,235."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
