"""Forward steps of inference: the traced forward alone, and the script of decode, whose attention reads a cache.

Nothing here knows models: a decoder is a graph all of whose attentions are causal, and its cache holds what they read
as keys and values. Decode is traced with one token; then every attention gets keys and values of the whole context, and
two copies that write the new ones into the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import prod
from typing import Any

from costmodels.families import base_name, family
from costmodels.ops import OpShape, is_causal
from opgraph.batch import trace_workload
from opgraph.eight_bits import in_eight_bits
from opgraph.graph import DTYPE_BYTES, Op, OpGraph
from opgraph.workload import Workload
from planner.inference_head import Head, head_of
from planner.script import Item, Work

ALL_LOGITS = "logits are computed of every token of the prompt, as the model's own code does; engines need the last"
DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}


def trace_inference(
    of_length: Callable[[int], Workload], prompt: int, generate: int, precision: str, accelerator: bool | None = None
) -> tuple[OpGraph, OpGraph | None]:
    """The forward passes of a prompt and of one token; the latter None where nothing is generated or the model does not
    decode. of_length: the workload at a length. A decoder's logits of the prompt are those of its last token, as
    engines compute them, unless its own code needs all, which a note then says."""
    whole = trace_forward(of_length(prompt), precision, accelerator)
    if no_decode(whole):
        return whole, None
    of_length(prompt + generate)  # says where the model has fewer positions
    token = trace_forward(of_length(1), precision, accelerator) if generate else None
    head = head_of(whole)
    if head is None or prompt == 1:
        return whole, token
    if head.tokens >= 0:
        # what the model does with its logits may need those of all tokens
        with suppress(RuntimeError, ValueError, IndexError):
            return trace_forward(of_length(prompt), precision, accelerator, head), token
    return replace(whole, notes=(*whole.notes, ALL_LOGITS)), token


def trace_forward(
    workload: Workload, precision: str, accelerator: bool | None = None, last: Head | None = None
) -> OpGraph:
    """The forward pass of the module in eval mode, as it runs under no_grad with its weights in `precision` (in fp8
    those of blocks, all else in bf16); exact at every batch. The output lives until the pass is over. accelerator: as
    for `trace_workload`. last: the head that reads the last token alone."""
    import torch
    from torch import nn

    dtype = getattr(torch, DTYPES[precision])

    def build() -> nn.Module:
        module: nn.Module = workload.build().eval().requires_grad_(False)
        if last is not None:
            module.get_submodule(last.module).register_forward_pre_hook(last_token)
        return module.to(dtype)

    def last_token(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        assert last is not None, "it is registered with a head only"
        row = inputs[0].narrow(last.tokens, inputs[0].shape[last.tokens] - 1, 1)
        return row.contiguous(), *inputs[1:]  # rows side by side, so that the head is one product

    def batch(n: int) -> Any:
        inputs, _ = workload.batch(n)
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs), ()

    with _op_by_op():
        forward = replace(workload, build=build, batch=batch, loss=_output)
        # nothing is cast on the way: weights are in 16 bits already
        found = trace_workload(forward, precision="tf32" if precision == "tf32" else "fp32", accelerator=accelerator)
    return in_eight_bits(found, weights=True) if precision == "fp8" else found


@contextmanager
def _op_by_op() -> Iterator[None]:
    """Keeps `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` from running as one op in eval mode, of which
    nobody could tell the products, the attention and the cache."""
    import torch

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _output(output: Any, *targets: Any) -> Any:
    """In place of a loss: the output itself."""
    del targets
    return output


def attentions(graph: OpGraph) -> list[Op]:
    """The attention ops of a forward pass."""
    return [op for op in graph.ops if family(op.name) == "attention"]


def no_decode(graph: OpGraph) -> str:
    """Why this model does not generate token by token, in one sentence; empty where it does."""
    found = attentions(graph)
    if not found:
        return f"{graph.name} has no attention that torch runs as one op, so there is no KV cache to decode with"
    open_ = [op for op in found if not is_causal(op)]
    if open_:
        return (
            f"{graph.name} is no decoder: {open_[0].module or 'its attention'} also reads later tokens, so that each "
            f"new token would change all of them"
        )
    return ""


def cache_bytes(items: Iterable[Item], context: int) -> int:
    """Bytes of the KV cache of one rank for `context` tokens: keys and values of its heads, in all layers."""
    return sum(
        _cached(shape, context) * DTYPE_BYTES[i.shape.dtype]
        for i in items if isinstance(i, Work) and family(i.shape.name) == "attention"
        for shape in i.shape.in_shapes[1:3]
    )  # fmt: skip


def _cached(shape: Sequence[int], context: int) -> int:
    """Elements of keys (batch, heads, tokens, width) or values with `context` tokens."""
    return prod((*shape[:2], context, *shape[3:]))


def prefill_items(items: Iterable[Item]) -> list[Item]:
    """The forward pass of a prompt, with copies of all keys and values into the cache."""
    found: list[Item] = []
    for item in items:
        if isinstance(item, Work) and family(item.shape.name) == "attention":
            found += _writes(item)
        found.append(item)
    return found


def decode_items(items: Iterable[Item], context: int, graph: OpGraph) -> list[Item]:
    """The forward pass of one token a sequence, whose attention reads `context` cached tokens, its own among them.

    A product with one weight for all sequences is one product of all rows. With a single token torch on a CPU may not
    see that its rows lie side by side (attention's results do on GPUs), and repeats the weight instead.
    """
    found: list[Item] = []
    for item in items:
        if isinstance(item, Work) and family(item.shape.name) == "attention":
            found += _writes(item)
            item = replace(item, shape=_over_cache(item.shape, context))
        elif isinstance(item, Work) and item.op >= 0 and base_name(item.shape.name) == "bmm":
            item = _one_product(item, graph)
        found.append(item)
    return found


def _one_product(item: Work, graph: OpGraph) -> Work:
    """A batched product whose weight is repeated (stride 0 along the batch) as one product."""
    rows, weight = item.shape.in_shapes[:2]
    if graph.tensors[graph.ops[item.op].inputs[1]].strides[0] != 0:
        return item
    flat = (rows[0] * rows[1], rows[2])
    made = ((flat[0], weight[2]),)
    shape = replace(item.shape, name="aten.mm.default", in_shapes=(flat, weight[1:]), out_shapes=made)
    return replace(item, shape=shape)


def _writes(item: Work) -> list[Work]:
    """The new keys and values, copied into their places in the cache."""
    made = []
    for shape in item.shape.in_shapes[1:3]:
        size = prod(shape) * DTYPE_BYTES[item.shape.dtype]
        copy = OpShape("aten.copy_.default", "forward", (shape, shape), (), item.shape.dtype, 0, size, size)
        made.append(Work(copy, "forward", item.module))
    return made


def _over_cache(shape: OpShape, context: int) -> OpShape:
    query, *cached = shape.in_shapes[:3]
    grown = tuple((*s[:2], context, *s[3:]) for s in cached)
    tokens = cached[0][2]
    read = (prod(query) + sum(map(prod, grown))) * DTYPE_BYTES[shape.dtype]
    flops = shape.flops * context // tokens
    ins = (query, *grown, *shape.in_shapes[3:])
    return replace(shape, in_shapes=ins, flops=flops, bytes_read=read, causal=False)
