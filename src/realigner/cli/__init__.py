"""The command line: parse, call, print. Every heavy import waits until a command needs it.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done; 1 the work failed or the data is
unfit; 2 wrong usage. An error is one line; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

import realigner
from realigner.cli import (
    app_command,
    data_commands,
    host_commands,
    irm_commands,
    serve_commands,
    study_commands,
    sweep_commands,
)
from realigner.console import say, show, sigterm_interrupts
from realigner.errors import RealignerError, UsageError

_LONGEST = 2000  # characters of an error's line; of a longer one the middle is left out
_ARGUMENT = re.compile(r"\((force|resume)\)")  # in messages of the library; here it is a flag
_NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory")  # how torch says it, of CPUs and GPUs

app = typer.Typer(
    name="realigner",
    help="Injectable realignment models: steer the tone of a frozen language model, and inspect how.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (  # in the order of --help
    irm_commands.demo,
    irm_commands.train,
    irm_commands.recipes,
    sweep_commands.sweep,
    irm_commands.generate,
    serve_commands.serve,
    app_command.app,
    study_commands.evaluate,
    study_commands.trace,
    study_commands.analyze,
    study_commands.explain,
    study_commands.report,
    study_commands.figures,
    host_commands.hosts,
    host_commands.doctor,
):
    app.command()(command)
app.add_typer(data_commands.app, name="data")


_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt


def _version(value: bool) -> None:
    if value:
        show(f"realigner {realigner.__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of every command."""


def _message(error: Exception) -> str:
    formatted = getattr(error, "format_message", None)
    return str(formatted() if callable(formatted) else error)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST * 2 // 3]} ... {line[-_LONGEST // 3 :]}"


def _last_resort(error: Exception) -> str:
    """A line for what nobody caught where it was raised, so without the place that a reader would have named."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return "out of memory; give it less at a time (fewer prompts or rows, a smaller batch_size or host), or more memory"
    if isinstance(error, RecursionError):
        return "something that was given is nested too deeply; run again with --debug to see which file was being read"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: cannot be read or written ({error.strerror or type(error).__name__})"
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"unexpected {what}; run again with --debug for the traceback"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors become one line on standard error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:  # wherever it was written
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("DATASETS_VERBOSITY", "error")
        warnings.filterwarnings("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it is talkative
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        try:
            with sigterm_interrupts():
                code = app(args=arguments, prog_name="realigner", standalone_mode=False)
        except ImportError as error:
            from realigner.extras import raise_missing_extra

            raise_missing_extra(error, next((word for word in arguments if not word.startswith("-")), "realigner"))
            raise
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TyperException as error:
        if message := _one_line(_message(error)):  # empty where help was printed instead
            command = getattr(getattr(error, "ctx", None), "command_path", "realigner")
            say(f"realigner: {message.removesuffix('.')}; see {command} --help")
        return 2
    except RealignerError as error:
        if debug:
            raise
        message = _ARGUMENT.sub(r"(--\1)", str(error))
        say(f"realigner: {_one_line(message)}")
        return 2 if isinstance(error, UsageError) else 1
    except (KeyboardInterrupt, typer.Abort):
        say("realigner: interrupted")
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        say(f"realigner: {_one_line(_last_resort(error))}")
        return 1


def entry() -> None:
    """The console script."""

    def shown(*raised: Any) -> None:  # a traceback quotes what it was about
        say("".join(traceback.format_exception(*raised)).rstrip())

    sys.excepthook = shown
    sys.exit(main())


if __name__ == "__main__":
    entry()
