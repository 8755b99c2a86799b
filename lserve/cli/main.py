"""Entry point of the `lserve` command: parses arguments, runs a subcommand, prints errors in one line."""

import argparse
import re
import sys
from collections.abc import Sequence

from lserve import __version__
from lserve.engine.errors import LServeError, SettingsError

from . import drain, eval, poc, profile, redis_node, status, up

_SETTING_FLAG = re.compile(r"--([a-z_]\w*(?:\.\w+)+)(?:=(.*))?", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status: 0 done, 1 failed, 130 interrupted before it was done."""
    try:
        rest, overrides = split_settings(sys.argv[1:] if arguments is None else arguments)
        options = _parser().parse_args(rest, argparse.Namespace(overrides=overrides))
        if overrides and not options.takes_settings:
            raise SettingsError(f"lserve {options.command} takes no settings, got {overrides[0]!r}")
        return int(options.run(options))
    except LServeError as error:
        print(f"lserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def split_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes settings (`--decode.max_batch_size 8` or `--decode.max_batch_size=8`) out of the arguments.

    Returns the other arguments, and the settings as `decode.max_batch_size=8`. Raises SettingsError without a value.
    """
    rest: list[str] = []
    overrides: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        flag = _SETTING_FLAG.fullmatch(argument)
        if flag is None:
            rest.append(argument)
            continue
        value = flag[2] if flag[2] is not None else next(remaining, None)
        if value is None:
            raise SettingsError(f"--{flag[1]} needs a value")
        overrides.append(f"{flag[1]}={value}")
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lserve", description="Long-context LLM serving on Ray Serve.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"lserve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up.add_command(commands)
    eval.add_command(commands)
    profile.add_command(commands)
    poc.add_command(commands)
    status.add_command(commands)
    redis_node.add_command(commands)
    drain.add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
