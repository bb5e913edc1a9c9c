"""The HTTP server: OpenAI's routes, the page, health and metrics."""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.inference.trace import trace_of
from megatron_dtrpo.serving import replies
from megatron_dtrpo.serving.answer import Answer
from megatron_dtrpo.serving.desk import Desk, QueueFull, Stopping, Ticket
from megatron_dtrpo.serving.page import page
from megatron_dtrpo.serving.protocol import ChatRequest, CompletionRequest, WatchRequest
from megatron_dtrpo.serving.service import Served, Service, TooLong, UnknownModel, written

T = TypeVar("T")

CLIENT_GONE = 499  # nginx's; nobody reads it
SHORT = 16_384  # bytes of a request that is read in a few milliseconds


class Json(JSONResponse):
    """ASCII only: what a client sent may come back in an error, and need not be text."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


class _Gone(Exception):
    """The client closed its connection."""


class EventStream(StreamingResponse):
    """A stream of events that ends with its client, and then gives up the request's jobs."""

    def __init__(self, events: AsyncIterator[str], ticket: Ticket):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.events, self.ticket = events, ticket

    async def __call__(self, scope, receive, send) -> None:
        try:
            await _unless_gone(receive, self.stream_response(send))
        except (_Gone, OSError):
            pass
        finally:
            self.ticket.cancel()

    async def stream_response(self, send) -> None:
        """The head goes with the first event."""
        head = [{"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}]
        async for event in self.events:
            for message in (*head, {"type": "http.response.body", "body": event.encode(), "more_body": True}):
                await send(message)
            head = []
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """The result of ``work``, which is given up when the client goes. Raises _Gone."""

    async def going() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(going())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Gone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class BodyLimit:
    """Refuses requests of more than ``most`` bytes, before they are read whole."""

    def __init__(self, app, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self.most:
            return await self._refusal()(scope, receive, send)
        count = 0

        async def counted():
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self.most:
                raise HTTPException(413, self._words())
            return message

        begun = False

        async def sent(message):
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, sent)
        except asyncio.CancelledError:  # the server stops, and this request has had its time
            if not begun:
                await Json(_stopping(), 503)(scope, receive, send)

    def _words(self) -> str:
        return f"the request has more than {self.most} bytes: shorten it, or serve with another --max-request-bytes"

    def _refusal(self) -> Json:
        return Json(replies.error(self._words()), 413, headers={"Connection": "close"})


def create_app(served: Sequence[Served], api_key: str | None, most_bytes: int, desk: Desk) -> FastAPI:
    """Routes to ``served``, the first one the default. ``api_key``: what clients send as a bearer token; None: nothing
    is asked for."""
    service = Service(served, desk)

    async def authorized(request: Request) -> None:  # not a plain function, which FastAPI runs on another thread
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise HTTPException(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'")

    app = FastAPI(title="megatron-dtrpo serve", docs_url=None, redoc_url=None, default_response_class=Json)
    app.add_middleware(BodyLimit, most=most_bytes)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    locked = [Depends(authorized)]

    @app.get("/v1/models", dependencies=locked)
    async def models() -> Any:
        return {"object": "list", "data": [_described(model) for model in service.models.values()]}

    @app.get("/v1/models/{name:path}", dependencies=locked)
    async def model(name: str) -> Any:
        return _described(service.model(name))

    @app.post("/v1/completions", dependencies=locked)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        return await _reply(service, body, request, replies.CompletionReply)

    @app.post("/v1/chat/completions", dependencies=locked)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        return await _reply(service, body, request, replies.ChatReply)

    @app.post("/watch", dependencies=locked)
    async def watch(body: WatchRequest, request: Request) -> Any:
        return await _watch(service, body, request)

    @app.get("/health")
    async def health() -> Any:
        stopping = service.desk.stopping
        return Json({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    @app.get("/metrics", dependencies=locked)
    async def metrics() -> Any:
        return PlainTextResponse(replies.metrics(await _measured(service)), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def root() -> Any:
        return HTMLResponse(
            page([(model.name, model.tokenizer.has_chat_template) for model in service.models.values()])
        )

    return app


def _described(model: Served) -> dict:
    own = {"id": model.name, "object": "model", "created": model.created, "owned_by": "megatron-dtrpo"}
    return own | {"max_model_len": model.positions}


async def _reply(
    service: Service, body: CompletionRequest | ChatRequest, request: Request, kind: type[replies.Reply]
) -> Response:
    served = service.model(body.model)
    if body.stream_options is not None and not body.stream:
        raise UserError("stream_options are of a stream: leave them out, or ask for stream")
    if isinstance(body, ChatRequest) and body.top_logprobs and not body.logprobs:
        raise UserError("top_logprobs are a part of logprobs: ask for these too")
    admissions = await _read(service, request, functools.partial(service.admissions, served, body))
    reply = kind(served.name)
    prompt_tokens = sum(len(one.prompt) for one in admissions if one.key[1] == 0)
    answers = [Answer(served.tokenizer, body.stops(), body.is_scored) for _ in admissions]
    ticket = service.desk.submit(admissions)
    if body.stream:
        counted = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_events(ticket, answers, reply, prompt_tokens if counted else None), ticket)
    try:
        await _unless_gone(request.receive, _finished(ticket, answers))
    except _Gone:
        return Response(status_code=CLIENT_GONE)
    finally:
        ticket.cancel()
    return Json(reply.whole(answers, prompt_tokens))


async def _read(service: Service, request: Request, admissions: Callable[[], T]) -> T:
    """``admissions()``, which tokenizes. Long prompts are read on a thread, one at a time: others need not wait."""
    size = request.headers.get("content-length", "")
    if size.isdigit() and int(size) <= SHORT:
        return admissions()
    return await asyncio.get_running_loop().run_in_executor(service.reader, admissions)


def _stopping() -> dict:
    return replies.error("the server stops", "server_error", code="stopping")


async def _finished(ticket: Ticket, answers: Sequence[Answer]) -> None:
    async for _ in written(ticket, answers):
        pass


async def _events(
    ticket: Ticket, answers: Sequence[Answer], reply: replies.Reply, prompt_tokens: int | None
) -> AsyncIterator[str]:
    """``prompt_tokens``: for a last chunk with the usage; None: there is none. Raises Stopping if nothing was said."""
    begun, held = False, [replies.event(chunk) for index in range(len(answers)) for chunk in reply.opening(index)]
    try:
        async for index, text, scores in written(ticket, answers):
            finish = answers[index].finish
            if not (text or scores or finish):
                continue
            held.append(replies.event(reply.chunk(index, text, scores if answers[index].scored else None, finish)))
            if all(answer.finish for answer in answers):  # the rest of the stream goes with it
                break
            yield "".join(held)
            begun, held = True, []
        if prompt_tokens is not None:
            held.append(replies.event(reply.usage_chunk(answers, prompt_tokens)))
    except Stopping:
        if not begun:  # a status says it
            raise
        held.append(replies.event(_stopping()))
    yield "".join([*held, replies.event("[DONE]")])


async def _watch(service: Service, body: WatchRequest, request: Request) -> EventStream:
    served = service.model(body.model)
    prompt = [{"role": "user", "content": body.prompt}] if body.chat else body.prompt
    read = functools.partial(
        served.admission,
        {"prompt": prompt},
        "prompt",
        longest=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=0 if body.seed is None else body.seed,
        key=(0, 0),
        watched=True,
    )
    admission = await _read(service, request, read)
    ticket = service.desk.submit([admission])
    return EventStream(_watched(ticket, served, body.prompt, admission.end_ids), ticket)


async def _watched(ticket: Ticket, served: Served, prompt: str, end_ids: frozenset[int]) -> AsyncIterator[str]:
    """Of every pass: how many there were, the seconds that they took, and either the response's finished blocks
    (``written``) or its unfinished one (``block``, from place ``start`` on), null where a token is masked; in the end
    the `Trace`."""

    def shown(token: int, confidence: float) -> list:
        return [served.tokenizer.decode([token]), round(min(confidence, 1.0), 4)]

    try:
        while True:
            _, progress = await ticket.next()
            event: dict[str, Any] = {"passes": progress.passes, "seconds": round(progress.seconds, 4)}
            if progress.completion is not None:
                trace = trace_of(prompt, progress.completion, served.tokenizer, end_ids)
                yield replies.event(event | {"trace": asdict(trace)})
                return
            if progress.block is not None:
                start, block = progress.block
                yield replies.event(event | {"start": start, "block": [one and shown(*one) for one in block]})
            else:
                pairs = zip(progress.tokens, progress.confidence, strict=True)
                yield replies.event(event | {"written": [shown(*one) for one in pairs]})
    except Stopping:
        yield replies.event(_stopping())


async def _measured(service: Service) -> list[tuple[str, str, str, float]]:
    desk, counted = service.desk, await service.desk.counters()
    return [
        ("requests_running", "gauge", "Responses that are being decoded.", counted.running),
        ("requests_waiting", "gauge", "Responses that wait for a slot.", counted.waiting),
        ("slots", "gauge", "Responses that can be decoded at once.", len(service.models) * desk.places),
        ("responses_total", "counter", "Responses that were finished.", counted.finished),
        ("responses_cancelled_total", "counter", "Responses given up by their clients.", counted.cancelled),
        ("responses_refused_total", "counter", "Responses refused by a full queue.", desk.refused),
        ("tokens_total", "counter", "Tokens of finished responses.", counted.tokens),
        ("response_passes_total", "counter", "Passes that finished responses took part in.", counted.passes),
        ("rounds_total", "counter", "Passes of the whole batch.", counted.rounds),
        ("pass_seconds_total", "counter", "Seconds of these, on rank zero.", counted.seconds),
    ]


# Errors, in OpenAI's form.

OTHER_KINDS = ("string_type", "list_type", "int_type")
FORM = re.compile(r"str|constrained-\w+|list\[.*\]")  # pydantic's names of a field's forms


def _refused(status: int, kind: str = "invalid_request_error", code: str | None = None, words: str | None = None):
    async def handler(request: Request, error: Exception) -> Json:
        headers = {"Retry-After": "1"} if status in (429, 503) else None
        return Json(replies.error(words or str(error), kind, code=code), status, headers=headers)

    return handler


async def _invalid(request: Request, error: RequestValidationError) -> Json:
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return Json(replies.error("the body is not JSON"), 400)
    if not request.headers.get("content-type", "").startswith("application/json"):
        return Json(replies.error("the body is not said to be JSON: send 'Content-Type: application/json'"), 400)
    # Of a field of several forms each has its error: that of a form whose kind was right says most.
    field = errors[0]["loc"][1:2]
    same = [one for one in errors if one["loc"][1:2] == field]
    first = next((one for one in same if one["type"] not in OTHER_KINDS), same[0])
    param = ".".join(str(part) for part in first["loc"][1:] if not FORM.fullmatch(str(part))) or None
    more = len({one["loc"][1:2] for one in errors}) - 1
    message = f"{param or 'body'}: {first['msg']}" + (f" (and {more} more)" if more else "")
    return Json(replies.error(message, param=param), 400)


async def _http(request: Request, error: HTTPException) -> Json:
    kind = {401: "authentication_error"}.get(error.status_code, "invalid_request_error")
    return Json(replies.error(str(error.detail), kind), error.status_code, headers=error.headers)


HANDLERS: dict[Any, Any] = {
    HTTPException: _http,
    RequestValidationError: _invalid,
    UnknownModel: _refused(404, code="model_not_found"),
    TooLong: _refused(400, code="context_length_exceeded"),
    UserError: _refused(400),
    QueueFull: _refused(429, "rate_limit_error", "queue_full", "too many requests wait: try again later"),
    Stopping: _refused(503, "server_error", "stopping", "the server stops"),
    Exception: _refused(500, "server_error", "internal_error", "an error of the server; its log says which"),
}
