"""`lserve eval`: what sparse attention and low-bit pages cost in quality, against dense attention, in one run."""

import argparse
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lserve import __version__
from lserve.deployments.settings import secret
from lserve.engine.errors import SettingsError
from lserve.engine.request import AttentionOptions
from lserve.quality import heat_map, report
from lserve.quality.asker import Asker
from lserve.quality.gates import Gate, parse_gate
from lserve.quality.registry import NEEDLES, TASKS, layouts
from lserve.quality.suite import Design, Result, State, run_suite
from lserve.quality.summary import Summary, TextRow, summarize
from lserve.quality.tasks import MAX_QUESTIONS
from lserve.quality.text import load_text

from .local_settings import local_settings

if TYPE_CHECKING:
    from lserve.quality.arms import Arm
    from lserve.quality.engine_asker import EngineAsker

DENSE = ("sparsity.token_budget=null", "sparsity.head_profile=null", "sparsity.prefill_sparse_from=null")
"""Fully dense: no budget, no streaming heads, no block estimator."""

MIN_LENGTH = 500
"""Tokens of the shortest document: below, the facts alone are longer."""

ANSWER_ROOM = 64
"""Tokens that a document may be longer than it was made for, with its question and reply."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `eval` to the command line."""
    parser = commands.add_parser(
        "eval",
        allow_abbrev=False,
        help="measure what sparsity costs in quality",
        description="Asks questions about long documents, densely and as the settings say, and compares. Every setting"
        " is also a flag: --sparsity.token_budget 2048. Exit status 1 when a gate fails.",
    )
    parser.add_argument("file", nargs="?", help="YAML file with settings: the args: block of a Serve config")
    parser.add_argument("--model", help="local directory, Hugging Face id or GGUF file; default: a small demo model")
    parser.add_argument("--url", help="ask this running endpoint instead, as it is and with dense attention")
    parser.add_argument("--baseline-url", help="compare with this endpoint, instead of with dense requests")
    parser.add_argument("--baseline", action="append", default=[], metavar="KEY=VALUE", help="setting of the baseline")
    parser.add_argument("--also", action="append", default=[], metavar="NAME:KEY=VALUE,...", help="one more arm")
    parser.add_argument("--budgets", type=_numbers, default=(), help="more arms: requests with these token budgets")
    parser.add_argument("--data", action="append", default=[], metavar="FILE", help="text to build documents of")
    parser.add_argument("--lengths", type=_numbers, default=(7500,), help="tokens, with commas; default 7500")
    parser.add_argument("--tasks", help=f"with commas, of: {', '.join(TASKS)}; default all")
    parser.add_argument("--documents", type=_count, default=10, help="of each length and task; default 10")
    parser.add_argument("--questions", type=_count, default=10, help="of each task in a document; default 10")
    parser.add_argument("--passages", type=int, default=2, help="of text, for bits per character; default 2, 0 is none")
    parser.add_argument("--passage-tokens", type=_count, default=5000, help="default 5000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--gate", action="append", default=[], metavar="METRIC<=NUMBER", help="such as loss<=2, bpc<=1%%"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--heat-map", type=Path, metavar="FILE", help="draw recall by depth and length there, as PNG")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep progress there, and go on from it")
    parser.set_defaults(run=run, takes_settings=True)


def run(options: argparse.Namespace) -> int:
    """Runs the suite; 0 when all gates held. Raises LServeError."""
    console = _console()
    gates = [parse_gate(gate) for gate in options.gate]
    tasks = tuple(TASKS) if options.tasks is None else tuple(name.strip() for name in options.tasks.split(","))
    design = Design(options.lengths, layouts(tasks), options.documents, options.questions, options.seed)
    source = load_text(options.data)
    _check(options, gates, console)
    engines: list[EngineAsker] = []
    if options.url:
        askers, settings = _endpoints(options)
    else:
        engines, settings = _engines(options, max(design.lengths), console)
        askers = list(engines)
    names = [asker.name for asker in askers]
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    passages = 0 if options.url else options.passages
    identity = {
        "lserve": __version__,
        "settings": settings,
        "design": asdict(design),
        "passages": [passages, options.passage_tokens],
        "text": digest,
    }
    state = State(options.state, identity)
    told: set[str] = set()

    def tell(text: str) -> None:
        if text not in told:
            told.add(text)
            console.print(f"[yellow]![/] {text}")

    try:
        with _progress(console, len(askers) * (passages + design.num_documents)) as done:
            text_rows: tuple[TextRow, ...] = ()
            if passages:
                from lserve.quality.reading import read_passages

                text_rows = read_passages(engines, source, passages, options.passage_tokens, state, tell, done)
            results = run_suite(design, askers, source, state, tell, done)
    finally:
        for asker in askers:
            asker.close()
    if not results:
        raise SettingsError("no document could be read by every arm: nothing was compared")
    summary = summarize(names, results, text_rows)
    return _finish(options, console, summary, gates, results, identity, state.seconds)


def _check(options: argparse.Namespace, gates: Sequence[Gate], console: Console) -> None:
    """Refuses early what would fail after an hour."""
    if options.url:
        given = {"--model": options.model, "FILE": options.file, "settings": options.overrides}
        given |= {"--baseline": options.baseline, "--also": options.also}
        for name, value in given.items():
            if value:
                raise SettingsError(f"{name} is for an engine in this process, not for --url {options.url}")
    elif options.baseline_url:
        raise SettingsError(f"--baseline-url {options.baseline_url} needs --url")
    if options.questions > MAX_QUESTIONS:
        raise SettingsError(f"--questions is at most {MAX_QUESTIONS}, got {options.questions}")
    if min(options.lengths) < MIN_LENGTH:
        raise SettingsError(f"--lengths start at {MIN_LENGTH} tokens, got {min(options.lengths)}")
    for gate in gates:
        if gate.needs_text and (options.url or options.passages < 1):
            raise SettingsError(f"gate {gate.written!r}: needs bits per character, which need --passages and no --url")
    for path in (options.json, options.heat_map, options.state):
        if path is not None and not path.absolute().parent.is_dir():
            raise SettingsError(f"there is no folder {path.parent} to write {path.name} to")
    if options.heat_map is not None and not heat_map.can_draw():
        console.print("[yellow]![/] no heat map: matplotlib is missing (pip install 'lserve\\[quality]')")


def _engines(
    options: argparse.Namespace, max_length: int, console: Console
) -> tuple[list["EngineAsker"], dict[str, Any]]:
    """Askers in this process: the baseline, the settings as given, and the further arms."""
    from lserve.quality.arms import Arm, open_arms

    def config(*overrides: str) -> Any:
        chosen = local_settings(options.file, options.model, [*options.overrides, *overrides], _telling(console))
        return chosen.engine_config()

    longest = max(max_length, options.passage_tokens if options.passages else 0) + ANSWER_ROOM
    arms = [Arm("dense", config(*DENSE, *options.baseline), AttentionOptions(dense=True)), Arm("sparse", config())]
    for budget in options.budgets:
        sparsity = arms[1].config.sparsity
        raised = replace(sparsity, token_budget=budget, max_token_budget=max(budget, sparsity.max_token_budget))
        arms.append(Arm(f"budget {budget}", replace(arms[1].config, sparsity=raised)))
    for text in options.also:
        name, colon, values = text.partition(":")
        if not name or not colon:
            raise SettingsError(f"--also is written NAME:KEY=VALUE,KEY=VALUE, got {text!r}")
        arms.append(Arm(name, config(*values.split(","))))
    if len({arm.name for arm in arms}) < len(arms):
        raise SettingsError(f"every arm needs its own name, got {', '.join(arm.name for arm in arms)}")
    console.print(f"loading {Path(arms[0].config.model).name} for {', '.join(arm.name for arm in arms)}")
    askers = open_arms(arms, longest)
    return askers, {arm.name: _told(arm, asker) for arm, asker in zip(arms, askers, strict=True)}


def _told(arm: "Arm", asker: "EngineAsker") -> dict[str, Any]:
    """An arm's settings without this machine's paths; the format id tells weights and profiles of one name apart."""
    settings = asdict(arm.config) | {"format_id": asker.engine.page_format.format_id}
    settings["model"] = Path(arm.config.model).name
    if arm.config.sparsity.head_profile is not None:
        settings["sparsity"]["head_profile"] = Path(arm.config.sparsity.head_profile).name
    return settings


def _endpoints(options: argparse.Namespace) -> tuple[list[Asker], dict[str, Any]]:
    """Askers of running endpoints: the baseline (dense requests, or another endpoint), as it is, and with budgets."""
    from lserve.quality.http_asker import HttpAsker

    key = (secret("LSERVE_API_KEYS") or "").split(",")[0] or None
    sparse = HttpAsker("sparse", options.url, api_key=key)
    if options.baseline_url:
        baseline = HttpAsker("baseline", options.baseline_url, api_key=key)
    elif sparse.is_lserve:
        baseline = HttpAsker("dense", options.url, {"dense": True}, api_key=key)
    else:
        raise SettingsError(f"{options.url} is not LServe, so it cannot be asked densely: name a --baseline-url")
    budgets = [
        HttpAsker(f"budget {budget}", options.url, {"token_budget": budget}, api_key=key) for budget in options.budgets
    ]
    askers = [baseline, sparse, *budgets]
    return list(askers), {asker.name: {"url": asker.url, "model": asker.model} for asker in askers}


def _finish(
    options: argparse.Namespace,
    console: Console,
    summary: Summary,
    gates: Sequence[Gate],
    results: Sequence[Result],
    identity: dict[str, Any],
    seconds: float,
) -> int:
    verdicts = [gate.judge(summary) for gate in gates]
    tables = [report.task_table(summary), report.loss_table(summary)]
    for table in [*tables, *([report.text_table(summary)] if summary.text else [])]:
        if table.row_count:
            console.print()
            console.print(table)
    overall = [loss for loss in summary.losses if loss.length is None]
    console.print()
    for loss in overall:
        console.print(report.headline(loss, summary.arms[0]))
    if not overall:
        console.print(f"{summary.arms[0]} finds less than half in every task: nothing can be compared at this length")
    for verdict in verdicts:
        console.print(report.gate_line(verdict), style=None if verdict.passed else "red")
    if options.json is not None:
        hardware = {"machine": platform.machine(), "python": platform.python_version(), "seconds": round(seconds, 1)}
        content = report.as_json(summary, verdicts, {**identity, **hardware})
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.heat_map is not None and heat_map.can_draw():
        title = f"facts found by depth: {', '.join(f'{length:,}' for length in options.lengths)} tokens"
        if not heat_map.draw(options.heat_map, results, summary.arms, NEEDLES, title):
            console.print("[yellow]![/] no heat map: no needle task was run")
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def _console() -> Console:
    """Tables need room: a file or pipe gets wide lines."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("reading and asking", total=total)
        yield lambda: progress.advance(bar)


def _telling(console: Console) -> Callable[[str], None]:
    return lambda stage: console.print(f"{stage} ...")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise SettingsError(f"a count is a whole number from 1 on, got {text!r}")
    return int(text)
