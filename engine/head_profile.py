"""The head profile: a file that says, per layer and KV head, whether the head retrieves or streams, and why.

The file is JSON, one line a layer, so that people can read and compare it:

    {
      "lserve_head_profile": 1,
      "model_fingerprint": "9f86d081884c7d65",
      "sink_size": 128,
      "local_window": 256,
      "heads": [
        "RSR",
        "SSR"
      ],
      "scores": [
        [0.91, 0.08, 0.77],
        [0.11, 0.02, 0.64]
      ],
      "measures": {
        "text_divergence": [[0.0102, 0.0003, 0.0081], [0.0004, 0.0001, 0.0055]]
      },
      "gate": [
        {"num_streaming": 3, "loss_rise": 0.0011, "right": 24},
        {"num_streaming": 4, "loss_rise": 0.0052, "right": 22}
      ],
      "evidence": {
        "text": "essays.txt",
        "loss_rise": 0.0011
      }
    }

R is a retrieval head, S a streaming head; what comes after the heads may be absent. `lserve profile` writes it.
"""

import hashlib
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from .config import PAGE_SIZE
from .errors import FormatMismatchError, SettingsError

FORMAT_VERSION = 1
_VERSION_KEY = "lserve_head_profile"

Evidence = str | int | float | bool
"""One recorded fact about how a profile was made."""

Matrix = tuple[tuple[float, ...], ...]
"""One number per head: [layers][KV heads]."""


@dataclass(frozen=True, slots=True)
class HeadProfile:
    """Which KV heads stream.

    model_fingerprint: of the weights it was made for; empty fits every model.
    sink_size, local_window: tokens, positive multiples of 64, for all streaming heads.
    streaming: [layers][KV heads]. scores: the same shape, higher means that the head needs its history more.
    measures: (name, matrix) pairs: what the scores were made of. gate: what profiles with so many streaming heads were
    measured to keep, as (name, value) pairs. evidence: the same of this one, and how it was found.
    """

    model_fingerprint: str
    sink_size: int
    local_window: int
    streaming: tuple[tuple[bool, ...], ...]
    scores: Matrix | None = None
    evidence: tuple[tuple[str, Evidence], ...] = ()
    measures: tuple[tuple[str, Matrix], ...] = ()
    gate: tuple[tuple[tuple[str, Evidence], ...], ...] = ()

    def __post_init__(self) -> None:
        for name, tokens in (("sink_size", self.sink_size), ("local_window", self.local_window)):
            if type(tokens) is not int or tokens <= 0 or tokens % PAGE_SIZE:
                raise SettingsError(f"head profile: {name} must be a positive multiple of {PAGE_SIZE}, got {tokens!r}")
        widths = [len(layer) for layer in self.streaming]
        if not widths or min(widths) < 1 or min(widths) != max(widths):
            raise SettingsError(f"head profile: every layer must have the same number of KV heads, got {widths}")
        matrices = {} if self.scores is None else {"scores": self.scores}
        for name, matrix in (matrices | dict(self.measures)).items():
            if [len(layer) for layer in matrix] != widths:
                shape = [len(layer) for layer in matrix]
                raise SettingsError(f"head profile: {name} must have one number per head, {widths}, got {shape}")
            if not all(math.isfinite(number) for layer in matrix for number in layer):
                raise SettingsError(f"head profile: {name} must be finite numbers")

    @property
    def num_layers(self) -> int:
        """Layers it covers."""
        return len(self.streaming)

    @property
    def num_kv_heads(self) -> int:
        """KV heads per layer."""
        return len(self.streaming[0])

    @property
    def num_streaming_heads(self) -> int:
        """Streaming heads in all layers together."""
        return sum(sum(layer) for layer in self.streaming)

    @property
    def digest(self) -> str:
        """Names what changes attention: heads, sink and window. Scores and evidence are left out."""
        rules = [self.sink_size, self.local_window, _letters(self.streaming)]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:32]

    @classmethod
    def none(cls, num_layers: int, num_kv_heads: int, sink_size: int = 128, local_window: int = 256) -> Self:
        """The profile without streaming heads, for any model of this shape: every head keeps its history."""
        return cls("", sink_size, local_window, ((False,) * num_kv_heads,) * num_layers)

    def check(self, model_fingerprint: str, num_layers: int, num_kv_heads: int) -> None:
        """Raise FormatMismatchError unless the profile was made for this model."""
        if (self.num_layers, self.num_kv_heads) != (num_layers, num_kv_heads):
            raise FormatMismatchError(
                f"the head profile has {self.num_layers} layers of {self.num_kv_heads} KV heads, "
                f"the model {num_layers} of {num_kv_heads}"
            )
        if self.model_fingerprint not in ("", model_fingerprint):
            raise FormatMismatchError(
                f"the head profile was made for model {self.model_fingerprint}, this model is {model_fingerprint}"
            )

    def save(self, path: Path) -> None:
        """Write the profile as the JSON shown above."""
        content: dict[str, Any] = {
            _VERSION_KEY: FORMAT_VERSION,
            "model_fingerprint": self.model_fingerprint,
            "sink_size": self.sink_size,
            "local_window": self.local_window,
            "heads": _letters(self.streaming),
        }
        if self.scores is not None:
            content["scores"] = [list(layer) for layer in self.scores]
        if self.measures:
            content["measures"] = dict(self.measures)
        if self.gate:
            content["gate"] = [dict(row) for row in self.gate]
        if self.evidence:
            content["evidence"] = dict(self.evidence)
        lines = [f"  {json.dumps(name)}: {_pretty(value)}" for name, value in content.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a profile; raises SettingsError, naming the file and the field, for anything but a well-formed one."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
            raise SettingsError(f"head profile {path} cannot be read: {error}") from None
        except RecursionError:
            raise SettingsError(f"head profile {path} cannot be read: nested too deep") from None
        try:
            return cls(**_parse(content))
        except SettingsError as error:
            raise SettingsError(f"{path}: {error.message}") from None


def _letters(streaming: tuple[tuple[bool, ...], ...]) -> list[str]:
    return ["".join("S" if streams else "R" for streams in layer) for layer in streaming]


def _pretty(value: Any) -> str:
    """JSON with one line for each entry of the outermost list or object."""
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"    {_json(item)}" for item in value) + "\n  ]"
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"    {_json(name)}: {_json(item)}" for name, item in value.items()) + "\n  }"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parse(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get(_VERSION_KEY) != FORMAT_VERSION:
        version = content.get(_VERSION_KEY) if isinstance(content, dict) else None
        raise SettingsError(f"head profile: {_VERSION_KEY} must be {FORMAT_VERSION}, got {version!r}")
    known = {_VERSION_KEY, "heads", *(field.name for field in fields(HeadProfile))} - {"streaming"}
    for name in content.keys() - known:
        raise SettingsError(f"head profile: unknown field {name!r}")
    for name, kind in (("model_fingerprint", str), ("sink_size", int), ("local_window", int), ("heads", list)):
        if not isinstance(content.get(name), kind):
            raise SettingsError(f"head profile: {name} must be of type {kind.__name__}, got {content.get(name)!r}")
    for index, layer in enumerate(content["heads"]):
        if not isinstance(layer, str) or set(layer) - {"R", "S"}:
            raise SettingsError(f"head profile: heads[{index}] must be a string of R and S, got {layer!r}")
    return {
        "model_fingerprint": content["model_fingerprint"],
        "sink_size": content["sink_size"],
        "local_window": content["local_window"],
        "streaming": tuple(tuple(letter == "S" for letter in layer) for layer in content["heads"]),
        "scores": None if content.get("scores") is None else _parse_matrix("scores", content["scores"]),
        "measures": _parse_measures(content.get("measures", {})),
        "gate": _parse_gate(content.get("gate", [])),
        "evidence": _parse_evidence("evidence", content.get("evidence", {})),
    }


def _parse_matrix(name: str, matrix: Any) -> Matrix:
    try:
        return tuple(tuple(float(number) for number in layer) for layer in matrix)
    except (TypeError, ValueError, OverflowError):
        raise SettingsError(f"head profile: {name} must be a list of lists of numbers") from None


def _parse_measures(measures: Any) -> tuple[tuple[str, Matrix], ...]:
    if not isinstance(measures, dict):
        raise SettingsError(f"head profile: measures must map names to lists of lists of numbers, got {measures!r}")
    return tuple((name, _parse_matrix(name, matrix)) for name, matrix in measures.items())


def _parse_gate(rows: Any) -> tuple[tuple[tuple[str, Evidence], ...], ...]:
    if not isinstance(rows, list):
        raise SettingsError(f"head profile: gate must be a list, got {rows!r}")
    return tuple(_parse_evidence(f"gate[{index}]", row) for index, row in enumerate(rows))


def _parse_evidence(name: str, evidence: Any) -> tuple[tuple[str, Evidence], ...]:
    if not isinstance(evidence, dict) or not all(isinstance(value, Evidence) for value in evidence.values()):
        raise SettingsError(f"head profile: {name} must map names to strings or numbers, got {evidence!r}")
    return tuple(evidence.items())
