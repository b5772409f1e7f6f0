"""The command line: ``ptq VERB``. Results on stdout, progress and notes on stderr.

Exit codes: 0 success, 1 failure, 2 wrong use. Each command lives in :mod:`ptq.commands` and imports what it
needs when it runs, so that ``ptq --help`` is quick.
"""

from __future__ import annotations

import sys
import traceback

import click

from ptq.commands import COMMANDS
from quantizers.errors import PtqError, UsageError

_TRACEBACK = "--traceback"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vit-ptq")
@click.option(_TRACEBACK, is_flag=True, help="Show where an error was raised.")
def cli(traceback: bool) -> None:
    """Quantize Vision Transformers to networks that run on integers only."""
    del traceback  # read by main, which must know it even when parsing fails


for command in COMMANDS:
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; errors are messages, never tracebacks."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = cli.main(given, prog_name="ptq", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(1)
    except PtqError as error:
        click.echo(f"error: {error}", err=True)
        _show_origin(given)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    # The last resort for people: whatever went wrong is one line with its type.
    except Exception as error:  # noqa: BLE001
        click.echo(f"error: {type(error).__name__}: {error}; repeat with 'ptq {_TRACEBACK} ...' to see where", err=True)
        _show_origin(given)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _show_origin(given: list[str]) -> None:
    if _TRACEBACK in given:
        traceback.print_exc()
