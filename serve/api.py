"""OpenAI's endpoints over one base and its documents: the FastAPI application, and the parts that it is wired from.

    POST /v1/chat/completions, /v1/completions    whole, or streamed as server-sent events
    GET  /v1/models?after=&limit=&prefix=         the base and the documents, by pages, from one read of the manifest
    GET  /v1/models/{id}                          one of them; the id percent-encoded once more, as in any path
    GET  /health, /ready                          the process answers; requests are taken

In: HTTP. Out: HTTP; every error is OpenAI's error object. Knows nothing of Ray. What answers is said in the response's `imprint`
(in the first chunk of a stream) and in the headers X-Imprint-Source and X-Imprint-Adapter. Texts of requests and answers are
never logged. A client that goes away takes its request out of the engine.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import JsonValue

from serve.resolver import Resolution
from serve.schema import ApiError, ChatRequest, CompletionRequest, Shape, read_chat, read_completion, usage
from serve.service import RETRY_AFTER_S, Answer, Service, as_api_errors

CLIENT_GONE = 499
T = TypeVar("T")


def create_app(service: Service, max_body_bytes: int = 2**21) -> FastAPI:
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

    async def generate(request: Request, read: Callable[[bytes], ChatRequest | CompletionRequest]) -> Response:
        body = read(await _body(request, max_body_bytes))
        response = await _unless_gone(request, _stream(service, body) if body.stream else _whole(service, body))
        return response or Response(status_code=CLIENT_GONE)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await generate(request, read_chat)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await generate(request, read_completion)

    @app.get("/v1/models")
    async def models(after: str | None = None, limit: int = 100, prefix: str = "") -> Response:
        try:
            page = await asyncio.to_thread(service.resolver.list_models, after, limit, prefix)
        except ValueError as error:
            raise ApiError(400, str(error), param="limit" if str(error).startswith("limit") else "after") from None
        data = [_model(service, resolution) for resolution in page.models]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return JSONResponse({"object": "list", "data": data, "has_more": page.has_more, **ends})

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        with as_api_errors():
            return JSONResponse(_model(service, await asyncio.to_thread(service.resolver.resolve, model_id)))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = service.engine.ready
        state = {
            "ready": is_ready,
            "store_version": service.store.sequence,
            "store_age_s": round(service.resolver.age_s, 3),
            "engine": asdict(service.engine.stats()),
            "adapters": asdict(service.residency.counters),
        }
        return JSONResponse(state, 200 if is_ready else 503, None if is_ready else {"Retry-After": str(RETRY_AFTER_S)})

    return app


async def _whole(service: Service, body: ChatRequest | CompletionRequest) -> Response:
    async with service.answer(body) as answer:
        pieces = [piece async for piece in answer.pieces]
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        assert last.finish_reason is not None
        counts = usage(answer.prompt_tokens, last.tokens)
        return JSONResponse(_shape(body, answer).whole(text, last.finish_reason, counts), headers=answer.headers)


async def _stream(service: Service, body: ChatRequest | CompletionRequest) -> Response:
    """The response as soon as the request is in the engine, so that what is wrong with it has its own status."""
    opened = AsyncExitStack()
    answer = await opened.enter_async_context(service.answer(body))
    return _EventStream(_events(body, answer), opened, answer.headers)


async def _events(body: ChatRequest | CompletionRequest, answer: Answer) -> AsyncIterator[str]:
    shape = _shape(body, answer)
    yield _event(shape.opening())
    try:
        async for piece in answer.pieces:
            if piece.text:
                yield _event(shape.piece(piece.text))
            if piece.finish_reason is not None:
                yield _event(shape.closing(piece.finish_reason))
                if body.stream_options.include_usage:
                    yield _event(shape.counts(usage(answer.prompt_tokens, piece.tokens)))
    except ApiError as error:
        yield _event(error.body())
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _shape(body: ChatRequest | CompletionRequest, answer: Answer) -> Shape:
    return Shape(isinstance(body, ChatRequest), answer.answer_id, body.model, answer.resolution.to_json())


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
