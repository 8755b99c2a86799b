"""Clients that stream one answer after the other and check that each is complete."""

import json
import threading

import httpx

STREAMS, TOKENS = 8, 120


class Clients:
    """Eight clients, each with one stream after the other until they are told to stop."""

    def __init__(self, url: str) -> None:
        self._url, self._stop = url, threading.Event()
        self.complete, self.failures = 0, list[str]()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(STREAMS)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        count = 0
        while not self._stop.is_set():
            count += 1
            try:
                self._stream(f"client {number}, stream {count} " * 60)
                self.complete += 1
            except Exception as error:
                self.failures.append(repr(error))

    def _stream(self, prompt: str) -> None:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=120) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
            assert response.status_code == 200, lines
        *events, done = lines
        assert done == "[DONE]", done
        chunks = [json.loads(event) for event in events]
        assert not [chunk for chunk in chunks if "error" in chunk]
        assert chunks[-1]["usage"]["completion_tokens"] == TOKENS
        finished = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
        assert finished[-1] == "length" and finished[:-1] == [None] * (len(finished) - 1)
