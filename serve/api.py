"""OpenAI's endpoints over one base and its documents: the FastAPI application, and the parts that it is wired from.

    POST /v1/chat/completions, /v1/completions    whole, or streamed as server-sent events
    GET  /v1/models?after=&limit=&prefix=         the base and the documents, by pages, from one read of the manifest
    GET  /v1/models/{id}                          one of them; the id as a listing shows it, or percent-encoded once more
    GET  /health, /ready                          the process answers; requests are taken

HEAD is taken wherever GET is. In: HTTP. Out: HTTP; every error is OpenAI's error object. Knows nothing of Ray. What answers is
said in the response's `imprint` (in the first chunk of a stream) and in the headers X-Imprint-Source and X-Imprint-Adapter. Texts
of requests and answers are never logged. A client that goes away takes its request out of the engine.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from typing import Any, TypeVar
from urllib.parse import unquote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import JsonValue

from serve.errors import ApiError, hidden
from serve.failures import RETRY_AFTER_S, as_api_errors
from serve.resolver import Resolution, UnknownModel
from serve.schema import ChatRequest, CompletionRequest, read_chat, read_completion
from serve.service import Answer, Service
from serve.shapes import Shape, usage

CLIENT_GONE = 499
MODELS = "/v1/models/"
READING = ["GET", "HEAD"]
T = TypeVar("T")


def create_app(service: Service) -> FastAPI:
    """The application; its lifespan is the service's."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title="Imprint", lifespan=lifespan)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(404, _no_such_path)
    app.add_exception_handler(405, _no_such_method)
    app.add_exception_handler(Exception, _own_fault)
    if service.run.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.run.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Imprint-Source", "X-Imprint-Adapter", "Retry-After"],
        )

    async def generate(request: Request, read: Callable[[bytes], ChatRequest | CompletionRequest]) -> Response:
        body = read(await _body(request, service.run.max_body_bytes))
        response = await _unless_gone(request, _stream(service, body) if body.stream else _whole(service, body))
        return response or Response(status_code=CLIENT_GONE)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await generate(request, read_chat)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await generate(request, read_completion)

    @app.api_route("/v1/models", methods=READING)
    async def models(after: str | None = None, limit: int = 100, prefix: str = "") -> Response:
        with as_api_errors():
            async with service.access.patience():
                page = await service.access.list_models(after, limit, prefix)
        data = [_model(service, resolution) for resolution in page.models]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return JSONResponse({"object": "list", "data": data, "has_more": page.has_more, **ends})

    @app.api_route(MODELS + "{model_id:path}", methods=READING)
    async def model(request: Request, model_id: str) -> Response:
        with as_api_errors():
            return JSONResponse(_model(service, await _found(service, _ids(request, model_id))))

    @app.api_route("/health", methods=READING)
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.api_route("/ready", methods=READING)
    async def ready() -> Response:
        state = {
            "ready": service.ready,
            "store_version": service.store.sequence,
            "store_age_s": round(service.access.age_s, 3),
            "store_stale": service.access.stale,
            "waiting_for_store": service.access.waiting,
            "engine": asdict(service.engine.stats()),
            "adapters": asdict(service.residency.counters),
        }
        if service.ready:
            return JSONResponse(state)
        return JSONResponse(state, 503, {"Retry-After": str(RETRY_AFTER_S)})

    return app


def _ids(request: Request, decoded: str) -> list[str]:
    """The ids that a path may speak of: as it stands there, and with one percent-encoding taken off."""
    path = request.scope.get("raw_path", b"").decode("latin-1").partition("?")[0]
    _, found, sent = path.partition(MODELS)
    return [sent, unquote(sent)] if found else [decoded]


async def _found(service: Service, ids: list[str]) -> Resolution:
    """What answers for the first of the ids that there is."""
    *others, last = dict.fromkeys(ids)
    for model in others:
        try:
            return await _resolved(service, model)
        except UnknownModel:
            continue
    return await _resolved(service, last)


async def _resolved(service: Service, model: str) -> Resolution:
    known = service.access.known(model)
    if known is not None:
        return known
    async with service.access.patience():
        return await service.access.resolve(model)


async def _whole(service: Service, body: ChatRequest | CompletionRequest) -> Response:
    async with service.answer(body) as answer:
        pieces = [piece async for piece in answer.pieces]
        counts = usage(answer.prompt_tokens, sum(piece.tokens for piece in pieces))
        return JSONResponse(_shape(body, answer).whole(pieces, counts), headers=answer.headers)


async def _stream(service: Service, body: ChatRequest | CompletionRequest) -> Response:
    """The response as soon as the request is in the engine, so that what is wrong with it has its own status."""
    opened = AsyncExitStack()
    answer = await opened.enter_async_context(service.answer(body))
    return _EventStream(_events(body, answer), opened, answer.headers)


async def _events(body: ChatRequest | CompletionRequest, answer: Answer) -> AsyncIterator[str]:
    shape, made = _shape(body, answer), 0
    for chunk in shape.opening(answer.choices):
        yield _event(chunk)
    try:
        async for piece in answer.pieces:
            made += piece.tokens
            for chunk in shape.pieces(piece):
                yield _event(chunk)
        if body.stream_options.include_usage:
            yield _event(shape.counts(usage(answer.prompt_tokens, made)))
    except ApiError as error:
        yield _event(error.body())
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _shape(body: ChatRequest | CompletionRequest, answer: Answer) -> Shape:
    imprint = answer.resolution.to_json()
    return Shape(isinstance(body, ChatRequest), answer.answer_id, body.model, imprint, body.told is not None)


class _EventStream(Response):
    """Server-sent events for as long as the client listens; `opened` is closed at the end, whatever the end is."""

    def __init__(self, events: AsyncIterator[str], opened: AsyncExitStack, headers: dict[str, str]) -> None:
        super().__init__(None, 200, {**headers, "Cache-Control": "no-cache"}, "text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self._opened = opened

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._opened:
            await _unless_gone(Request(scope, receive), self._send(send))

    async def _send(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None, with it cancelled, where the client goes away first. The body has been read before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise ApiError(413, f"the body has more than {max_bytes} bytes: send less", code="body_too_large")
    return bytes(body)


def _model(service: Service, resolution: Resolution) -> dict[str, JsonValue]:
    base, document = service.resolver.base, resolution.document
    return {
        "id": resolution.model,
        "object": "model",
        "created": 0 if document is None else int(document.created.timestamp()),
        "owned_by": "imprint",
        "root": base,
        "parent": None if document is None else base,
        "imprint": resolution.to_json(),
    }


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = None if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(error.body(), error.status, headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await _api_error(request, ApiError(400, f"{name}: {first['msg']}", param=name))


async def _no_such_path(request: Request, error: Exception) -> Response:
    return await _api_error(request, ApiError(404, f"there is nothing at {request.url.path[:200]}"))


async def _no_such_method(request: Request, error: Exception) -> Response:
    return await _api_error(request, ApiError(405, f"{request.url.path[:200]} does not take {request.method}"))


async def _own_fault(request: Request, error: Exception) -> Response:
    return await _api_error(request, hidden("the server failed", error, 500, "internal_error"))
