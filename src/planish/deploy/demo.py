"""A page on this machine alone where one drops a picture and sees what the models say (Starlette and uvicorn)."""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from collections.abc import Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from planish.deploy.classify import Classifier
from planish.deploy.comparison import BadPicture, check_classes, compare, size_text
from planish.deploy.page import content_policy, render
from planish.errors import PlanishError

ADDRESS = "127.0.0.1"
MAX_BYTES = 10_000_000
WAITING = 8  # pictures in line, the one in work among them
_HOSTS = ("127.0.0.1", "localhost")


def make_app(classifiers: Sequence[Classifier]) -> Starlette:
    """The page, and ``POST /classify`` with the bytes of a picture as its body.

    Raises:
        PlanishError: the models have different classes.
    """
    check_classes(classifiers)
    page = render(classifiers, MAX_BYTES)
    line = Line()

    async def home(request: Request) -> Response:
        return HTMLResponse(page)

    async def classify(request: Request) -> Response:
        data = await read_body(request)
        try:
            return JSONResponse(await line.work(compare, classifiers, data))
        except BadPicture as error:
            raise HTTPException(400, str(error)) from error
        except PlanishError as error:
            raise HTTPException(500, str(error)) from error

    async def explain(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    return Starlette(
        routes=[Route("/", home), Route("/classify", classify, methods=["POST"])],
        exception_handlers={HTTPException: explain},
        middleware=[Middleware(Guard, policy=content_policy(page))],
    )


class Line:
    """One picture at a time, a few in line, the others are sent away."""

    def __init__(self) -> None:
        self._waiting, self._one = 0, asyncio.Lock()

    async def work(self, function: Any, *arguments: Any) -> Any:
        """What ``function`` gives, in a thread, when it is its turn.

        Raises:
            HTTPException: 503, when the line is full.
        """
        if self._waiting >= WAITING:
            raise HTTPException(503, "too many pictures at once: try again in a moment", {"Retry-After": "1"})
        self._waiting += 1
        try:
            async with self._one:
                return await run_in_threadpool(function, *arguments)
        finally:
            self._waiting -= 1


async def read_body(request: Request) -> bytes:
    """The body, never more than ``MAX_BYTES`` of it in memory.

    Raises:
        HTTPException: 413 for a larger body, 400 for an empty one.
    """
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BYTES:  # uvicorn throws the rest away as it comes, so that the sender reads the answer
            raise HTTPException(413, f"the file is larger than {size_text(MAX_BYTES)}: give a smaller one")
        parts.append(part)
    if size == 0:
        raise HTTPException(400, "no picture was sent: give the bytes of an image file as the body")
    return b"".join(parts)


class Guard:
    """Only this machine's own page may ask, and every answer says how little it may do.

    The name in ``Host`` must be this machine's: a foreign name that resolves to 127.0.0.1 (DNS rebinding) is refused. A
    page from elsewhere names itself in ``Origin``, and is refused as well.
    """

    def __init__(self, app: ASGIApp, policy: str) -> None:
        self.app = app
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        refused = self._refused(Headers(scope=scope))
        answer = self.app if refused is None else JSONResponse({"error": refused}, 403)
        await answer(scope, receive, guarded)

    def _refused(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if re.sub(r":\d+$", "", host) not in _HOSTS:
            return f"this page is served under the names {' and '.join(_HOSTS)} only"
        if origin is not None and origin != f"http://{host}":
            return "pages from elsewhere may not ask here"
        return None


def listen(port: int) -> socket.socket:
    """A socket bound to 127.0.0.1 (0: any port that is free).

    Raises:
        PlanishError: the port is taken, not allowed, or none.
    """
    if not 0 <= port <= 65535:
        raise PlanishError(f"port is {port}: give a number from 0 (any that is free) to 65535")
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given up is free again
    try:
        bound.bind((ADDRESS, port))
        bound.listen()  # a second server would find the port taken only now
    except OSError as error:
        bound.close()
        why = "is taken by another program" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise PlanishError(f"port {port} of {ADDRESS} {why}: give another one, or 0 for any that is free") from error
    return bound


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A server for :func:`listen`'s socket: ``make_server(app).run(sockets=[socket])`` until a signal ends it."""
    return uvicorn.Server(
        uvicorn.Config(
            app, http="h11", ws="none", loop="asyncio", lifespan="off", interface="asgi3", log_config=None,
            log_level="error", access_log=False, server_header=False, proxy_headers=False,
            limit_concurrency=4 * WAITING, timeout_keep_alive=5, timeout_graceful_shutdown=2,
        )
    )  # fmt: skip
