"""What `lserve profile` has measured so far, in a file beside its output, so that an interrupted run goes on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lserve.engine.profile import HeadMeasures
from lserve.engine.profile_gate import Measurement


class ProfileState:
    """Measurements of one run. The file is written after each, and read only by a run with the same key.

    key: names everything that the measurements depend on. measures: per (text, layer), by head. gates: as
    optimised. measured: by the accuracy gate, by the digest of which heads stream.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self.measures: dict[tuple[int, int], dict[int, HeadMeasures]] = {}
        self.gates: list[list[float]] | None = None
        self.measured: dict[str, Measurement] = {}
        content = self._read()
        if content.get("key") == key:
            for text, layer, heads in content["measures"]:
                self.measures[text, layer] = {int(head): HeadMeasures(**values) for head, values in heads.items()}
            self.gates = content["gates"]
            self.measured = {digest: Measurement(**values) for digest, values in content["measured"].items()}

    def add_layer(self, text: int, layer: int, measures: dict[int, HeadMeasures]) -> None:
        """Keeps one layer's measures."""
        self.measures[text, layer] = measures
        self._write()

    def set_gates(self, gates: list[list[float]]) -> None:
        """Keeps optimised gates."""
        self.gates = gates
        self._write()

    def add_measurement(self, digest: str, measurement: Measurement) -> None:
        """Keeps what the accuracy gate measured."""
        self.measured[digest] = measurement
        self._write()

    def remove(self) -> None:
        """Deletes the file: the run is over."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self) -> None:
        content = {
            "key": self._key,
            "measures": [
                (*at, {head: asdict(values) for head, values in heads.items()}) for at, heads in self.measures.items()
            ],
            "gates": self.gates,
            "measured": {digest: asdict(measurement) for digest, measurement in self.measured.items()},
        }
        scratch = self._path.with_suffix(self._path.suffix + ".new")
        scratch.write_text(json.dumps(content), encoding="utf-8")
        scratch.replace(self._path)
