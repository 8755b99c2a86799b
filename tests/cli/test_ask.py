"""Asking a server: real HTTP against a small server that speaks the protocol."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lserve.cli.ask import ask, wait_until_ready
from lserve.engine.errors import LServeError


class Handler(BaseHTTPRequestHandler):
    """Answers with what the test put into the server."""

    server: "Server"

    def do_GET(self) -> None:
        """/health, in the states that the test listed."""
        self.send_response(self.server.health.pop(0))
        self.end_headers()

    def do_POST(self) -> None:
        """A chat completion."""
        self.server.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.server.status)
        self.end_headers()
        for event in self.server.events:
            self.wfile.write(f"data: {event}\n\n".encode())

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


class Server(ThreadingHTTPServer):
    """What a test wants answered, and what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.health: list[int] = []
        self.status = 200
        self.events: list[str] = []
        self.body: dict[str, object] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    """A running server."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def piece(text: str) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}}]})


def test_the_answer_is_shown_as_it_comes_and_measured(server: Server) -> None:
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": 3}})
    first = json.dumps({"choices": [{"delta": {"role": "assistant"}}]})
    server.events = [first, piece("Par"), piece("is"), usage, "[DONE]"]
    shown: list[str] = []
    answer = ask(server.url, "m", "Where?", shown.append, api_key="k")
    assert "".join(shown) == answer.text == "Paris"
    assert answer.num_tokens == 3
    assert answer.ttft_s > 0
    assert answer.tokens_per_s > 0
    assert server.body["messages"] == [{"role": "user", "content": "Where?"}]


def test_a_refusal_is_an_error_with_the_servers_words(server: Server) -> None:
    server.status, server.events = 503, ["no workers"]
    with pytest.raises(LServeError, match="answered 503: data: no workers"):
        ask(server.url, "m", "Where?", lambda text: None)


def test_an_error_in_mid_stream_is_an_error(server: Server) -> None:
    server.events = [piece("Par"), json.dumps({"error": {"message": "worker lost"}})]
    with pytest.raises(LServeError, match="broke off: worker lost"):
        ask(server.url, "m", "Where?", lambda text: None)


def test_waiting_ends_with_the_first_200(server: Server) -> None:
    server.health = [503, 503, 200]
    wait_until_ready(server.url, 10.0)
    assert server.health == []


def test_waiting_has_an_end() -> None:
    with pytest.raises(LServeError, match="not ready after 0 s: ConnectError"):
        wait_until_ready("http://127.0.0.1:1", 0.2)
