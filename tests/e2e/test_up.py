"""`lserve up` as a user types it: an answer, lines to go on with that work as printed, nothing left after Ctrl-C."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from lserve.cli.demo_model import demo_model

ROOT = Path(__file__).parents[2]
START_S, STOP_S = 150, 60

pytestmark = [pytest.mark.slow, pytest.mark.timeout(START_S + STOP_S + 90)]


def _listen_to_ctrl_c() -> None:
    """A shell's background job ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Up:
    """A running `lserve up`, in a process group of its own as under a shell, and all that it ever started."""

    def __init__(self, folder: Path) -> None:
        demo_model()  # fetched by now, so that only the start counts
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log, self.temporary = folder / "log", folder / "tmp"
        self.temporary.mkdir()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lserve.cli.main", "up", "--port", str(self.port)],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(self.temporary)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_listen_to_ctrl_c,
            )
        self.started: set[psutil.Process] = set()

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        """Waits until the text is printed, taking note of every process meanwhile."""
        deadline = time.monotonic() + START_S
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            self.started |= set(psutil.Process(self.process.pid).children(recursive=True))
            time.sleep(0.1)

    def interrupt(self) -> int:
        """Ctrl-C; the exit status."""
        self.started |= set(psutil.Process(self.process.pid).children(recursive=True))
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(STOP_S)

    def left_over(self) -> list[str]:
        """Names of processes that are still there."""
        return [p.name() for p in self.started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    """A starting `lserve up`."""
    running = Up(tmp_path)
    yield running
    for process in [*running.started, psutil.Process(running.process.pid)] if running.process.poll() is None else []:
        if process.is_running():
            process.kill()


def test_it_answers_says_how_to_go_on_and_leaves_nothing_behind(up: Up) -> None:
    up.wait_for("until Ctrl-C")
    up.wait_for("print(answer")
    output = up.output
    assert "Paris" in output
    assert re.search(r"\d+ tokens; the first after \d+ ms, then [\d.]+ tokens/s", output)
    assert httpx.get(f"http://127.0.0.1:{up.port}/health").status_code == 200

    python = output[output.index("  from openai") :]
    lines = textwrap.dedent(python).strip().splitlines()
    assert len(lines) == 4
    answer = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert answer.stdout.strip()

    if shutil.which("curl"):
        (line,) = (line.strip() for line in output.splitlines() if line.strip().startswith("curl "))
        reply = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True).stdout
        assert json.loads(reply)["choices"][0]["message"]["content"]

    status = [sys.executable, "-m", "lserve.cli.main", "status", "--url", f"http://127.0.0.1:{up.port}"]
    assert (
        "smollm2-135m-instruct" in subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )

    reachable = {
        connection.laddr.ip
        for process in [*psutil.Process(up.process.pid).children(recursive=True)]
        if process.name() in ("gcs_server", "raylet", "ray::ProxyActor")
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert reachable <= {"127.0.0.1", "::ffff:127.0.0.1"}

    assert up.interrupt() == 0
    assert up.left_over() == []
    assert list(up.temporary.glob("lserve-*")) == []


def test_ctrl_c_while_it_starts_leaves_nothing_behind(up: Up) -> None:
    up.wait_for("starting Ray")
    assert up.interrupt() == 130
    assert up.left_over() == []
    assert list(up.temporary.glob("lserve-*")) == []
