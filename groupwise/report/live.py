"""The page of runs that go on, from a small server: it reads their directories, and writes nothing but wishes.

Whoever has the address with its token sees everything that the runs have, and may ask them to stop; without it, nobody
sees anything, also not another user of the same machine.
"""

from __future__ import annotations

import errno
import gzip
import hmac
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, cast, get_args
from urllib.parse import parse_qsl, urlsplit

from groupwise.errors import ConfigError, FileError
from groupwise.report.building import head
from groupwise.report.detail import group_detail
from groupwise.report.facts import check_run
from groupwise.report.page import compact, page
from groupwise.report.reader import RunReader, names_of
from groupwise.runs import read_run
from groupwise.wishes import WishName, leave_wish

logger = logging.getLogger(__name__)

PORT = 8477

_RULE = "Every group is here, read from the run when it is opened"
_SMALL = 1024
"""Bytes below which nothing is compressed."""


class Refused(Exception):
    """An answer that says why there is none."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class LiveRuns:
    """What the server knows, for one request at a time."""

    def __init__(self, runs: Sequence[Path]) -> None:
        for run in runs:
            check_run(run)
        self._readers = [RunReader(run, name) for run, name in zip(runs, names_of(list(runs)), strict=True)]
        self._lock = threading.Lock()

    @property
    def title(self) -> str:
        return " and ".join(reader.name for reader in self._readers)

    def answer(self, what: str, query: Mapping[str, str]) -> Any:
        """JSON-ready.

        Raises:
            Refused: nothing of that name, or a query that makes no sense.
        """
        answers: dict[str, Callable[[Mapping[str, str]], Any]] = {
            "head": self._head,
            "changes": self._changes,
            "group": self._group,
            "answers": lambda query: self._reader(query).evals.answers(query.get("uid", "")),
        }
        if what == "search":  # which reads for seconds, and changes nothing
            return self._search(query)
        if what not in answers:
            raise Refused(404, f"there is nothing called {what!r} here")
        with self._lock:
            return answers[what](query)

    def ask(self, query: Mapping[str, str]) -> None:
        """Leave a wish for a run.

        Raises:
            Refused: it is not going on, its folder cannot be written, or nobody knows such a wish.
        """
        name, run = query.get("what", ""), self._reader(query).run
        if name not in get_args(WishName):
            raise Refused(400, f"got what = {name!r}; expected {' or '.join(get_args(WishName))}")
        state = read_run(run).state
        if state != "running":
            raise Refused(409, f"the run is {state}: nobody would see it")
        try:
            leave_wish(run, cast(WishName, name))
        except FileError as error:
            raise Refused(403, str(error)) from None

    def _reader(self, query: Mapping[str, str]) -> RunReader:
        number = _number(query, "run")
        if number >= len(self._readers):
            raise Refused(404, f"there is no run {number} here")
        return self._readers[number]

    def _head(self, _: Mapping[str, str]) -> dict[str, Any]:
        for reader in self._readers:
            reader.refresh()
        return head(self._readers, rules=[_RULE] * len(self._readers))

    def _changes(self, query: Mapping[str, str]) -> dict[str, Any]:
        reader = self._reader(query)
        reader.refresh()
        names = ("generation", "steps", "groups", "samples", "evals")
        return reader.changes(**{name: _number(query, name) for name in names})

    def _group(self, query: Mapping[str, str]) -> dict[str, Any]:
        reader, step, group = self._reader(query), _number(query, "step"), _number(query, "group")
        for entry in reader.index.groups:
            if (entry.step, entry.group) == (step, group):
                return group_detail(reader.index, entry, reader.pieces)
        raise Refused(404, f"step {step} has no group {group}, or no longer")

    def _search(self, query: Mapping[str, str]) -> list[str]:
        """`step/group` of the groups with a sample whose answer has the text in it, upper and lower case alike."""
        return [f"{step}/{group}" for step, group in self._reader(query).index.search(query.get("text", "").lower())]


def _number(query: Mapping[str, str], name: str) -> int:
    given = query.get(name, "")
    if not (given.isascii() and given.isdigit() and len(given) < 16):
        raise Refused(400, f"got {name} = {given!r}; expected a number")
    return int(given)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "groupwise", ""
    timeout: ClassVar[float | None] = 30.0

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self.close_connection = True  # what is sent with it is not read
        self._answer(self._post)

    def _get(self, path: str, query: Mapping[str, str]) -> tuple[str, bytes]:
        if path == "/":
            text = "".join(page(self._live.runs.title, live=True))
            return "text/html; charset=utf-8", text.encode("utf-8")
        if not path.startswith("/data/"):
            raise Refused(404, "there is nothing of that name here")
        return "application/json", compact(self._live.runs.answer(path.removeprefix("/data/"), query)).encode()

    def _post(self, path: str, query: Mapping[str, str]) -> tuple[str, bytes]:
        if path != "/ask":
            raise Refused(404, "there is nothing of that name here")
        self._live.runs.ask(query)
        return "application/json", compact({"asked": query["what"]}).encode()

    @property
    def _live(self) -> LiveServer:
        return cast("LiveServer", self.server)

    def _answer(self, work: Callable[[str, Mapping[str, str]], tuple[str, bytes]]) -> None:
        try:
            url = urlsplit(self.path)
        except ValueError:  # an address whose host is no host
            self._send(400, "text/plain; charset=utf-8", b"this is no address of a page")
            return
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        try:
            if not hmac.compare_digest(query.get("token", "").encode(), self._live.token.encode()):
                raise Refused(403, "the address lacks its token; use the one that `groupwise watch` has printed")
            self._send(200, *work(url.path, query))
        except Refused as refused:
            self._send(refused.status, "text/plain; charset=utf-8", str(refused).encode("utf-8", "replace"))
        except ConnectionError:
            raise  # the client went
        except Exception as error:  # the page says it, and asks again
            logger.exception("%s cannot be answered", url.path)
            self._send(500, "text/plain; charset=utf-8", f"{type(error).__name__}: {error}".encode("utf-8", "replace"))

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        if len(body) > _SMALL and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, compresslevel=3)
            self.send_header("Content-Encoding", "gzip")
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # the client went
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page asks every two seconds."""


class LiveServer(ThreadingHTTPServer):
    """Serves until `shutdown`.

    Args:
        host: the address that it listens on.
        port: None is `PORT`, or another one that is free; 0 is any that is free.

    Raises:
        ConfigError: one of the runs is none; the address cannot be had.

    Example:
        server = LiveServer([Path("runs/one")], host="127.0.0.1", port=None)
        print(server.url)
        server.serve_forever()
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[Path], *, host: str, port: int | None) -> None:
        self.runs = LiveRuns(runs)
        self.token = secrets.token_urlsafe(16)
        self._host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        number = PORT if port is None else port
        try:
            super().__init__((host, number), _Handler)
        except (OSError, OverflowError) as error:
            if port is not None or getattr(error, "errno", None) != errno.EADDRINUSE:
                raise ConfigError(f"cannot listen at {host}:{number}: {error}; choose another --port") from error
            super().__init__((host, 0), _Handler)

    @property
    def url(self) -> str:
        """With its token; the machine's name where it listens at all its addresses."""
        host = socket.gethostname() if self._host in ("0.0.0.0", "::") else self._host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/?token={self.token}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes, or sends what is no HTTP, ends its connection alone."""
