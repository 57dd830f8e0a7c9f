"""How often documents are asked for: counted where requests are answered, kept in the store, summed over all servers.

    <prefix>/demand/<yyyymmdd>-<uuid>.json    what one server process counted on one day (UTC)

In: the key of a document (tenant, collection, name) for each request that it answers. Out: the demand of a document: its requests
on the last `KEPT_DAYS` days, today's included, over all processes, as far as they have been written. An edit of the document's
text does not begin it anew; neither does a deletion. Knows nothing of requests and servers.

A counter is exact until it has seen `most_documents` on one day. Then it forgets the half that was asked for least, so that
its object stays below about 100 bytes (1.5 kB with the longest names) a document, and demand becomes a lower bound; how many
requests were forgotten stands in the object. A process that is killed loses what it has not written.

Cost: 1.5 us a request and about 200 bytes a document in memory. A write is one object, rewritten whole (0.3 s at 50,000
documents), a reading one listing and one object for each process and day. Objects older than `KEPT_DAYS` are removed by whichever
counter begins a day.
"""

import re
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.config import faults
from core.store.errors import CorruptObject, MissingObject
from core.store.objects import Objects

KEPT_DAYS = 30
FOLDER = "demand"
_NAME = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})-[0-9a-f]{32}\.json")

Key = tuple[str, str, str]


class _Asked(NamedTuple):
    """Requests of one document."""

    tenant: str
    collection: str
    name: str
    requests: Annotated[int, Field(ge=1)]


class _Counted(BaseModel):
    """An object: the requests of each document, and of those that were forgotten."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    forgotten: int = Field(default=0, ge=0)
    asked: tuple[_Asked, ...]


@dataclass
class _Tally:
    """What is counted on one day; `written` of its `total` requests stand in the object."""

    day: date
    name: str = field(init=False)
    requests: Counter[Key] = field(default_factory=Counter)
    forgotten: int = 0
    total: int = 0
    written: int = 0

    def __post_init__(self) -> None:
        self.name = f"{FOLDER}/{self.day:%Y%m%d}-{uuid.uuid4().hex}.json"


class DemandCounter:
    """Counts for one process. Any thread may call `count`, which never waits for storage, and `write`, which does."""

    def __init__(self, most_documents: int = 50_000) -> None:
        if most_documents < 2:
            raise ValueError(f"most_documents is {most_documents}: give 2 or more")
        self._most = most_documents
        self._tally = _Tally(_today())
        self._unwritten: list[_Tally] = []
        self._swept: date | None = None
        self._counting = threading.Lock()
        self._writing = threading.Lock()

    def count(self, key: Key, requests: int = 1) -> None:
        """So many more requests for a document."""
        with self._counting:
            tally = self._tally
            tally.requests[key] += requests
            tally.total += requests
            if len(tally.requests) > self._most:
                kept = Counter(dict(tally.requests.most_common(self._most // 2)))
                tally.forgotten += tally.requests.total() - kept.total()
                tally.requests = kept

    def write(self, objects: Objects, today: date | None = None) -> None:
        """Writes what is new since the last time, and turns the day; requests since then count for the day before.

        Raises what storage raises; nothing is lost by that, and the next call tries again.
        """
        today = today or _today()
        with self._writing:
            with self._counting:
                if today > self._tally.day:
                    self._unwritten = [each for each in (*self._unwritten, self._tally) if _is_kept(each.day, today)]
                    self._tally = _Tally(today)
                tallies = [*self._unwritten, self._tally]
                new = [(each, each.total, each.forgotten, each.requests.copy()) for each in tallies if each.total > each.written]
            for tally, total, forgotten, requests in new:
                asked = tuple(_Asked(*key, times) for key, times in requests.items())
                objects.replace(tally.name, _Counted(forgotten=forgotten, asked=asked).model_dump_json().encode())
                tally.written = total
            self._unwritten = []
            if self._swept != today:
                _remove_old(objects, today)
                self._swept = today


def read_demand(objects: Objects, today: date | None = None) -> Counter[Key]:
    """The demand of every document that was asked for. Raises `CorruptObject`, naming the object."""
    today = today or _today()
    demand: Counter[Key] = Counter()
    for name, day in _objects_by_day(objects):
        if _is_kept(day, today):
            with suppress(MissingObject):  # whoever began a new day has removed it
                for tenant, collection, document, requests in _read(objects, name).asked:
                    demand[tenant, collection, document] += requests
    return demand


def erase_demand(objects: Objects, erased: Callable[[Key], bool]) -> None:
    """Writes the objects anew that name any of these documents, without them. Raises `CorruptObject`, naming the object."""
    for name, _ in list(_objects_by_day(objects)):
        with suppress(MissingObject):
            counted = _read(objects, name)
            left = tuple(each for each in counted.asked if not erased(each[:3]))
            if len(left) < len(counted.asked):
                objects.replace(name, counted.model_copy(update={"asked": left}).model_dump_json().encode())


def _read(objects: Objects, name: str) -> _Counted:
    data = objects.read(name)
    try:
        return _Counted.model_validate_json(data)
    except ValidationError as error:
        raise CorruptObject(f"{name} counts no demand that this Imprint can read ({faults(error)[0]}): remove it") from None


def _remove_old(objects: Objects, today: date) -> None:
    for name, day in _objects_by_day(objects):
        if not _is_kept(day, today):
            objects.remove(name)


def _objects_by_day(objects: Objects) -> list[tuple[str, date]]:
    found = []
    for name in objects.names(FOLDER):
        if match := _NAME.fullmatch(name):
            with suppress(ValueError):  # no day of the calendar: not an object of ours
                found.append((f"{FOLDER}/{name}", date(*map(int, match.groups()))))
    return found


def _is_kept(day: date, today: date) -> bool:
    return day > today - timedelta(days=KEPT_DAYS)


def _today() -> date:
    return datetime.now(UTC).date()
