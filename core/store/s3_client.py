"""Requests to one bucket: the client, its credentials, and how long a request is tried.

It speaks to botocore, whose requests go out once. s3fs and aiobotocore send a PUT again by themselves after a cut connection
(aiohttp counts PUT as idempotent), and s3fs turns the server's codes into plain OSErrors. Every request is tried `attempts`
times, with pauses that double and are drawn at random. The newer checksums are off: Ceph 16 does not know them. Knows nothing of
objects and prefixes.

Cost: 0.4 s to open the first in a process, 0.04 s others.
"""

import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from botocore import exceptions
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.loaders import create_loader
from botocore.parsers import ResponseParserError
from botocore.session import Session
from pydantic import Field

from core.config import RunSection
from core.store.objects import StorageError

_TRANSIENT_STATUS = {408, 409, 429}
_NOT_IMPLEMENTED = 501
_DAMAGED_BODY = {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}
_TRANSIENT_CODES = _DAMAGED_BODY | {"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_CUT = (
    exceptions.ConnectionError,
    exceptions.HTTPClientError,
    exceptions.IncompleteReadError,
    ResponseParserError,
)
_NO_CREDENTIALS = (
    exceptions.CredentialRetrievalError,
    exceptions.NoCredentialsError,
    exceptions.PartialCredentialsError,
    exceptions.SSOError,
    exceptions.TokenRetrievalError,
)

_loader = create_loader()
log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class S3Settings(RunSection):
    """How patient a client is, and how much it does at once.

    The n-th retry waits up to `first_pause_s` * 2^(n-1), at most `longest_pause_s`. S3 takes no parts below 5 MB.
    """

    attempts: int = Field(default=10, ge=1)
    first_pause_s: float = Field(default=0.1, ge=0)
    longest_pause_s: float = Field(default=8, ge=0)
    timeout_s: float = Field(default=30, gt=0)
    connections: int = Field(default=16, ge=1)
    part_bytes: int = Field(default=16 * 2**20, ge=5 * 2**20)


@dataclass(frozen=True)
class _Connection:
    """What one process has open."""

    process: int
    client: Any
    pool: ThreadPoolExecutor


class S3Client:
    """Requests to `bucket`, from any number of threads and processes. url: what errors speak of."""

    def __init__(self, url: str, bucket: str, settings: S3Settings) -> None:
        self._url = url
        self._bucket = bucket
        self._settings = settings
        self._connection = self._connect()

    @property
    def pool(self) -> ThreadPoolExecutor:
        """This process' threads for requests side by side."""
        return self._open().pool

    def _open(self, instead_of: Any = None) -> _Connection:
        """This process' connection; a new one, with credentials read anew, `instead_of` a client."""
        here = self._connection
        if here.process != os.getpid():
            here = self._connection = self._connect()
        elif here.client is instead_of:
            here = self._connection = replace(here, client=self._connect().client)
        return here

    def _connect(self) -> _Connection:
        session = Session()
        session.register_component("data_loader", _loader)  # which keeps what it has read: a tenth of a second
        config = Config(
            connect_timeout=min(10, self._settings.timeout_s),
            read_timeout=self._settings.timeout_s,
            retries={"mode": "standard", "total_max_attempts": 1},
            max_pool_connections=4 * self._settings.connections,
            tcp_keepalive=True,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        pool = ThreadPoolExecutor(self._settings.connections, "s3")
        try:
            return _Connection(os.getpid(), session.create_client("s3", config=config), pool)
        except BotoCoreError as error:
            raise StorageError(f"{self._url}: {error}") from None
        except ValueError:
            raise ValueError(f"{self._url}: AWS_ENDPOINT_URL is not a URL such as https://s3.example.org:9000") from None

    def call(self, operation: str, name: str, answers: Sequence[int] = (), **values: Any) -> Any:
        """The answer to one operation of botocore's client on the bucket; `name` and errors as of `ask`."""
        return self.ask(name, lambda s3: getattr(s3, operation)(Bucket=self._bucket, **values), answers)

    def ask(self, name: str, request: Callable[[Any], Answer], answers: Sequence[int] = ()) -> Answer:
        """The answer to a request, asked until there is one. name: of the object, for errors.

        Raises `ClientError` where the status is one of `answers`, and `StorageError` for what trying again does not mend.
        """
        settings, expired, cause = self._settings, None, ""
        for attempt in range(settings.attempts):
            if attempt:
                log.info("%s of %s: %s; asking again", name, self._url, cause)
                time.sleep(random.uniform(0, min(settings.longest_pause_s, settings.first_pause_s * 2 ** (attempt - 1))))
            try:
                client = self._open(instead_of=expired).client
                return request(client)
            except ClientError as error:
                http, code = status(error), error.response["Error"].get("Code", "")
                message = error.response["Error"].get("Message") or "no message"
                cause = f"{http} {code}: {message[:300]}"
                if http in answers and code != "NoSuchBucket":
                    raise
                if code in _EXPIRED:
                    if expired is not None:
                        raise self.failed(name, f"the credentials have expired ({cause}): renew them and try again") from None
                    expired = client
                elif not _is_transient(http, code):
                    raise self.failed(name, cause) from None
            except _CUT as error:
                cause = type(error).__name__
            except _NO_CREDENTIALS as error:
                hint = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run under an instance role"
                raise self.failed(name, f"no credentials ({type(error).__name__}): {hint}") from None
            except BotoCoreError as error:
                raise self.failed(name, f"{type(error).__name__}: {str(error)[:300]}") from None
        raise self.failed(name, f"{cause} ({settings.attempts} attempts)")

    def failed(self, name: str, cause: str) -> StorageError:
        """The error to raise for an object."""
        return StorageError(f"{name} of {self._url}: {cause}")


def status(error: ClientError) -> int:
    """The HTTP status of an answer that is an error."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _is_transient(http: int, code: str) -> bool:
    return (http >= 500 and http != _NOT_IMPLEMENTED) or http in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
