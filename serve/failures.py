"""What the parts of a server raise, as what a client is told."""

from collections.abc import Iterator
from contextlib import contextmanager

from core.store.errors import StoreError
from serve.access import StoreBusy, StoreSlow, StoreStale
from serve.engines import DeadlinePassed, Draining, EngineFailed, Overloaded, Refused
from serve.errors import ApiError, hidden
from serve.resolver import BadPage, ModeImpossible, UnknownModel

RETRY_AFTER_S = 1


@contextmanager
def as_api_errors() -> Iterator[None]:
    """Raises `ApiError`s only, for what is known to go wrong; storage's own words stay in the log."""
    try:
        yield
    except ModeImpossible as error:
        raise ApiError(400, str(error), param="imprint.mode", code="mode_impossible") from None
    except UnknownModel as error:
        raise ApiError(404, str(error), param="model", code="model_not_found") from None
    except BadPage as error:
        raise ApiError(400, str(error), param=error.param) from None
    except Refused as error:
        raise ApiError(400, str(error)) from None
    except Overloaded as error:
        raise ApiError(429, str(error), code="queue_full", retry_after_s=RETRY_AFTER_S) from None
    except StoreBusy as error:
        raise ApiError(429, str(error), code="store_busy", retry_after_s=RETRY_AFTER_S) from None
    except StoreSlow as error:
        raise ApiError(503, str(error), code="store_slow", retry_after_s=RETRY_AFTER_S) from None
    except StoreStale as error:
        raise ApiError(503, str(error), code="store_stale", retry_after_s=RETRY_AFTER_S) from None
    except DeadlinePassed as error:
        raise ApiError(504, str(error), code="deadline_passed") from None
    except (Draining, EngineFailed) as error:
        raise ApiError(503, str(error), code="not_ready", retry_after_s=RETRY_AFTER_S) from None
    except (StoreError, OSError) as error:
        raise hidden("the store failed", error, 503, "store_failed", RETRY_AFTER_S) from None
