"""What the kernels of a folded step lose beside messages: `costmodels.overlap` over the kernels of whole parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from costmodels.cluster import Cluster
from costmodels.contention import overlapped, waited
from costmodels.families import family
from costmodels.ops import OpShape
from costmodels.overlap import Beside, beside, slowdowns
from planner.host_queue import Floats

if TYPE_CHECKING:
    from planner.folded_kernels import Launch, Message, Priced

NEAR = 2  # products of a layer in backward: one for its input, one for its weight


def lost(cluster: Cluster, parts: Iterable[tuple[Priced, float]], other: Beside) -> float:
    """Seconds that parts (with how often each runs) take longer per second of a message that takes `other`: 1 -
    1 / slowdown of all their device time together. Messages among them are not slowed."""
    alone = longer = 0.0
    for part, times in parts:
        alone += times * part.run.device
        longer += times * _longer(cluster, part.kernels, other)
    return longer / (alone + longer) if longer else 0.0


def _longer(cluster: Cluster, kernels: Sequence[tuple[OpShape, float]], other: Beside) -> float:
    shapes, seconds = [s for s, _ in kernels], [t for _, t in kernels]
    return sum(t * (x - 1) for t, x in zip(seconds, slowdowns(cluster.device, shapes, seconds, other)))


def exposed(
    launches: Sequence[Launch], at: int, device: Sequence[float] | Floats, seconds: float, cluster: Cluster,
    ranks: Sequence[int],
) -> float:  # fmt: skip
    """Seconds that a message adds to the device's time: all of it, or what the kernel beside it does not cover and what
    that kernel loses. device: seconds of every launch.

    With user buffers, what is gathered moves by copy engines, which take no units (`use_ce` is the default of
    Transformer Engine's `initialize_ub`), and products beside pieces that are reduced start on the units that are left
    (`set_sm_margin` of NeMo's userbuffers.py: on for pipelined reductions, off for bulk ones, pull request 11763); the
    first or last of the pieces has nothing to run beside.
    """
    message = launches[at].message
    assert message is not None
    i = neighbour(launches, at) if message.beside or message.pieces else None
    if i is None:
        return seconds
    shape, own = launches[i].shape, float(device[i])
    assert shape is not None
    other = beside(cluster, message.kind, message.bytes, ranks, seconds)
    split = message.pieces if not message.beside else 0
    if split:
        other = replace(other, units=0 if message.kind == "all_gather" else other.units, static=False)
    first = min(seconds, own) / split if split else 0.0
    slowdown = slowdowns(cluster.device, [shape], [own], other)[0]
    if other.static and family(shape.name) == "gemm":
        return first + waited(own, seconds - first, slowdown) - own
    return first + overlapped(own, seconds - first, slowdown)[0] - own


def neighbour(launches: Sequence[Launch], at: int) -> int | None:
    """Index of the kernel that a message runs beside; None where there is none.

    Backward of a split layer runs the product for the input's gradient beside the gathering of the input, and that for
    the weight's beside the reduction of the input's gradient (Megatron-LM core/tensor_parallel/layers.py, Transformer
    Engine module/layernorm_linear.py); a trace may have the two products in the other order.
    """
    message = launches[at].message
    assert message is not None
    step = message.beside or (1 if message.kind == "all_gather" else -1)
    found: list[int] = []
    i = at + step
    while 0 <= i < len(launches) and len(found) < NEAR:
        shape = launches[i].shape
        kind = family(shape.name) if shape is not None else ""
        if kind == "gemm" or (message.axis == "cp" and kind.startswith("attention")):
            found.append(i)
        i += step
    wanted = [i for i in found if _of_weight(launches[i].shape, message) == (message.kind != "all_gather")]
    chosen = wanted if message.weight else found
    return next(iter(chosen or found), None)


def _of_weight(shape: OpShape | None, message: Message) -> bool:
    """Whether a product makes the gradient of the message's weight."""
    assert shape is not None
    return shape.out_shapes[0] in (message.weight, message.weight[::-1])
