"""The `bract` command: a table of strings, so that `bract --help` imports nothing heavy.

The strings are the one permitted reference from this floor upward.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from bract.shared import garbage, logs
from bract.shared.errors import BractError

# The private step and the ledger stand on these; nothing of Flower may phone home meanwhile.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

# How a process of ours starts another that runs a command.
PROGRAM = (sys.executable, "-c", "from bract.shared.cli import main; main()")

COMMANDS = {
    "simulate": ("bract.simulations.commands:simulate", "Train over many sites on this machine."),
    "calibrate": (
        "bract.shared.commands.calibrate:calibrate",
        "The noise for a budget, and what it buys.",
    ),
    "contract": (
        "bract.shared.commands.contract:contract",
        "Propose a run; read one.",
    ),
    "server": ("bract.server.commands:server", "Serve a federation's run to its end."),
    "client": ("bract.client.commands:client", "Serve a site."),
    "keys": ("bract.shared.commands.keys:keys", "Make and read certificates and keys."),
    "model": ("bract.shared.commands.model:model", "Use what was trained."),
    "audit": ("bract.shared.commands.audit:audit", "Check ledgers and what was spent."),
}

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


DATA_DIR = click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    metavar="ROOT",
    help="A folder of data sets; default: $BRACT_DATA.",
)


LOG_FORMAT = click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="One line an event on stderr.",
)

TRACK = click.option(
    "--track",
    type=click.Choice(["tensorboard", "mlflow"]),
    multiple=True,
    help="Follow the run under its folder's tracking/; may be given twice.",
)


ABOVE = {
    "audit": {
        "experiment": "bract.simulations.audits.experiment_command:experiment",
        "membership": "bract.simulations.audits.membership_command:membership",
    },
}


class GroupWithAbove(click.Group):
    """A group some of whose commands lie on a floor above, and are imported when asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Returns the names of all commands."""
        return sorted([*super().list_commands(context), *ABOVE.get(self.name or "", {})])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Returns the command of a name, imported now where it lies above."""
        above = ABOVE.get(self.name or "", {})
        return _imported(above[name]) if name in above else super().get_command(context, name)


def _imported(name: str) -> click.Command | None:
    module, _, attribute = name.partition(":")
    with garbage.unwatched():
        command = getattr(importlib.import_module(module), attribute)
    return command if isinstance(command, click.Command) else None


class LazyGroup(click.Group):
    """A group that imports a command when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Returns the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Returns the command of a name, imported now."""
        return _imported(COMMANDS[name][0]) if name in COMMANDS else None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the table's summaries, with no import."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks and debug logs.")
@click.version_option(package_name="bract")
def bract(debug: bool) -> None:
    """Federated training in which every site enforces its own privacy budget, and can prove it.

    Example: bract simulate digits
    """
    log_to_stderr(logging.DEBUG if debug else logging.WARNING)


def log_to_stderr(level: int) -> None:
    """Sends this process's log to stderr, from a level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    handler.setLevel(level)
    logging.basicConfig(handlers=[handler])
    if level <= logging.DEBUG:
        logging.getLogger("bract").setLevel(level)


def main() -> None:
    """Runs the command."""
    run(bract, "bract")


def run(command: click.Command, name: str) -> NoReturn:
    """Runs a command to its exit; a failure is one line, and one JSON object with --json."""
    garbage.end_at_once()
    arguments = sys.argv[1:]
    debug, as_json = "--debug" in arguments, "--json" in arguments
    try:
        code = command.main(arguments, prog_name=name, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort as error:
        if isinstance(error.__cause__, EOFError):  # which click takes for the user's Ctrl-D
            _fail("EOFError", "a file ends early: run again with --debug", 1, as_json)
        _fail("Interrupted", "stopped; every charge is kept", 130, as_json)
    except click.ClickException as error:
        _fail("UsageError", error.format_message(), 2, as_json)
    except BractError as error:
        if debug:
            raise
        _fail(type(error).__name__, " ".join(str(error).split()), error.exit_code, as_json)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno:
            # the system's own words for the number, and no library's
            what = f"cannot use {error.filename}" if error.filename else "a file or a connection"
            message = f"{what}: {os.strerror(error.errno)}"
            _fail(type(error).__name__, message, 1, as_json)
        # The text of an unforeseen exception may hold anything: name its type, not its words.
        message = f"unexpected {type(error).__name__}: run again with --debug before the command"
        _fail(type(error).__name__, message, 1, as_json)


def _fail(kind: str, message: str, code: int, as_json: bool) -> NoReturn:
    if as_json:
        print_json({"error": {"type": kind, "message": message}})
    logs.end(message)
    sys.exit(code)


def print_json(value: Any) -> None:
    """Prints one line with one strict JSON object."""
    click.echo(json.dumps(value, allow_nan=False, ensure_ascii=False))


def fail_reported(message: str) -> NoReturn:
    """Ends with 1 after a report that says it all: stdout keeps its one object."""
    logs.end(message)
    sys.exit(1)


def shown(value: float | None) -> str:
    """Returns a figure as the commands print it; a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"
