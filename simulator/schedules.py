"""Pipeline schedules as orders of forward ("F") and backward ("B") micro-batches per stage, and programs of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from simulator.program import Program, ProgramBuilder

Step = tuple[Literal["F", "B"], int]
Order = list[list[Step]]


def gpipe(p: int, m: int) -> Order:
    """Order of each of p stages: all m forwards, then all m backwards, as in torch's ScheduleGPipe."""
    _check(p, m)
    stage: list[Step] = [("F", k) for k in range(m)]
    return [[*stage, *(("B", k) for k in range(m))] for _ in range(p)]


def one_f_one_b(p: int, m: int) -> Order:
    """Order of each of p stages: min(m, p - stage) forwards, then a backward and a forward in turn, then the backwards.

    This is the order of torch's Schedule1F1B, which itself refuses m < p.
    """
    _check(p, m)
    orders: Order = []
    for stage in range(p):
        warmup = min(m, p - stage)
        order: list[Step] = [("F", k) for k in range(warmup)]
        for k in range(m):
            order.append(("B", k))
            if warmup + k < m:
                order.append(("F", warmup + k))
        orders.append(order)
    return orders


def _check(p: int, m: int) -> None:
    if p < 1 or m < 1:
        raise ValueError(f"a pipeline of {p} stages and {m} micro-batches is empty; use 1 or more of each")


def dependency_order(orders: Order) -> list[tuple[int, Step]]:
    """All (stage, step) such that each comes after the steps it needs; ValueError where stages wait for each other."""
    left = [list(reversed(order)) for order in orders]
    done: set[tuple[int, Step]] = set()
    sequence: list[tuple[int, Step]] = []
    while any(left):
        before = len(sequence)
        for s, order in enumerate(left):
            while order and all(need in done for need in needs(s, order[-1], len(orders))):
                sequence.append((s, order.pop()))
                done.add(sequence[-1])
        if len(sequence) == before:
            s = next(s for s, order in enumerate(left) if order)
            direction, k = left[s][-1]
            raise ValueError(f"stage {s} waits for ever to run {direction}{k}; give orders that fit each other")
    return sequence


def needs(stage: int, step: Step, p: int) -> list[tuple[int, Step]]:
    """The steps whose results `step` takes: the last one crosses a stage boundary, if any does."""
    direction, k = step
    if direction == "F":
        return [(stage - 1, step)] if stage else []
    own: list[tuple[int, Step]] = [(stage, ("F", k))]
    return [*own, (stage + 1, step)] if stage + 1 < p else own


def pipeline_program(
    orders: Order,
    forward: Sequence[float],
    backward: Sequence[float],
    forward_transfer: Sequence[float] | None = None,
    backward_transfer: Sequence[float] | None = None,
) -> Program:
    """Program of a pipeline whose stage s is rank s and runs `orders[s]` in just that order.

    forward, backward: seconds of one micro-batch on each stage [p]. forward_transfer, backward_transfer: seconds of
    activations and of their gradients over each boundary [p - 1], on a link of its own for each direction, while the
    stages go on computing; none by default. Ids are in topological order, so `replay` works too.
    """
    p = len(orders)
    compute = {"F": list(forward), "B": list(backward)}
    transfer = {"F": list(forward_transfer or [0.0] * (p - 1)), "B": list(backward_transfer or [0.0] * (p - 1))}
    _check_times("times per stage", compute, p)
    _check_times("transfer times per boundary", transfer, p - 1)
    builder = ProgramBuilder()
    stages = [builder.resource(f"stage {s}", rank=s) for s in range(p)]
    links = {
        "F": [builder.resource(f"link {s} to {s + 1}", rank=s, kind="communication") for s in range(p - 1)],
        "B": [builder.resource(f"link {s + 1} to {s}", rank=s + 1, kind="communication") for s in range(p - 1)],
    }
    tasks: dict[tuple[int, Step], int] = {}
    sent: dict[tuple[int, Step], int] = {}  # the task after which the neighbour has the result of a step
    previous: dict[int, int] = {}
    for s, step in dependency_order(orders):
        direction, k = step
        inputs = [sent[need] if need[0] != s else tasks[need] for need in needs(s, step, p)]
        deps = [*inputs, previous[s]] if s in previous else inputs
        category = "forward" if direction == "F" else "backward"
        task = builder.task(f"{direction}{k} stage {s}", category, compute[direction][s], stages[s], deps)
        tasks[s, step] = sent[s, step] = previous[s] = task
        boundary = s if direction == "F" else s - 1
        if 0 <= boundary < p - 1 and transfer[direction][boundary]:
            link, seconds = links[direction][boundary], transfer[direction][boundary]
            sent[s, step] = builder.task(f"send {direction}{k} stage {s}", "send", seconds, link, [task])
    return builder.build()


def _check_times(what: str, times: dict[str, list[float]], size: int) -> None:
    for values in times.values():
        if len(values) != size:
            raise ValueError(f"{len(values)} {what} are given; this pipeline needs {size}")
