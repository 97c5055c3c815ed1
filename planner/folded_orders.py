"""Orders of forwards and backwards of a stage as Megatron runs them: 1F1B, and 1F1B interleaved over model chunks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """Forward or backward of one micro-batch through a chunk; chunk c of stage s is number c * stages + s of all."""

    backward: bool
    chunk: int
    micro: int


def order(stage: int, stages: int, chunks: int, micro_batches: int, gpipe: bool = False) -> list[Step]:
    """Steps of one stage, first to last.

    Source: Megatron-LM core/pipeline_parallel/schedules.py, forward_backward_pipelining_with(out)_interleaving: before
    its first backward a stage runs stages - stage - 1 forwards (1F1B), or 2 (stages - stage - 1) + (chunks - 1) stages
    of them (interleaved); chunks change every `stages` micro-batches.
    """
    if chunks == 1:
        forwards = [Step(False, 0, k) for k in range(micro_batches)]
        backwards = [Step(True, 0, k) for k in range(micro_batches)]
        ahead = stages - stage - 1
    else:
        groups = _groups(stages, micro_batches)
        forwards = [Step(False, c, k) for group in groups for c in range(chunks) for k in group]
        backwards = [Step(True, c, k) for group in groups for c in reversed(range(chunks)) for k in group]
        ahead = 2 * (stages - stage - 1) + (chunks - 1) * stages
    ahead = len(forwards) if gpipe else min(ahead, len(forwards))
    steps = forwards[:ahead]
    for f, b in zip(forwards[ahead:], backwards):
        steps += [f, b]
    return [*steps, *backwards[len(forwards) - ahead :]]


def _groups(stages: int, micro_batches: int) -> list[range]:
    """Micro-batches that pass one chunk before the next chunk's turn: as many as there are stages, the last fewer."""
    return [range(at, min(at + stages, micro_batches)) for at in range(0, micro_batches, stages)]
