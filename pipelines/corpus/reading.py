"""How a source is read, what reading gives, and the one boundary that no fault of a file passes."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from core.text.parsing import ParseLimits
from pipelines.corpus.files import unreadable

T = TypeVar("T")


class Reading(ParseLimits):
    """How a source is read: the limits of one document, the fields of lines and rows. name_field: None is `id`, else `name`."""

    text_field: str = "text"
    title_field: str = "title"
    name_field: str | None = None

    @property
    def name_fields(self) -> tuple[str, ...]:
        return ("id", "name") if self.name_field is None else (self.name_field,)


class Read(NamedTuple):
    """What one file, line or row gave: a text, or a reason. source_bytes: its share of the file's size."""

    name: str
    title: str
    text: str | None
    reason: str | None
    source_bytes: int


def attempt(make: Callable[[], T]) -> T | Exception:
    """What a call returns, or the exception that it raised.

    Any exception, whatever its kind: files come from anywhere, and the libraries that open them raise what they please on bytes
    that nobody foresaw (Arrow a KeyError, a date an OverflowError, fsspec's file systems their services' own). Each is the reject
    of the file or row that it was raised over, with its words as the reason: one file in a million must not end the run.
    Interrupts pass. Only for reading a file or a row of it.
    """
    try:
        return make()
    except Exception as error:
        return error


def row(read: Read, make: Callable[[], Read]) -> Read:
    """What a row gives, or its reject. read: the row's name and size."""
    made = attempt(make)
    if isinstance(made, UnicodeDecodeError):
        return read._replace(reason=f"not UTF-8: byte {made.start} of a field")
    return read._replace(reason=unreadable(made)) if isinstance(made, Exception) else made
