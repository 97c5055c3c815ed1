"""The GPU suite: one command calibrates a CUDA device and holds predictions of training steps to it.

    python -m validation.gpu_suite --out RUN
    python -m validation.gpu_suite --out RUN --pieces steps-1,steps-2 --budget 540
    python -m validation.gpu_suite --out RUN --device cpu --quick

It works in pieces, each of which ends within its budget, keeps what it has, and goes on where it stopped when it is
called again:

    environment  card, driver, clocks, software            -> environment.json
    calibrate    2,800 ops, host launches, copies          -> ops.json, host.json, copies.json
    fit          constants from half of the shapes; scores -> device.toml, device.kernels.toml, fit.json
    predict      every step, before any is measured        -> predictions.json
    steps-1 ...  13 models: fp32, tf32, bf16, recomputed, compiled; small and large batch
                 -> steps.json, snapshots/
    compare      joined table, errors, picture             -> report.md, compare.csv, compare.png

fit, predict and compare need no GPU: they run anywhere on the files of a run. Ops are timed by CUDA events behind a
sleeping kernel, with inputs that rotate through more than twice the last cache. No constant sees a training step.

`--constants OTHER` predicts with the constants of another machine's run besides (an H200 by those of an H100): give it
with predict, before the steps, or later with compare, where the report then says that it came after.

Exit code: 0 when all that was asked for is done, 3 when time ran out and something is left (call again), 2 with one
sentence when something is wrong. No setting of the card is changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from validation.gpu_environment import check_modules

if TYPE_CHECKING:
    from validation.gpu_files import Budget
    from validation.gpu_models import Run

BUDGET = 540.0
DONE, WRONG, LEFT, STOPPED = 0, 2, 3, 130
NEED_DEVICE = ("environment", "calibrate")  # and the steps
FIRST, LAST = ("environment", "calibrate", "fit", "predict"), ("compare",)
# Seconds that must be left for a piece that is done whole: compiling the laws, fourteen sections, the scores; table and
# picture. ASSUMPTIONS: on two cores a section of 433 products took 0.6 s; a picture takes a few. The others ask row by
# row. A call that begins with one of them always does it: half of its budget is enough.
NEEDED = {"fit": 60.0, "compare": 30.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command; returns the exit code."""
    args = _parser().parse_args(arguments)
    command = "python -m validation.gpu_suite " + " ".join(sys.argv[1:] if arguments is None else arguments)
    try:
        check_modules()
        return _run(args, command)
    except ValueError as error:
        say(f"error: {error}")
        return WRONG
    except KeyboardInterrupt:
        say("stopped; what was measured is kept, call again to go on")
        return STOPPED


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m validation.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; made where it is missing")
    parser.add_argument("--pieces", default="", help="some pieces, separated by commas; all where it is left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs the same code, for tests")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds of this call (default {BUDGET:.0f})")
    parser.add_argument("--quick", action="store_true", help="few and tiny ops and models: 20 s on a CPU")
    parser.add_argument("--constants", type=Path, help="folder of another machine's run, whose constants predict too")
    parser.add_argument("--list", action="store_true", help="print the pieces with their rows, and end")
    return parser


def _run(args: argparse.Namespace, command: str) -> int:
    from validation.gpu_files import Budget
    from validation.gpu_models import pieces

    steps = pieces(args.quick)
    if args.list:
        for name, rows in steps.items():
            print(f"{name}: {len(rows)} steps, about {sum(r.seconds for r in rows):.0f} s: {rows[0].key} ...")
        return DONE
    if args.budget <= 0:
        raise ValueError(f"the budget is {args.budget:g} s; it must be more than 0, and {BUDGET:.0f} is usual")
    known = (*FIRST, *steps, *LAST)
    chosen = [p.strip() for p in args.pieces.split(",") if p.strip()] or list(known)
    if unknown := [p for p in chosen if p not in known]:
        raise ValueError(f"there is no piece {unknown[0]!r}; the pieces are {', '.join(known)}")
    if args.constants is not None and not (args.constants / "device.toml").is_file():
        raise ValueError(f"{args.constants} holds no device.toml; give the folder of a run whose piece fit is done")
    args.out.mkdir(parents=True, exist_ok=True)
    budget = Budget(args.budget)
    for i, piece in enumerate(p for p in known if p in chosen):
        if left := _piece(piece, args, command, budget):
            rest = [p for p in known if p in chosen][i + 1 :]
            also = f"; also left: {', '.join(rest)}" if rest else ""
            say(f"out of time in {piece}: {left}{also}; go on with the same command")
            return LEFT
    return DONE


def _piece(piece: str, args: argparse.Namespace, command: str, budget: Budget) -> str:
    """Runs one piece; returns what is left of it, in words."""
    from validation.gpu_environment import check_device, check_same

    say(f"-- {piece}")
    if piece in NEED_DEVICE or piece in _steps_of(args):
        check_device(args.device)
        check_same(args.out / "environment.json", args.device)
    if piece in _steps_of(args):
        return _steps(piece, args, budget)
    if piece == "environment":
        from validation.gpu_environment import environment
        from validation.gpu_files import write_json

        write_json(args.out / "environment.json", environment(args.device, command))
        return ""
    return {"calibrate": _calibrate, "fit": _fit, "predict": _predict, "compare": _compare}[piece](args, budget)


def _steps_of(args: argparse.Namespace) -> dict[str, list[Run]]:
    from validation.gpu_models import pieces

    return pieces(args.quick)


def _calibrate(args: argparse.Namespace, budget: Budget) -> str:
    from validation.gpu_calibrate import measure_copies, measure_host, sweep

    if not (args.out / "host.json").is_file():
        measure_host(args.out, args.device)
    if not (args.out / "copies.json").is_file():
        measure_copies(args.out, args.device, args.quick)
    left = sweep(args.out, args.device, budget, args.quick, say)
    return f"{left} ops" if left else ""


def _too_late(piece: str, args: argparse.Namespace, budget: Budget) -> str:
    """What is left, in words, where there is no time for a piece that is done whole."""
    least = min(1.0 if args.quick else NEEDED[piece], 0.5 * budget.seconds)
    left = budget.left
    return f"all of it; {max(left, 0.0):.0f} s are left and it may take {least:.0f}" if left < least else ""


def _fit(args: argparse.Namespace, budget: Budget) -> str:
    from validation.gpu_fit import fit_run

    if late := _too_late("fit", args, budget):
        return late
    fit_run(args.out, say)
    return ""


def _predict(args: argparse.Namespace, budget: Budget) -> str:
    from validation.gpu_models import runs
    from validation.gpu_predict import predict_runs

    left = predict_runs(args.out, runs(args.quick), args.constants, budget, args.quick, say)
    return f"{len(left)} steps to predict, {left[0]} first" if left else ""


def _steps(piece: str, args: argparse.Namespace, budget: Budget) -> str:
    from validation.gpu_steps import run_steps

    left = run_steps(args.out, _steps_of(args)[piece], args.device, budget, args.quick, say)
    return f"{len(left)} steps, {left[0]} first" if left else ""


def _compare(args: argparse.Namespace, budget: Budget) -> str:
    from validation.gpu_compare import SETS, compare_run, summary

    if args.constants is not None and (left := _predict(args, budget)):
        return left
    if late := _too_late("compare", args, budget):
        return late
    rows = compare_run(args.out)
    for name in SETS:
        if mine := [r for r in rows if r.constants == name]:
            s = summary(mine)
            say(f"{name}: {s['n']} steps, median error {s['median']:.1%}, bias {s['bias']:+.1%}")
    return ""


if __name__ == "__main__":
    sys.exit(main())
