"""Work that a server does again and again beside its requests, and that no error ends."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


async def repeat(what: str, every_s: float, work: Callable[[], Awaitable[None]]) -> None:
    """Does `work` after each `every_s` until cancelled. Whatever it raises is logged, and it is done again next time."""
    while True:
        await asyncio.sleep(every_s)
        turn = asyncio.ensure_future(work())
        try:
            await asyncio.wait([turn])
        finally:
            turn.cancel()
        if not turn.cancelled() and (error := turn.exception()) is not None:
            place = None if isinstance(error, (OSError, ValueError)) else error  # which say themselves what is wrong
            log.warning("%s failed, and will be tried again: %s: %s", what, type(error).__name__, error, exc_info=place)
