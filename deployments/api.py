"""The HTTP endpoints, as an ASGI app around a RouterCore. Runs under Ray Serve and under any ASGI server alike."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lserve.engine.errors import CapacityError, InvalidRequestError, LServeError
from lserve.engine.request import Output

from .protocol import DetokenizeBody, Generation, TokenizeBody, message_pairs, parse, parse_chat, parse_completion
from .responses import DONE, ChatShape, CompletionShape, Head, Shape, error_body, event, joined
from .router import Answer, RouterCore
from .traces import Traces

logger = logging.getLogger(__name__)

Body = TypeVar("Body")

OPEN_PATHS = frozenset({"/health", "/metrics"})
"""What needs no API key."""

_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)

SMALL_BODY = 1 << 16
"""Bytes of a body that are parsed on the event loop; larger ones go to a thread."""


class BodyTooLargeError(InvalidRequestError):
    """The body has more bytes than `router.max_body_bytes`."""

    status_code = 413


class RequestId:
    """Middleware: every response carries X-Request-ID, the client's own where it sent a sane one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for key, value in scope["headers"] if key == b"x-request-id"), b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)


class Api:
    """The endpoints of one RouterCore. read_metrics: the Prometheus text of the node."""

    def __init__(self, core: RouterCore, read_metrics: Callable[[], Awaitable[str]] | None = None) -> None:
        self._core, self._read_metrics = core, read_metrics
        self._started = int(time.time())

    def app(self) -> ASGIApp:
        """The ASGI app."""
        post = ["POST"]
        routes = [
            Route("/v1/chat/completions", self._guarded(self._chat), methods=post),
            Route("/v1/completions", self._guarded(self._completions), methods=post),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{model:path}", self._guarded(self._model)),
            Route("/tokenize", self._guarded(self._tokenize), methods=post),
            Route("/detokenize", self._guarded(self._detokenize), methods=post),
            Route("/health", self._guarded(self._health)),
            Route("/metrics", self._guarded(self._metrics)),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
        return RequestId(app)

    def _guarded(
        self, endpoint: Callable[[Request, str], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint behind the API key, with every error turned into an answer."""

        async def guarded(request: Request) -> Response:
            try:
                path = request.url.path
                tenant = "" if path in OPEN_PATHS else self._core.authenticate(request.headers.get("authorization"))
                return await endpoint(request, tenant)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                return error_response(error)

        return guarded

    async def _chat(self, request: Request, tenant: str) -> Response:
        generation = await _parsed(parse_chat, await self._body(request))
        return self._answer(request, tenant, generation, ChatShape, "chatcmpl")

    async def _completions(self, request: Request, tenant: str) -> Response:
        generation = await _parsed(parse_completion, await self._body(request))
        return self._answer(request, tenant, generation, CompletionShape, "cmpl")

    def _answer(
        self,
        request: Request,
        tenant: str,
        generation: Generation,
        shape: type[ChatShape] | type[CompletionShape],
        prefix: str,
    ) -> Response:
        request_id = request.scope["state"]["request_id"]
        head = Head(f"{prefix}-{request_id}", int(time.time()), self._core.settings.served_name)
        logprobs = generation.sampling.logprobs is not None
        traces = Traces() if generation.attention.trace else None
        body = shape(head, self._core.tokenizer, logprobs, generation.include_usage, traces)
        return GenerationResponse(self._core, generation, tenant, body, traces)

    async def _models(self, request: Request, tenant: str) -> Response:
        return JSONResponse({"object": "list", "data": [await self._model_card()]})

    async def _model(self, request: Request, tenant: str) -> Response:
        self._core.check_model(request.path_params["model"])
        return JSONResponse(await self._model_card())

    async def _model_card(self) -> dict[str, Any]:
        name, limit = self._core.settings.served_name, (await self._core.pool.info()).max_model_len
        return {"id": name, "object": "model", "created": self._started, "owned_by": "lserve", "max_model_len": limit}

    async def _tokenize(self, request: Request, tenant: str) -> Response:
        body = await _parsed(partial(parse, TokenizeBody), await self._body(request))
        self._core.check_model(body.model)
        if body.messages is not None:
            tokens = await self._core.encode_chat(message_pairs(body.messages))
        else:
            tokens = await self._core.encode(body.prompt or "", body.add_special_tokens)
        limit = (await self._core.pool.info()).max_model_len
        return JSONResponse({"count": len(tokens), "max_model_len": limit, "tokens": tokens})

    async def _detokenize(self, request: Request, tenant: str) -> Response:
        body = await _parsed(partial(parse, DetokenizeBody), await self._body(request))
        self._core.check_model(body.model)
        return JSONResponse({"prompt": self._core.decode(body.tokens)})

    async def _health(self, request: Request, tenant: str) -> Response:
        ready = await self._core.pool.ready()
        return JSONResponse({"status": "ok" if ready else "starting"}, status_code=200 if ready else 503)

    async def _metrics(self, request: Request, tenant: str) -> Response:
        if self._read_metrics is None:
            raise HTTPException(404, "no metrics endpoint runs here")
        return PlainTextResponse(await self._read_metrics(), media_type="text/plain; version=0.0.4")

    async def _body(self, request: Request) -> bytes:
        limit = self._core.settings.router.max_body_bytes
        declared = request.headers.get("content-length", "0")
        parts: list[bytes] = []
        size = int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 20 else 0
        if size <= limit:
            size = 0
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    break
                parts.append(part)
        if size > limit:
            raise BodyTooLargeError(f"the body has more than {limit} bytes")
        return b"".join(parts)


class GenerationResponse(Response):
    """Answers a generation, streamed or whole, and aborts it when the client goes away.

    The status line waits for the first output, so that everything that fails before it gets its proper status.
    """

    def __init__(
        self, core: RouterCore, generation: Generation, tenant: str, shape: Shape, traces: Traces | None = None
    ) -> None:
        self._core, self._generation, self._tenant, self._shape = core, generation, tenant, shape
        self._traces = traces
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await while_connected(receive, self._run(scope, receive, send))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = dict(scope["headers"])
            traceparent = headers.get(b"traceparent", b"").decode("latin-1")
            name = scope["state"]["request_id"]
            answer = await self._core.start(self._generation, self._tenant, name, traceparent)
            async with aclosing(answer.stream()) as batches:
                first = await anext(batches, None)
                if self._traces is not None:
                    await self._traces.locate(self._generation, self._core.tokenizer)
                if self._generation.stream:
                    await self._stream(answer, first or [], batches, send)
                    return
                outputs = list(first or ())
                async for batch in batches:
                    outputs.extend(batch)
            ordered = sorted(joined(outputs), key=lambda output: output.choice)
            response: Response = JSONResponse(self._shape.whole(ordered, answer.usage))
        except Exception as error:
            response = error_response(error)
        await response(scope, receive, send)

    async def _stream(self, answer: Answer, first: Sequence[Output], batches: Any, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, (b"x-accel-buffering", b"no")]})
        opening = b"".join(map(event, self._shape.opening(answer.num_choices)))
        await _send(send, opening + self._events(first))
        try:
            async for outputs in batches:
                await _send(send, self._events(outputs))
            usage = event(self._shape.closing(answer.usage)) if self._generation.include_usage else b""
            await _send(send, usage + DONE)
        except Exception as error:
            # Too late for a status: an error event, and no [DONE], tells a client that the answer is not whole.
            await _send(send, event(error_body(as_lserve_error(error))))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _events(self, outputs: Sequence[Output]) -> bytes:
        return b"".join(event(self._shape.piece(output)) for output in joined(outputs))


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs work to its end, or cancels it as soon as the client has gone. Its errors are raised here."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def error_response(error: Exception) -> Response:
    """OpenAI's error shape and the error's own status; anything unexpected is logged and tells nothing of itself."""
    known = as_lserve_error(error)
    headers = {}
    if isinstance(known, CapacityError):
        headers["retry-after"] = str(max(1, round(known.retry_after_s)))
    if known.status_code == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(known), status_code=known.status_code, headers=headers)


def as_lserve_error(error: Exception) -> LServeError:
    """The error itself if it is one of ours, else an internal error."""
    if isinstance(error, LServeError):
        return error
    logger.error("unexpected error: %s", error, exc_info=error)
    return LServeError("internal error")


async def _parsed(parser: Callable[[bytes], Body], body: bytes) -> Body:
    return parser(body) if len(body) <= SMALL_BODY else await asyncio.to_thread(parser, body)


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = {"error": {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)
