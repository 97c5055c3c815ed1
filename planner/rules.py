"""The sharding rules: which placement an op's outputs get from the placements of its inputs, one function per family.

A placement says how a tensor lies over the ranks of one mesh axis: `REPLICATE` (every rank has all of it), `PARTIAL`
(every rank has a summand) or a dim >= 0 (every rank has an equal part along that dim). Rules look at shapes only and
know no model; an op that cannot run on its local parts raises ShardingError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from costmodels.families import base_name, family

REPLICATE = -1
PARTIAL = -2
Shape = tuple[int, ...]
Placed = tuple[Shape, int]
Rule = Callable[[str, list[Placed], list[Shape], tuple[Any, ...], int], list[int]]


class ShardingError(ValueError):
    """An op cannot run on tensors that lie like this."""


def place(name: str, ins: Sequence[Placed], outs: Sequence[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    """Placements of the outputs of op `name` on an axis of `parts` ranks.

    `ins` are (global shape, placement) of its tensor inputs, `outs` the global shapes of its outputs, `args` its
    recorded arguments. Raises ShardingError where the local op would not compute the local part of the global one.
    """
    if all(p == REPLICATE for _, p in ins):
        return [REPLICATE] * len(outs)
    base = base_name(name)
    rule = _RULES.get(base) or _RULES.get(family(name))
    if rule is None:
        raise ShardingError(f"{name} has no sharding rule for inputs placed {[p for _, p in ins]}")
    return rule(base, list(ins), list(outs), args, parts)


def local_shape(shape: Shape, placement: int, parts: int) -> Shape:
    """The part of a global shape that one of `parts` ranks holds. Raises ShardingError where it is uneven."""
    if placement < 0 or parts == 1:
        return shape
    if shape[placement] % parts:
        raise ShardingError(f"dim {placement} of size {shape[placement]} does not divide into {parts} equal parts")
    return (*shape[:placement], shape[placement] // parts, *shape[placement + 1 :])


def _fail(base: str, ins: list[Placed], why: str) -> ShardingError:
    return ShardingError(f"{base} on {', '.join(f'{list(s)} placed {_word(p)}' for s, p in ins)}: {why}")


def _word(placement: int) -> str:
    return {REPLICATE: "whole", PARTIAL: "as partial sums"}.get(placement, f"along dim {placement}")


# -- views --------------------------------------------------------------------------------------------------


def _reshape(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    shape, placement = ins[0]
    return [placement if placement < 0 else _reshaped_dim(base, ins, shape, out, placement, parts) for out in outs]


def _reshaped_dim(base: str, ins: list[Placed], shape: Shape, out: Shape, dim: int, parts: int) -> int:
    """The output dim that the parts of `dim` form: its leading factor, if everything before it is kept apart."""
    before = prod(shape[:dim])
    running = 1
    for d, n in enumerate(out):
        if running == before and n != 1:
            if n % parts == 0 and (n <= shape[dim] or n % shape[dim] == 0):
                return d
            raise _fail(base, ins, f"dim {d} of the result {list(out)} does not keep the parts whole")
        running *= n
    raise _fail(base, ins, f"the parts are no leading factor of a dim of {list(out)}")


def _transpose(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    shape, placement = ins[0]
    if placement < 0:
        return [placement] * len(outs)
    rank = len(shape)
    if base == "permute":
        order = [d % rank for d in args[1]]
    else:
        a, b = (0, rank - 1) if base in ("t", "numpy_T", "mT") else (args[1] % rank, args[2] % rank)
        order = list(range(rank))
        if rank > 1:
            order[a], order[b] = order[b], order[a]
    return [order.index(placement)]


def _expand(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    shape, placement = ins[0]
    return [placement if placement < 0 else placement + len(out) - len(shape) for out in outs]


def _unsqueeze(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    placement = ins[0][1]
    if placement < 0:
        return [placement]
    at = args[1] % len(outs[0])
    return [placement + 1 if at <= placement else placement]


def _squeeze(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    shape, placement = ins[0]
    if placement < 0:
        return [placement]
    dims = range(len(shape)) if len(args) < 2 else [args[1]] if isinstance(args[1], int) else args[1]
    gone = {d % len(shape) for d in dims if shape[d] == 1}
    return [placement - sum(d < placement for d in gone)]


def _along(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    """slice, split, select, cat, cumsum, softmax ...: legal along every dim but the one that they work on."""
    placement = _same(base, ins if base != "cat" else _cut(ins))
    if placement == PARTIAL and base in ("_softmax", "_log_softmax", "sort", "topk"):
        raise _fail(base, ins, "it is not linear")
    if placement < 0:
        return [placement] * len(outs)
    position = _DIM_ARGUMENT.get(base, 1)
    dim = args[position] if len(args) > position else 0
    rank = len(ins[0][0])
    if base == "select_backward":  # the dim that was selected away comes back
        back = dim % (rank + 1)
        return [placement + (back <= placement)] * len(outs)
    if dim % rank == placement:
        raise _fail(base, ins, f"it needs all of dim {placement}")
    return [placement - 1 if base == "select" and dim % rank < placement else placement] * len(outs)


def _cut(ins: list[Placed]) -> list[Placed]:
    """The parts that are joined: beside parts along a dim, a whole tensor is one that was expanded along it, to as many
    as a rank has (a search tries the model's own code, `planner.tp_trial`)."""
    dims = {p for _, p in ins if p >= 0}
    return [(s, p) for s, p in ins if p != REPLICATE] if len(dims) == 1 else ins


_DIM_ARGUMENT = {"split": 2, "split_with_sizes": 2, "chunk": 2, "_softmax_backward_data": 2,
                 "_log_softmax_backward_data": 2, "slice_backward": 2, "select_backward": 2, "unbind": 1}  # fmt: skip


def _same(base: str, ins: list[Placed]) -> int:
    found = {p for _, p in ins}
    if len(found) != 1:
        raise _fail(base, ins, "its inputs lie differently")
    return found.pop()


# -- arithmetic ---------------------------------------------------------------------------------------------

_LINEAR_ONE = {"neg", "clone", "copy", "_to_copy", "contiguous", "detach", "alias", "lift_fresh", "mul", "div"}
_LINEAR_TWO = {"add", "sub", "copy", "add_"}


def _halves(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    """glu: element by element of two halves of a dim, which a part of that dim does not have."""
    position = 1 if base == "glu" else 2
    dim = args[position] if len(args) > position else -1
    rank = len(outs[0])
    if any(p == PARTIAL or p == dim % rank for _, p in ins):
        raise _fail(base, ins, f"it needs all of dim {dim % rank}")
    return _pointwise(base, ins, outs, args, parts)


def _pointwise(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    if any(p == PARTIAL for _, p in ins):
        # a whole bias: the runtime divides it by the number of parts, so that the sum has it once
        bias = base == "add" and [p for _, p in ins] == [PARTIAL, REPLICATE] and len(ins[1][0]) == 1 < len(ins[0][0])
        linear = len(ins) == 1 and base in _LINEAR_ONE
        linear = linear or bias or (base in _LINEAR_TWO and _same(base, ins) == PARTIAL)
        if not linear:
            raise _fail(base, ins, "partial sums must be reduced first")
        return [PARTIAL] * len(outs)
    rank = max((len(s) for s, _ in ins), default=0)
    target = {p + rank - len(s) for s, p in ins if p >= 0}
    if len(target) != 1:
        raise _fail(base, ins, "its inputs are split along different dims")
    dim = target.pop()
    for shape, placement in ins:
        at = dim - (rank - len(shape))
        if placement == REPLICATE and at >= 0 and shape[at] != 1:
            raise _fail(base, ins, "one input is split where another is whole")
    return [dim if len(s) == rank else REPLICATE for s in outs]


def _reduce(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    shape, placement = ins[0]
    if len(ins) > 1:
        raise _fail(base, ins, "no rule for reductions of several tensors")
    dims = args[1] if len(args) > 1 and args[1] is not None and args[1] != () else tuple(range(len(shape)))
    dims = {d % len(shape) for d in ((dims,) if isinstance(dims, int) else dims) if not isinstance(d, bool)}
    if placement == PARTIAL and base in ("sum", "mean"):
        return [PARTIAL]
    if placement < 0 or placement in dims:
        if placement >= 0 and base == "sum":
            return [PARTIAL]
        raise _fail(base, ins, "it reduces over the parts")
    keep = len(outs[0]) == len(shape)
    return [placement if keep else placement - sum(d < placement for d in dims)] * len(outs)


def _product(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    """mm, addmm, bmm, baddbmm: [..., m, k] x [..., k, n]."""
    (a_shape, a), (_, b) = ins[-2], ins[-1]
    rank = len(a_shape)
    m, k = rank - 2, rank - 1
    if a == PARTIAL or b == PARTIAL:
        if {a, b} != {PARTIAL, REPLICATE} or len(ins) > 2:
            raise _fail(base, ins, "partial sums must be reduced first")
        out = PARTIAL
    elif a == k and b == m:
        out = PARTIAL
    elif a == m and b == REPLICATE:
        out = m
    elif a == REPLICATE and b == k:
        out = k
    elif a == b and 0 <= a < m:
        out = a
    else:
        raise _fail(base, ins, "these parts do not multiply")
    if len(ins) == 3:
        _check_bias(base, ins, out, rank)
    return [out]


def _check_bias(base: str, ins: list[Placed], out: int, rank: int) -> None:
    shape, bias = ins[0]
    aligned = bias + rank - len(shape) if bias >= 0 else bias
    if out == PARTIAL:  # the runtime divides a whole bias by the number of parts, so that the sum has it once
        legal = bias == REPLICATE
    else:
        at = out - (rank - len(shape))
        legal = aligned == out or (bias == REPLICATE and (at < 0 or shape[at] == 1))
    if not legal:
        raise _fail(base, ins, "the bias lies differently from the result")


def _norm(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    shape, placement = ins[0]
    normalized = len(args[1]) if base in ("native_layer_norm", "_fused_rms_norm") else len(shape)
    if placement < 0 or placement >= len(shape) - normalized or any(p != REPLICATE for _, p in ins[1:]):
        raise _fail(base, ins, "it normalises over the parts")
    return [placement] * len(outs)


def _embedding(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    """Rows of the table are split (every rank looks up its own, others are zero) or its columns; ids are whole."""
    (table, placement), *rest = ins
    if base != "embedding":  # gathers and scatters
        raise _fail(base, ins, "no rule for parts")
    if placement == PARTIAL or len(table) != 2 or any(p != REPLICATE for _, p in rest):
        raise _fail(base, ins, "only the table can be split")
    return [PARTIAL if placement == 0 else len(out) - 1 for out in outs]


def _attention(base: str, ins: list[Placed], outs: list[Shape], args: tuple[Any, ...], parts: int) -> list[int]:
    """Batch (dim 0) and heads (dim 1) are independent, in forward and backward."""
    tensors = [(s, p) for s, p in ins if len(s) >= 3]
    placement = _same(base, tensors)
    if placement not in (0, 1):
        raise _fail(base, ins, "attention mixes what is split; only batch and heads can be")
    return [placement if len(s) > placement else REPLICATE for s in outs]


_RULES: dict[str, Rule] = {
    "view": _reshape, "_unsafe_view": _reshape, "reshape": _reshape, "_reshape_alias": _reshape,
    "t": _transpose, "transpose": _transpose, "permute": _transpose, "numpy_T": _transpose, "mT": _transpose,
    "expand": _expand, "unsqueeze": _unsqueeze, "squeeze": _squeeze,
    "slice": _along, "split": _along, "split_with_sizes": _along, "chunk": _along, "select": _along, "cat": _along,
    "unbind": _along, "slice_backward": _along, "select_backward": _along, "cumsum": _along, "flip": _along,
    "_softmax": _along, "_log_softmax": _along, "_softmax_backward_data": _along, "_log_softmax_backward_data": _along,
    "detach": _pointwise, "alias": _pointwise, "lift_fresh": _pointwise, "clone": _pointwise, "copy": _pointwise,
    "_to_copy": _pointwise, "contiguous": _pointwise, "zeros_like": _pointwise, "ones_like": _pointwise,
    "full_like": _pointwise, "empty_like": _pointwise, "fill": _pointwise, "zero": _pointwise,
    "native_dropout": _pointwise, "pointwise": _pointwise, "glu": _halves, "glu_backward": _halves,
    "sum": _reduce, "mean": _reduce, "amax": _reduce, "amin": _reduce, "any": _reduce, "all": _reduce,
    "mm": _product, "addmm": _product, "bmm": _product, "baddbmm": _product,
    "native_layer_norm": _norm, "_fused_rms_norm": _norm,
    "embedding": _embedding,
    "attention": _attention, "attention_backward": _attention,
}  # fmt: skip
