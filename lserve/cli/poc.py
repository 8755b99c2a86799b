"""`lserve poc`: what sparse attention brings on the user's own documents, in one report."""

import argparse
import datetime
import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lserve import __version__
from lserve.deployments.settings import secret
from lserve.engine.config import SparsityConfig
from lserve.engine.errors import LServeError, SettingsError
from lserve.poc.questions import Places, Question, read_questions
from lserve.poc.readers import SourceDocument, Tell, read_documents

from .local_settings import local_settings

if TYPE_CHECKING:  # it brings torch
    from lserve.poc.settings import Setting

DEFAULT_LIMIT = 131_072
"""Longest prompt, in tokens, where neither the model nor the user sets a lower one."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `poc` to the command line."""
    parser = commands.add_parser(
        "poc",
        allow_abbrev=False,
        help="measure on your own documents whether sparsity pays",
        description="Reads documents (txt, md, html, pdf, docx), asks questions about them with full and with sparse "
        "attention, and writes one HTML report: speed, memory, quality and cost. Every setting is also a flag.",
    )
    parser.add_argument("documents", nargs="+", metavar="DOCS", help="folders or files")
    parser.add_argument("--model", help="local directory, Hugging Face id or GGUF file; default: a small demo model")
    parser.add_argument("--settings", metavar="FILE", help="YAML file with settings: the args: block of a Serve config")
    parser.add_argument("--profile", metavar="FILE", help="head profile of the model; default: the settings'")
    parser.add_argument("--url", help="measure this running LServe endpoint instead of a model in this process")
    parser.add_argument("--baseline-url", help="full attention is what this endpoint does, instead of dense requests")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="CSV: a question, its expected answer per line")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=30.0, help="time to spend; default: %(default)g")
    parser.add_argument("--max-length", type=int, help="longest prompt in tokens; default: the model's limit")
    parser.add_argument("--max-loss", type=float, default=2.0, help="points of 100 that may be lost; default 2")
    parser.add_argument("--answer-tokens", type=int, default=200, help="of the answers that are priced; default 200")
    parser.add_argument("--gpus", type=int, help="GPUs behind --url, to give the cost in GPU-seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run, takes_settings=True)


def run(options: argparse.Namespace) -> int:
    """Measures and writes the report. Raises LServeError."""
    console = Console(highlight=False)
    problems: list[str] = []

    def tell(problem: str) -> None:
        problems.append(problem)
        console.print(f"[yellow]![/] {problem}", markup=True) if "[" not in problem else console.print("!", problem)

    _check(options)
    documents = read_documents(options.documents, tell)
    questions = read_questions(options.questions, tell) if options.questions else []
    characters = sum(len(document.text) for document in documents)
    console.print(f"{len(documents)} documents, {characters:,} characters; {len(questions)} questions of yours")
    target = _endpoint(options) if options.url else _model(options, console, tell)
    return _study(options, console, documents, questions, target, tell, problems)


@dataclass(frozen=True, slots=True)
class _Target:
    """What is measured. make_settings: from the longest prompt. limit: of a prompt, tokens. second: of what cost is."""

    make_settings: "Callable[[int], list[Setting]]"
    limit: int
    model: str
    machine: str
    second: str


def _study(
    options: argparse.Namespace,
    console: Console,
    documents: Sequence[SourceDocument],
    questions: Sequence[Question],
    target: _Target,
    tell: Tell,
    problems: list[str],
) -> int:
    from lserve.poc.advice import Advice
    from lserve.poc.report import RunFacts, headline, problem_lines, write_report
    from lserve.poc.study import Study

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=options.minutes * 60)

        def say(doing: str, seconds: float) -> None:
            progress.update(bar, description=doing, completed=min(seconds, options.minutes * 60))

        places = Places(documents)
        study = Study(
            target.make_settings, target.limit, places, questions, options.minutes, tell, say, seed=options.seed
        )
        findings = study.run()
    if not findings.results or not findings.lengths:
        raise LServeError("nothing was measured: no document could be read by every setting, or it was interrupted")
    if all(setting.budget is None for setting in study.settings):
        longest = f"prompts of {max(findings.lengths):,} tokens"
        tell(f"{longest} are too short to leave anything out: no sparse setting was tried")
    advice = Advice(study.settings, findings, options.max_loss, options.answer_tokens, options.gpus or 1)
    kinds = Counter(document.kind for document in documents).most_common()
    facts = RunFacts(
        model=target.model,
        machine=target.machine,
        second=target.second,
        version=__version__,
        date=datetime.date.today().isoformat(),
        documents=tuple(kinds),
        characters=len(places.text),
        minutes=options.minutes,
        problems=problem_lines(problems),
        url=options.url,
        price_note=_price_note(options),
        serve_command="lserve up settings.yaml" + (f" --model {options.model}" if options.model else ""),
    )
    try:
        write_report(options.output, advice, facts)
    except OSError as error:
        raise SettingsError(f"cannot write {options.output}: {error.strerror}") from None
    title, reason = headline(advice)
    console.print(f"\n[bold]{title}[/]\n{reason}\n\nThe report is in {options.output}")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuses early what would fail after half an hour."""
    if options.url:
        given = {"--model": options.model, "--settings": options.settings, "--profile": options.profile}
        for name, value in {**given, "settings": options.overrides}.items():
            if value:
                raise SettingsError(f"{name} is for a model in this process, not for --url {options.url}")
    elif options.baseline_url or options.gpus:
        raise SettingsError("--baseline-url and --gpus need --url")
    for name in ("minutes", "max_loss", "answer_tokens", "max_length"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise SettingsError(f"--{name.replace('_', '-')} must be more than 0, got {value:g}")
    if not options.output.absolute().parent.is_dir():
        raise SettingsError(f"there is no folder {options.output.parent} to write {options.output.name} to")


def _model(options: argparse.Namespace, console: Console, tell: Tell) -> _Target:
    """Engines in this process."""
    from lserve.engine.weights import read_config
    from lserve.poc.settings import ROOM, Engines, budgets_for, engine_settings, open_engines, usable_profile

    settings = local_settings(
        options.settings, options.model, options.overrides, lambda stage: console.print(f"{stage} ...")
    )
    config = settings.engine_config()
    path = options.profile or config.sparsity.head_profile
    profile = usable_profile(path, config.model, tell)
    limit = min(read_config(config.model).max_position - ROOM, options.max_length or DEFAULT_LIMIT)
    console.print(f"loading {settings.served_name} for prompts of up to {limit:,} tokens")
    engines: Engines = open_engines(config, None if profile is None else path, limit)
    machine, second = _machine(config.device)
    return _Target(
        lambda length: engine_settings(engines, budgets_for(length, config.sparsity)),
        limit,
        settings.served_name,
        machine,
        second,
    )


def _endpoint(options: argparse.Namespace) -> _Target:
    """Endpoints that run somewhere."""
    from lserve.poc.settings import ROOM, budgets_for, endpoint_limit, endpoint_settings

    key = (secret("LSERVE_API_KEYS") or "").split(",")[0] or None
    model, most = endpoint_limit(options.url, key)
    limit = min(most - ROOM, options.max_length or DEFAULT_LIMIT)
    second = f"GPU-seconds ({options.gpus} GPUs)" if options.gpus else "endpoint-seconds"
    return _Target(
        lambda length: endpoint_settings(options.url, options.baseline_url, budgets_for(length, SparsityConfig()), key),
        limit,
        model,
        f"the endpoint {options.url}",
        second,
    )


def _machine(device: str) -> tuple[str, str]:
    """The machine in words, and what a second of it is called."""
    if device.startswith("cuda"):
        import torch

        return f"one {torch.cuda.get_device_name()}", "GPU-seconds"
    import torch

    cores = min(len(os.sched_getaffinity(0)), torch.get_num_threads())
    words = f"{cores} CPU core{'s' if cores > 1 else ''}"
    return f"{words} ({_cpu_name()})", f"machine-seconds ({words})"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def _price_note(options: argparse.Namespace) -> str:
    if not options.url:
        return "3,600 of them are one hour of this machine."
    if options.gpus:
        return f"Seconds of the endpoint times its {options.gpus} GPUs."
    return "Seconds of the whole endpoint: multiply them by the machines behind it."
