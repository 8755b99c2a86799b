"""`lserve profile`: finds the heads of a model that need no history, and proves how many of them may stream."""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, astuple, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lserve.engine.checkpoint import fingerprint, locate
from lserve.engine.config import EngineConfig
from lserve.engine.errors import SettingsError
from lserve.engine.head_profile import Evidence, HeadProfile, Matrix
from lserve.engine.loading import load
from lserve.engine.profile import HeadMeasures
from lserve.engine.profile_gate import within
from lserve.engine.weights import read_config
from lserve.engine.whole_sequence import Reach
from lserve.quality.heat_map import can_draw
from lserve.quality.text import load_text

from . import profile_picture
from .demo_model import demo_model
from .profile_check import Checked, check
from .profile_search import Found, Search
from .profile_state import ProfileState
from .profile_texts import ProfileTexts, make_texts

METHOD = "4"
"""Changes when the same texts would be measured otherwise, or kept otherwise in the meantime."""

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
    parser.add_argument("--length", type=int, default=5000, help="tokens of a document; default: %(default)s")
    parser.add_argument("--texts", type=int, default=6, help="that heads are measured on; default: %(default)s")
    parser.add_argument("--sink", type=int, default=128, help="first tokens that are kept; default: %(default)s")
    parser.add_argument("--window", type=int, default=256, help="last tokens that are kept; default: %(default)s")
    parser.add_argument(
        "--optimize",
        action="store_true",
        help="weigh all heads against each other by gradient too: twice the time",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(run=run, takes_settings=False)


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
    texts = make_texts(loaded.tokenizer, source, name, length, options.texts, options.seed)
    reach = Reach(options.sink, options.window)
    state = ProfileState(
        options.output.with_suffix(".partial"),
        _key(METHOD, identity, astuple(reach), options.max_loss, options.seed, asdict(texts)),
    )
    if state.measures:
        console.print(f"going on with what an earlier run has measured ({len(state.measures)} layers)")
    columns = TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        search = Search(loaded.model, texts, reach, options.max_loss, options.seed, state, progress)
        found = search.run(options.optimize)
    plain = HeadProfile(identity, reach.sink_size, reach.local_window, found.streaming)
    dense_profile = HeadProfile.none(len(found.streaming), len(found.streaming[0]), options.sink, options.window)
    with console.status("checking the profile in the engine"):
        ours, dense = (check(loaded, config, p, texts.documents[0]) for p in (plain, dense_profile))
    evidence = _evidence(options, name, texts, found, ours, dense, time.monotonic() - started)
    profile = HeadProfile(
        identity,
        reach.sink_size,
        reach.local_window,
        found.streaming,
        scores=found.scores,
        evidence=evidence,
        measures=_matrices(found),
        gate=tuple(tuple((k, _rounded(v)) for k, v in asdict(m).items()) for m in found.measurements),
    )
    profile.save(options.output)
    state.remove()
    _print(console, found, ours, dense, options)
    _draw(console, profile, options.output.with_suffix(".png"), options.max_loss)
    return 0


def _check_options(options: argparse.Namespace) -> None:
    HeadProfile.none(1, 1, options.sink, options.window)
    if not options.output.parent.is_dir():
        raise SettingsError(f"--output {options.output}: there is no directory {options.output.parent}")
    if options.texts < 1:
        raise SettingsError(f"--texts is at least 1, got {options.texts}")
    shortest = 6 * (options.sink + options.window)
    if options.length < shortest:
        raise SettingsError(
            f"--length {options.length} is too short: half of it must be three times what --sink {options.sink} and"
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


def _matrices(found: Found) -> tuple[tuple[str, Matrix], ...]:
    def matrix(rows: Iterable[Iterable[float]]) -> Matrix:
        return tuple(tuple(float(f"{value:.4g}") for value in row) for row in rows)

    names = [field.name for field in fields(HeadMeasures)]
    matrices = {name: matrix((getattr(head, name) for head in layer) for layer in found.measures) for name in names}
    if found.gates is not None:
        matrices["optimized_gate"] = matrix(found.gates)
    return tuple(matrices.items())


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
        "optimized": options.optimize,
        "calibration_facts": sum(len(set(text.mentions)) for text in texts.calibration),
        "calibration_tokens": sum(len(text.token_ids) for text in texts.calibration),
        "document_tokens": sum(len(document.token_ids) for document in texts.documents),
        "loss_rise": found.chosen.loss_rise,
        "loss_rise_standard_error": found.chosen.standard_error,
        "right": found.chosen.right,
        "right_dense": found.dense.right,
        "asked": found.chosen.asked,
        "answer_divergence": found.chosen.answer_divergence,
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
        mark = "[green]✓[/]" if within(m, options.max_loss) else "[red]✗[/]"
        console.print(
            f"{mark} {m.num_streaming:4d} streaming heads: loss {m.loss_rise:+.3%} (± {m.standard_error:.3%}),"
            f" {m.right} of {m.asked} facts recalled, answers moved {m.answer_divergence:.4f} nats"
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
    streaming = f"{profile.num_streaming_heads} of {total} stream"
    title = f"What each head's history is worth: at most {max_loss:.2%} of loss let {streaming}"
    profile_picture.draw(path, profile, title)
    console.print(f"{os.fspath(path)} shows it")
