"""`lserve profile`: finds the heads of a model that need no history, and proves how many of them may stream."""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lserve.engine.checkpoint import fingerprint, locate
from lserve.engine.config import EngineConfig
from lserve.engine.errors import SettingsError
from lserve.engine.head_profile import Evidence, HeadProfile, Matrix
from lserve.engine.loading import LoadedModel, load
from lserve.engine.profile import HeadMeasures, HeadScorer, rank, streaming_heads
from lserve.engine.profile_gate import Gate, Measurement, largest_passing, within
from lserve.engine.weights import read_config
from lserve.engine.whole_sequence import Reach
from lserve.quality.heat_map import can_draw
from lserve.quality.text import load_text

from . import profile_picture
from .demo_model import demo_model
from .profile_check import Checked, check
from .profile_state import ProfileState
from .profile_texts import ProfileTexts, make_texts

METHOD = "1"
"""Changes when the same texts would be measured otherwise."""

DEFAULT_TEXT = "Python's language reference"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `profile` to the command line."""
    parser = commands.add_parser(
        "profile",
        allow_abbrev=False,
        help="find the heads of a model that need no history",
        description="Measures every KV head of a model, and writes a head profile with as many streaming heads as keep"
        " loss and recall within bounds on texts that the measuring never saw. Interrupted, it goes on where it was.",
    )
    parser.add_argument("--model", help="local directory, Hugging Face id or GGUF file; default: a small demo model")
    parser.add_argument(
        "--data", action="append", default=[], metavar="FILE", help=f"text to measure on; default: {DEFAULT_TEXT}"
    )
    parser.add_argument("--output", type=Path, default=Path("head-profile.json"), help="default: %(default)s")
    parser.add_argument("--max-loss", type=_share, default=0.003, metavar="0.3%", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=7500, help="longest text, in tokens; default: %(default)s")
    parser.add_argument("--sink", type=int, default=128, help="first tokens that are kept; default: %(default)s")
    parser.add_argument("--window", type=int, default=256, help="last tokens that are kept; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(run=run, takes_settings=False)


@dataclass(frozen=True, slots=True)
class Found:
    """What the search gave: per head its measures and score, the gate's measurements, and the profile's own."""

    measures: tuple[tuple[HeadMeasures, ...], ...]
    scores: Matrix
    dense: Measurement
    measurements: tuple[Measurement, ...]
    chosen: Measurement
    streaming: tuple[tuple[bool, ...], ...]


def run(options: argparse.Namespace) -> int:
    """Writes the profile and its picture. Raises LServeError."""
    console, started = Console(highlight=False, soft_wrap=True), time.monotonic()
    _check_options(options)
    path = str(locate(options.model) if options.model else demo_model(console.print))
    length = min(options.length, read_config(path).max_position - 64)
    source = load_text(options.data)
    with console.status("loading the model"):
        config = EngineConfig(model=path, device=options.device, compute_dtype="float32")
        loaded, identity = load(config), fingerprint(path)
    name = ", ".join(options.data) or DEFAULT_TEXT
    texts = make_texts(loaded.tokenizer, source, name, length, options.seed)
    reach = Reach(options.sink, options.window)
    state = ProfileState(
        options.output.with_suffix(".partial"),
        _key(METHOD, identity, astuple(reach), options.max_loss, options.seed, asdict(texts)),
    )
    if state.resumed:
        console.print(f"going on with what an earlier run measured: {len(state.measures)} layers")
    found = search(loaded, texts, reach, options.max_loss, options.seed, state, console)
    plain = HeadProfile(identity, reach.sink_size, reach.local_window, found.streaming)
    dense_profile = HeadProfile.none(len(found.streaming), len(found.streaming[0]), options.sink, options.window)
    with console.status("checking the profile in the engine"):
        ours, dense = (check(loaded, config, p, texts.passages[0], texts.documents[0]) for p in (plain, dense_profile))
    evidence = _evidence(options, name, texts, found, ours, dense, time.monotonic() - started)
    profile = HeadProfile(
        identity,
        reach.sink_size,
        reach.local_window,
        found.streaming,
        scores=found.scores,
        evidence=evidence,
        measures=_matrices(found.measures),
        gate=tuple(tuple((k, _rounded(v)) for k, v in asdict(m).items()) for m in found.measurements),
    )
    profile.save(options.output)
    state.remove()
    _print(console, found, ours, dense, options)
    _draw(console, profile, options.output.with_suffix(".png"), options.max_loss)
    return 0


def search(
    loaded: LoadedModel,
    texts: ProfileTexts,
    reach: Reach,
    max_loss: float,
    seed: int,
    state: ProfileState,
    console: Console,
) -> Found:
    """Measures the heads, ranks them, and asks the gate how many may stream."""
    model = loaded.model
    shape = model.config.num_layers, model.config.num_kv_heads
    columns = TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("measuring heads", total=len(texts.calibration) * shape[0] * shape[1])
        losses = []
        for number, text in enumerate(texts.calibration):
            scorer = HeadScorer(model, text, reach, seed)
            losses.append(scorer.dense_loss)
            for layer in range(shape[0]):
                if (number, layer) in state.measures:
                    scorer.skip()
                else:
                    state.add_layer(number, layer, scorer.next_layer())
                progress.advance(bar, shape[1])
        measures = tuple(
            tuple(
                HeadMeasures.mean([state.measures[number, layer][head] for number in range(len(losses))])
                for head in range(shape[1])
            )
            for layer in range(shape[0])
        )
        loss = sum(losses) / len(losses)
        scores = tuple(tuple(float(f"{m.cost(loss, max_loss):.4g}") for m in layer) for layer in measures)
        ranking = rank(scores)
        gate: Gate | None = None
        bar = progress.add_task("trying profiles", total=None)

        def measure(count: int) -> Measurement:
            nonlocal gate
            streaming = streaming_heads(ranking, count, *shape)
            digest = HeadProfile("", reach.sink_size, reach.local_window, streaming).digest
            if digest not in state.gate:
                gate = gate or Gate(model, texts.passages, texts.documents, reach)
                progress.update(bar, description=f"trying {count} streaming heads")
                state.add_gate(digest, gate.measure(streaming))
            progress.advance(bar)
            return state.gate[digest]

        measured = {0: measure(0)}

        def passes(count: int) -> bool:
            measured[count] = measure(count)
            return within(measured[count], measured[0], max_loss)

        count = largest_passing(len(ranking), _guess(scores, ranking), passes)
        progress.update(bar, description="trying profiles", total=len(measured))
    in_order = tuple(measured[count] for count in sorted(measured))
    return Found(measures, scores, measured[0], in_order, measured[count], streaming_heads(ranking, count, *shape))


def _guess(scores: Matrix, ranking: Sequence[tuple[int, int]]) -> int:
    """How many heads use up what is allowed, if costs add up."""
    total = 0.0
    for number, (layer, head) in enumerate(ranking):
        total += scores[layer][head]
        if total > 1:
            return number
    return len(ranking)


def _check_options(options: argparse.Namespace) -> None:
    HeadProfile.none(1, 1, options.sink, options.window)
    if not options.output.parent.is_dir():
        raise SettingsError(f"--output {options.output}: there is no directory {options.output.parent}")
    shortest = 6 * (options.sink + options.window)
    if options.length < shortest:
        raise SettingsError(
            f"--length {options.length} is too short: a third of it must be twice what --sink {options.sink} and"
            f" --window {options.window} keep, {shortest} in all"
        )


def _share(text: str) -> float:
    """`0.3%` or `0.003`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share such as 0.3%, got {text!r}")
    return value


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=list).encode()).hexdigest()


def _rounded(value: Evidence) -> Evidence:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _matrices(measures: tuple[tuple[HeadMeasures, ...], ...]) -> tuple[tuple[str, Matrix], ...]:
    return tuple(
        (field.name, tuple(tuple(float(f"{getattr(head, field.name):.4g}") for head in layer) for layer in measures))
        for field in fields(HeadMeasures)
    )


def _evidence(
    options: argparse.Namespace,
    name: str,
    texts: ProfileTexts,
    found: Found,
    ours: Checked,
    dense: Checked,
    seconds: float,
) -> tuple[tuple[str, Evidence], ...]:
    values: dict[str, Evidence] = {
        "method": f"lserve profile {METHOD}",
        "text": name,
        "texts_digest": _key(asdict(texts))[:16],
        "seed": options.seed,
        "max_loss": options.max_loss,
        "calibration_tokens": sum(len(text.token_ids) for text in texts.calibration),
        "passage_tokens": max(map(len, texts.passages)),
        "document_tokens": max(len(document.token_ids) for document in texts.documents),
        "loss_rise": found.chosen.loss_rise,
        "loss_rise_standard_error": found.chosen.standard_error,
        "right": found.chosen.right,
        "right_dense": found.dense.right,
        "asked": found.chosen.asked,
        "engine_loss_rise": ours.bits / dense.bits - 1,
        "engine_right": ours.right,
        "engine_right_dense": dense.right,
        "engine_asked": ours.asked,
        "seconds": round(seconds),
        "device": options.device,
        "threads": torch.get_num_threads(),
    }
    return tuple((key, _rounded(value)) for key, value in values.items())


def _print(console: Console, found: Found, ours: Checked, dense: Checked, options: argparse.Namespace) -> None:
    chosen, total = found.chosen, sum(map(len, found.streaming))
    for m in found.measurements:
        mark = "[green]✓[/]" if within(m, found.dense, options.max_loss) else "[red]✗[/]"
        console.print(
            f"{mark} {m.num_streaming:4d} streaming heads: loss {m.loss_rise:+.3%} (± {m.standard_error:.3%}),"
            f" {m.right} of {m.asked} facts recalled"
        )
    console.print(
        f"\n[bold]{chosen.num_streaming} of {total} KV heads stream[/] ({chosen.num_streaming / total:.0%})."
        f" In the engine: loss {ours.bits / dense.bits - 1:+.3%}, {ours.right} of {ours.asked} facts recalled"
        f" (dense: {dense.right}).\n{options.output} is the profile: --sparsity.head_profile {options.output}"
    )


def _draw(console: Console, profile: HeadProfile, path: Path, max_loss: float) -> None:
    if not can_draw():
        console.print("no picture: matplotlib is not installed (the extra `quality` brings it)")
        return
    total = profile.num_layers * profile.num_kv_heads
    title = f"What each head's history is worth: {profile.num_streaming_heads} of {total} stream (loss +{max_loss:.2%})"
    profile_picture.draw(path, profile, title)
    console.print(f"{os.fspath(path)} shows it")
