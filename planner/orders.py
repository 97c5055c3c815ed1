"""The order of a stage's actions, as torch's schedules make it: forwards, backwards, transfers started and awaited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["F", "B", "start", "wait"]


@dataclass(frozen=True, slots=True)
class Action:
    """`F`/`B`: micro-batch `micro`. `start`/`wait`: transfers (source stage, target stage, micro-batch)."""

    kind: Kind
    micro: int = -1
    transfers: tuple[tuple[int, int, int], ...] = ()


def stage_order(schedule: str, stage: int, stages: int, micro_batches: int) -> tuple[Action, ...]:
    """Actions of one stage. Source: torch.distributed.pipelining.schedules, `_step_microbatches` of ScheduleGPipe and
    Schedule1F1B (torch 2.13); one stage alone runs forward and backward of each micro-batch in turn."""
    if stages == 1:
        return tuple(Action(kind, i) for i in range(micro_batches) for kind in ("F", "B"))
    return _gpipe(stage, stages, micro_batches) if schedule == "gpipe" else _one_f_one_b(stage, stages, micro_batches)


def _received(stage: int, stages: int, micro: int, backward: bool) -> tuple[tuple[int, int, int], ...]:
    if backward:
        return ((stage + 1, stage, micro),) if stage + 1 < stages else ()
    return ((stage - 1, stage, micro),) if stage > 0 else ()


def _sent(stage: int, stages: int, micro: int, backward: bool) -> tuple[tuple[int, int, int], ...]:
    if backward:
        return ((stage, stage - 1, micro),) if stage > 0 else ()
    return ((stage, stage + 1, micro),) if stage + 1 < stages else ()


def _both(transfers: tuple[tuple[int, int, int], ...]) -> list[Action]:
    return [Action("start", transfers=transfers), Action("wait", transfers=transfers)] if transfers else []


def _gpipe(stage: int, stages: int, micro_batches: int) -> tuple[Action, ...]:
    order: list[Action] = []
    for backward in (False, True):
        late: list[tuple[int, int, int]] = []
        for i in range(micro_batches):
            order += _both(_received(stage, stages, i, backward))
            order.append(Action("B" if backward else "F", i))
            if sent := _sent(stage, stages, i, backward):
                order.append(Action("start", transfers=sent))
                late += sent
        if late:
            order.append(Action("wait", transfers=tuple(late)))
    return tuple(order)


def _one_f_one_b(stage: int, stages: int, micro_batches: int) -> tuple[Action, ...]:
    warmup = min(micro_batches, stages - stage)
    order: list[Action] = []
    pending: tuple[tuple[int, int, int], ...] = ()
    sends: tuple[tuple[int, int, int], ...] = ()
    for i in range(warmup):
        order += _both(_received(stage, stages, i, False))
        order.append(Action("F", i))
        if pending:
            order.append(Action("wait", transfers=pending))
            pending = ()
        sends = _sent(stage, stages, i, False)
        if i != warmup - 1 and sends:
            order.append(Action("start", transfers=sends))
            pending = sends
    forward, backward = warmup, 0
    while True:
        order += _both((*sends, *_received(stage, stages, backward, True)))
        order.append(Action("B", backward))
        sends = _sent(stage, stages, backward, True)
        backward += 1
        if forward == micro_batches:
            break
        order += _both((*sends, *_received(stage, stages, forward, False)))
        order.append(Action("F", forward))
        sends = _sent(stage, stages, forward, False)
        forward += 1
    if sends:
        order.append(Action("start", transfers=sends))
    while backward < micro_batches:
        order += _both(_received(stage, stages, backward, True))
        order.append(Action("B", backward))
        if sends:
            order.append(Action("wait", transfers=sends))
        sends = _sent(stage, stages, backward, True)
        if sends:
            order.append(Action("start", transfers=sends))
        backward += 1
    if sends:
        order.append(Action("wait", transfers=sends))
    return tuple(order)
