"""`lserve up`: a whole cluster on this machine, from nothing to a streamed answer, until it is told to stop."""

import argparse
import json
import os
import secrets
import signal
from contextlib import ExitStack
from types import FrameType

import psutil
from rich.console import Console

from lserve.deployments.embedded_valkey import EmbeddedValkey
from lserve.deployments.settings import Settings, secret

from .ask import ask, wait_until_ready
from .local_cluster import check_port_is_free, local_ray, serving, watch
from .local_settings import local_settings
from .progress import Progress

QUESTION = "What is the capital of France, and what is it known for?"
READY_TIMEOUT_S = 120.0


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `up` to the command line."""
    parser = commands.add_parser(
        "up",
        allow_abbrev=False,
        help="serve a model on this machine",
        description="Serves a model on this machine. Every setting is also a flag: --decode.max_batch_size 8.",
    )
    parser.add_argument("file", nargs="?", help="YAML file with settings: the args: block of a Serve config")
    parser.add_argument("--model", help="local directory, Hugging Face id or GGUF file; default: a small demo model")
    parser.add_argument("--host", help="address to listen on; default 127.0.0.1")
    parser.add_argument("--port", help="port to listen on; default 8000")
    parser.add_argument("--dashboard", action="store_true", help="start Ray's dashboard too, on 127.0.0.1:8265")
    parser.add_argument("--no-question", action="store_true", help="do not ask the model a question once it is up")
    parser.set_defaults(run=run, takes_settings=True)


def run(options: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM. Returns 0 when it was up by then, else 130. Raises LServeError."""
    console = Console(highlight=False, soft_wrap=True)
    progress = Progress(console)
    is_up = False
    with ExitStack() as stack:
        stack.callback(progress.end)
        try:
            _stop_on_sigterm()
            settings, url, ray_processes = _start(options, progress, stack)
            if not options.no_question:
                _ask_first_question(console, settings, url)
            console.print(how_to_go_on(settings.served_name, url), markup=False)
            is_up = True
            watch(ray_processes)
        except KeyboardInterrupt:
            return 0 if is_up else 130
        finally:
            progress.end(failed=True)


def how_to_go_on(model: str, url: str) -> str:
    """What to type next: one curl line and four lines of Python."""
    messages = json.dumps([{"role": "user", "content": "Hello!"}])
    body = f'{{"model": {json.dumps(model)}, "max_tokens": 64, "messages": {messages}}}'
    return f"""
{model} is served at {url}/v1 until Ctrl-C.

With curl:
  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'

With Python:
  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  answer = client.chat.completions.create(model="{model}", max_tokens=64, messages={messages})
  print(answer.choices[0].message.content)
"""


def _start(
    options: argparse.Namespace, progress: Progress, stack: ExitStack
) -> tuple[Settings, str, list[psutil.Process]]:
    """Starts everything; the stack stops it. Returns the settings that run, the URL, and Ray's processes."""
    flags = {"router.host": options.host, "router.port": options.port}
    overrides = [*(f"{name}={value}" for name, value in flags.items() if value is not None), *options.overrides]
    settings = local_settings(options.file, options.model, overrides, progress.stage)
    check_port_is_free(settings.router.host, settings.router.port)
    os.environ.setdefault(settings.redis.secret_env, secrets.token_hex(32))
    if settings.redis.url is None:
        progress.stage("starting Valkey")
        valkey = stack.enter_context(EmbeddedValkey())
        settings = settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": valkey.url})})
    progress.stage("starting Ray")
    ray_processes = stack.enter_context(local_ray(settings, dashboard=options.dashboard))
    _stop_on_sigterm()  # Ray put its own handler in place
    progress.stage(f"loading {settings.served_name} into {_workers(settings)}{_about_weights(settings)}")
    url = stack.enter_context(serving(settings))
    stack.callback(progress.stage, "stopping; Ctrl-C again does not wait for answers in progress")
    wait_until_ready(url, READY_TIMEOUT_S)
    progress.end()
    return settings, url, ray_processes


def _ask_first_question(console: Console, settings: Settings, url: str) -> None:
    keys = (secret(settings.router.api_keys_env) or "").split(",")
    if settings.router.api_key_sha256 and not keys[0]:
        return  # only the hashes of keys are known here
    console.print(f"\n[bold]> {QUESTION}[/]")
    answer = ask(url, settings.served_name, QUESTION, lambda piece: print(piece, end="", flush=True), api_key=keys[0])
    console.print(
        f"\n[dim]{answer.num_tokens} tokens; the first after {answer.ttft_s * 1000:.0f} ms,"
        f" then {answer.tokens_per_s:.1f} tokens/s[/]"
    )


def _workers(settings: Settings) -> str:
    prefill, decode = settings.prefill.replicas, settings.decode.replicas
    return f"{prefill} prefill and {decode} decode workers" if prefill else f"{decode} unified workers"


def _about_weights(settings: Settings) -> str:
    if settings.model.weights == "native" or not settings.model.calibrate:
        return ""
    return f"; a first start with {settings.model.weights} weights calibrates them, which takes minutes"


def _stop_on_sigterm() -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
