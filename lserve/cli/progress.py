"""Says what is being done, with a spinner on a terminal, and how long each stage took."""

import time

from rich.console import Console
from rich.status import Status


class Progress:
    """One stage at a time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._text, self._started = "", 0.0

    def stage(self, text: str) -> None:
        """Ends the stage before, and begins this one."""
        self.end()
        self._text, self._started = text, time.perf_counter()
        self._status = self._console.status(f"{text} ...")
        self._status.start()

    def end(self, *, failed: bool = False) -> None:
        """Ends the current stage, if there is one."""
        if self._status is None:
            return
        self._status.stop()
        self._status = None
        sign = "[red]✗[/]" if failed else "[green]✓[/]"
        self._console.print(f"{sign} {self._text} [dim]{time.perf_counter() - self._started:.1f} s[/]")
