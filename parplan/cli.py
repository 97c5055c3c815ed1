"""`parplan`: the command line. Every verb lives in a module of its own and imports what it needs when it runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from parplan.cli_calibrate import calibrate
from parplan.cli_clusters import clusters
from parplan.cli_collectives import collectives
from parplan.cli_demo import demo
from parplan.cli_devices import devices
from parplan.cli_gradients import gradients
from parplan.cli_infer import infer
from parplan.cli_predict import predict
from parplan.cli_search import search
from parplan.cli_simulate import simulate
from parplan.cli_trace import trace
from parplan.cli_validate import validate

app = typer.Typer(
    name="parplan",
    help="Predict, search, execute and compare parallelization plans of any torch model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS = (
    trace, calibrate, search, simulate, infer, validate, predict, devices, clusters, collectives, gradients, demo
)  # fmt: skip
for verb in VERBS:
    app.command()(verb)
# What typer raises for a wrong command line; newer versions bring their own click, so it has no other stable name.
UsageProblem: Any = typer.BadParameter.__mro__[2]


@app.callback()
def options(
    tracebacks: Annotated[bool, typer.Option("--tracebacks", help="Show tracebacks (give it first).")] = False,
) -> None:
    """Predict, search, execute and compare parallelization plans of any torch model."""
    del tracebacks  # `main` looks for it, so that it also works where typer fails


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 (bad input, one sentence on stderr), 130 (interrupted)."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _terminated)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler in the ranks prints its own phases otherwise
    try:
        return _run(words)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if words[0] == "--tracebacks":
            raise
        return _said(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        if before is not None:  # the caller's own, where one process runs several commands
            signal.signal(signal.SIGTERM, before)


def _run(words: list[str]) -> int:
    try:
        return app(words, prog_name="parplan", standalone_mode=False) or 0
    except UsageProblem as error:
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context else ""
        print(f"parplan: {_sentence(error.format_message()).rstrip('.')}{where}", file=sys.stderr)
        return 2
    except typer.Abort:
        raise KeyboardInterrupt from None


def _said(error: BaseException) -> int:
    if isinstance(error, BrokenPipeError):  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    print(f"parplan: {_sentence(text or type(error).__name__)}", file=sys.stderr)
    return 2


def _sentence(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 600 else f"{words[:597]}..."


def _terminated(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)  # as an exception, so that ranks are stopped and temporary files removed
