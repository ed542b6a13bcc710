"""HTTP that strangers may reach: who may ask, how much, and how long they may take.

On starlette and uvicorn. Around every answer: hosts and origins are checked, the key is compared in
constant time, a content security policy goes with each page, bodies are limited, and a client that
does not send or read in time is dropped.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import re
from urllib.parse import urlsplit

import h11
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from data.openai import Refusal
from runtime.cli import print0
from runtime.errors import UserError

LARGEST_BODY = 2**20  # bytes
PATIENCE = 20.0  # seconds that a client may take to send a request, or to read a piece of an answer
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
ERROR_HEADERS = {401: {"www-authenticate": "Bearer"}, 408: {"connection": "close"}, 429: {"retry-after": "1"}}


async def body_of(request):
    """The bytes of the body; what exceeds LARGEST_BODY is read and dropped, and then refused."""
    body, size = [], 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for piece in request.stream():
                size += len(piece)
                if size <= LARGEST_BODY:
                    body.append(piece)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {PATIENCE:g} seconds") from None
    except ClientDisconnect:
        raise Refusal(499, "the client has left") from None
    if size > LARGEST_BODY:
        raise Refusal(413, f"the body has more than {LARGEST_BODY} bytes")
    return b"".join(body)


async def finish_or_leave(receive, work):
    """Await `work` and return its result, but drop it and raise Refusal if the client leaves."""
    work, gone = asyncio.ensure_future(work), asyncio.ensure_future(client_left(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refusal(499, "the client has left")
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.wait({work, gone})


async def client_left(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events from an asynchronous generator, which is closed however this ends.

    Starlette's own class does the same with anyio's task groups, at twice the cost of an event.
    """

    media_type = "text/event-stream"

    async def __call__(self, scope, receive, send):
        try:
            with contextlib.suppress(Refusal):  # nobody is there to be told
                await finish_or_leave(receive, self.stream_response(send))
        finally:
            await self.body_iterator.aclose()


class Guard:
    """Around the app: hosts, origins, the key, and headers."""

    def __init__(self, app, config):
        self.app, self.config = app, config
        self.origins = [origin.strip() for origin in config.origin.split(",") if origin.strip()]
        for origin in self.origins:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/A-Z\s]+", origin):
                raise UserError(f"--origin={origin}: not as browsers send it, for example https://example.org:8000")

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        extra = HEADERS | ({"access-control-allow-origin": origin, "vary": "origin"} if origin in self.origins else {})

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode("latin-1")) for name, value in extra.items()]
            await send(message)

        app = self.app
        if refusal := self.refusal(scope, headers):
            app = error_response(refusal)
        elif scope["method"] == "OPTIONS" and origin in self.origins:  # a browser asks before it sends
            allowed = {"access-control-allow-headers": "authorization, *"}  # OpenAI's client sends many of its own
            app = Response(status_code=204, headers=allowed | {"access-control-allow-methods": "GET, POST"})
        await app(scope, receive, send_with_headers)

    def refusal(self, scope, headers):
        """The Refusal of a request that may not pass, or None."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.is_ours(host):
            return Refusal(403, f"host {host!r}: not a name of this server; --host or --origin adds one")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}", *self.origins):
            return Refusal(403, f"origin {origin!r} may not use this server; --origin adds it")
        if self.config.api_key and scope["path"].startswith("/v1/") and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip(" \t").encode("latin-1"), self.config.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                return Refusal(401, "the API key is wrong or missing", code="invalid_api_key")
        return None

    def is_ours(self, host):
        """Addresses, this machine's name for itself, and what the flags name: other names may be a
        page's, which has pointed them here (DNS rebinding)."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in ("localhost", self.config.host.lower(), *(urlsplit(origin).hostname for origin in self.origins)):
                return True
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return False


class Impatient(H11Protocol):
    """uvicorn's HTTP/1.1, which waits for ever for the head of a request, and for a client to read;
    this one does not."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.head_timer = self.loop.call_later(PATIENCE, transport.close)
        self.read_timer = None

    def data_received(self, data):
        super().data_received(data)
        answered = self.conn.our_state is h11.DONE  # before the whole body has come
        if self.conn.their_state is not h11.IDLE and not answered:
            self.head_timer.cancel()
        elif self.head_timer.cancelled():  # the beginning of a further request, or more of that body
            self.head_timer = self.loop.call_later(PATIENCE, self.transport.close)

    def pause_writing(self):
        """The buffers are full: the client does not read."""
        super().pause_writing()
        self.read_timer = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        self.read_timer.cancel()

    def connection_lost(self, exc):
        self.head_timer.cancel()
        if self.read_timer:
            self.read_timer.cancel()
        super().connection_lost(exc)


def error_response(e, headers=None):
    return JSONResponse(e.body, e.status, headers or ERROR_HEADERS.get(e.status))


async def on_refusal(request, e):
    return error_response(e)


async def on_http_error(request, e):
    refusal = Refusal(e.status_code, f"{request.method} {request.url.path}: {e.detail}")
    return error_response(refusal, e.headers)  # a 405 says what is allowed


async def on_failure(request, e):
    """A bug here, or a disk that fails: a line on the terminal instead of a traceback."""
    print0(f"error: {request.method} {request.url.path!r}: {e!r}")
    return error_response(Refusal(500, f"{request.url.path}: the server failed, and says why on its terminal"))


HANDLERS = {Refusal: on_refusal, HTTPException: on_http_error, Exception: on_failure}
