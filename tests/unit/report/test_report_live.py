"""The server of `groupwise watch`: what it answers, what it refuses, and what it asks of a run."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from groupwise.errors import ConfigError, FileError
from groupwise.report.live import LiveServer
from groupwise.report.rows import RolloutIndex
from groupwise.trajectories import read_trajectories
from groupwise.wishes import FILES, leave_wish, take_wishes
from tests.made_run import add_step, make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", steps=3)


@pytest.fixture
def server(run: Path) -> Iterator[LiveServer]:
    with LiveServer([run], host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: LiveServer, path: str, *, method: str = "GET", token: str | None = None, **query: Any
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    try:
        words = {**query, "token": server.token if token is None else token}
        connection.request(method, f"{path}?{urlencode(words)}", headers={"Accept-Encoding": "gzip"})
        answer = connection.getresponse()
        body = answer.read()
        return answer.status, gzip.decompress(body) if answer.headers["Content-Encoding"] == "gzip" else body
    finally:
        connection.close()


def data(server: LiveServer, what: str, **query: Any) -> Any:
    status, body = ask(server, f"/data/{what}", **query)
    assert status == 200, body
    return json.loads(body)


def going_on(run: Path) -> None:
    """As a run that holds its folder."""
    (run / "summary.json").unlink()
    (run / ".lock.1").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))


def test_nothing_is_said_without_the_token(server: LiveServer) -> None:
    for method, path in (("GET", "/"), ("GET", "/data/head"), ("POST", "/ask"), ("GET", "/nothing")):
        for token in ("", "x", server.token[:-1], "ü"):
            status, body = ask(server, path, method=method, token=token, run=0, what="stop")
            assert status == 403
            assert b"token" in body
            assert b"answer" not in body


def test_the_page_and_its_data(server: LiveServer, run: Path) -> None:
    status, page = ask(server, "/")
    assert status == 200
    assert b'data-live="yes"' in page
    head = data(server, "head")["runs"][0]
    rows = list(read_trajectories(run))
    assert head["groups"]["rewards"] == [row.reward for row in rows]
    group = data(server, "group", run=0, step=2, group=5)
    assert [sample["text"] for sample in group["samples"]] == [row.completion for row in rows if row.group == 5]
    row = data(server, "answers", run=0, uid="e00003")
    assert [row["answers"][step][0]["text"] for step in ("0", "3")] == ["step 0 says 3", "step 3 says 3"]
    assert data(server, "answers", run=0, uid="nobody") == {"prompt": "", "answers": {}}
    assert data(server, "search", run=0, text="ANSWER 2 OF STEP 3") == [f"3/{group}" for group in (8, 9, 10, 11)]
    assert data(server, "search", run=0, text="nowhere") == []


def test_it_reads_on(server: LiveServer, run: Path) -> None:
    head = data(server, "head")["runs"][0]
    known = {
        "run": 0,
        "generation": head["generation"],
        "steps": 3,
        "groups": 12,
        "samples": 48,
        "evals": head["evals"]["version"],
    }
    found = data(server, "changes", **known)
    assert found["metrics"]["steps"] == []
    assert found["evals"] is None, "what is known is not sent again"
    add_step(run, 4)
    found = data(server, "changes", **known)
    assert found["metrics"]["steps"] == [4]
    assert found["groups"]["group"] == [12, 13, 14, 15]
    (run / "metrics.jsonl").write_text("")
    assert data(server, "changes", **known)["anew"]


@pytest.mark.parametrize(
    ("path", "query", "status"),
    [
        ("/data/nothing", {}, 404),
        ("/etc/passwd", {}, 404),
        ("/data/../../etc/passwd", {}, 404),
        ("/data/group", {"run": 7}, 404),
        ("/data/group", {"run": -1}, 400),
        ("/data/group", {"run": "²"}, 400),
        ("/data/group", {"run": 0, "step": "x", "group": 1}, 400),
        ("/data/group", {"run": 0, "step": 1, "group": 9**9}, 404),
        ("/data/group", {"run": 0, "step": "9" * 5000, "group": 1}, 400),
        ("/data/changes", {"run": 0}, 400),
    ],
)
def test_what_makes_no_sense_is_refused(path: str, query: dict[str, Any], status: int, server: LiveServer) -> None:
    found, body = ask(server, path, **query)
    assert found == status, body
    assert data(server, "head")


def test_no_http_and_clients_that_go_hurt_nobody(server: LiveServer, capfd: pytest.CaptureFixture[str]) -> None:
    for sent in (
        b"\x00\xff\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /ask?token= HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.server_address[1])) as client:
            client.sendall(sent)
    assert data(server, "head")
    assert "Traceback" not in capfd.readouterr().err


def test_an_address_that_is_none_is_answered(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20) as client:
        client.sendall(b"GET http://[ HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_wishes_are_left_for_a_run_that_goes_on(server: LiveServer, run: Path) -> None:
    status, body = ask(server, "/ask", method="POST", run=0, what="stop")
    assert status == 409
    assert b"finished" in body
    going_on(run)
    assert ask(server, "/ask", method="POST", run=0, what="burn")[0] == 400
    assert ask(server, "/ask", method="GET", run=0, what="stop")[0] == 404
    assert not any((run / name).exists() for name in FILES.values())
    assert ask(server, "/ask", method="POST", run=0, what="stop")[0] == 200
    assert ask(server, "/ask", method="POST", run=0, what="save")[0] == 200
    assert sorted(take_wishes(run)) == ["save", "stop"]
    assert take_wishes(run) == []


def test_a_folder_that_nobody_may_write_refuses_wishes(tmp_path: Path) -> None:
    with pytest.raises(FileError):
        leave_wish(tmp_path / "missing", "save")


def test_ports(server: LiveServer, run: Path) -> None:
    taken = server.server_address[1]
    with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{taken}.*--port"):
        LiveServer([run], host="127.0.0.1", port=taken)
    with pytest.raises(ConfigError, match="cannot listen at"):
        LiveServer([run], host="127.0.0.1", port=99_999)
    with LiveServer([run], host="127.0.0.1", port=None) as one, LiveServer([run], host="127.0.0.1", port=None) as two:
        assert one.server_address != two.server_address
        assert one.token != two.token


def test_what_goes_wrong_here_is_said(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr(RolloutIndex, "refresh", fail)
        status, body = ask(server, "/data/head")
    assert (status, body) == (500, b"RuntimeError: a fault of ours")
    assert "/data/head cannot be answered" in caplog.text
    assert data(server, "head")


def test_addresses_of_the_sixth_version(run: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        server = LiveServer([run], host="::1", port=0)
    except ConfigError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with server:
        assert server.url.startswith("http://[::1]:")


def test_a_wish_that_cannot_be_taken_away_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILES["stop"]).mkdir()
    leave_wish(tmp_path, "save")
    assert take_wishes(tmp_path) == ["save"]
    assert "wish.stop is passed over" in caplog.text
