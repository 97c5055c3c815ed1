"""What trainers run where their own kernels do not take a shape."""

from __future__ import annotations

from functools import lru_cache

import pytest

from opgraph.batch import trace_workload
from opgraph.graph import OpGraph
from opgraph.zoo.transformer import Shape, workload
from planner.folded_kernels import Kernels, Launch
from planner.folded_local import local_step
from planner.folded_pieces import pieces
from planner.plan import ParallelPlan
from planner.software import HOST, Software

SEQ, VOCAB, HEADS = 256, 1024, 8
STYLES = tuple(
    (f"blocks.{i}.{n}", s)
    for i in range(3)
    for n, s in (("attn.qkv", "colwise"), ("mlp.up", "colwise"), ("attn.o", "rowwise"), ("mlp.down", "rowwise"))
)
STEPS = 5  # operators in place of one kernel


@lru_cache(maxsize=2)
def traced(dtype: str) -> OpGraph:
    shape = Shape(3, 512, HEADS, HEADS, 2048, SEQ, VOCAB, dtype=dtype, attention="math")
    return trace_workload(workload("gpt", shape), fold=False)


def block(micro: int, tp: int, keys: int, dtype: str = "bfloat16") -> tuple[list[Launch], list[Launch]]:
    graph = traced(dtype).at_batch(micro)
    precision = "bf16" if dtype == "bfloat16" else "fp32"
    plan = ParallelPlan(global_batch=micro, tp=tp, precision=precision, shardings=STYLES)
    local = local_step(graph, plan, SEQ, VOCAB, True)
    kernels = Kernels(local, Software("test", HOST["torch"], softmax_keys=keys))
    found = pieces(graph)
    return kernels.forward(found.forward["block"]), kernels.backward(found.backward["block"])


def kernels_of(launches: list[Launch]) -> list[str]:
    return [x.shape.name.split(".")[1] for x in launches if x.shape is not None]


@pytest.mark.parametrize(
    ("micro", "tp", "keys", "apart"),
    [
        (4, 8, 2048, False),  # one head, four samples
        (2, 4, 2048, False),
        (1, 4, 2048, True),  # two matrices
        (1, 8, 2048, True),
        (4, 8, 128, True),  # more keys than it takes
        (1, 8, 0, False),  # a kernel that takes everything
    ],
)
def test_scores_that_the_masked_softmax_does_not_take_run_in_steps(micro: int, tp: int, keys: int, apart: bool) -> None:
    """Bytes of the five operators: 36 a score forward and 40 backward; each is launched by the host."""
    scores = micro * HEADS // tp * SEQ * SEQ
    for one, steps, moved, issue in zip(block(micro, tp, 0), block(micro, tp, keys), (36, 40), ("op", "backward")):
        more = [x for x in steps if x not in one]
        if not apart:
            assert not more
            continue
        assert "masked_fill" in " ".join(kernels_of(steps))
        assert len(kernels_of(steps)) == len(kernels_of(one)) + STEPS - 1
        shapes = [x.shape for x in more if x.shape is not None]
        assert sum(s.bytes_read + s.bytes_written for s in shapes) == moved * scores
        assert {s.dtype for s in shapes} == {"float32"}
        host = sum(x.host for x in steps) - sum(x.host for x in one)
        handmade = max(HOST["torch"].custom, HOST["torch"].backward) - HOST["torch"].backward if issue != "op" else 0.0
        assert host == pytest.approx((STEPS - 1) * getattr(HOST["torch"], issue) - handmade)


def test_scores_of_32_bits_stay_as_they_are() -> None:
    assert block(1, 8, 2048, "float32") == block(1, 8, 0, "float32")


@pytest.mark.parametrize("tp", [1, 2])
def test_a_loss_that_is_spelled_out_goes_over_the_logits_in_passes(tp: int) -> None:
    """32 bytes a logit forward and 8 backward, where torch's kernels move 8 and 12; and kernels of a number a row."""
    graph = traced("bfloat16").at_batch(2)
    plan = ParallelPlan(global_batch=2, tp=tp, precision="bf16", shardings=STYLES)
    local = local_step(graph, plan, SEQ, VOCAB, True)
    one, many = (Kernels(local, Software("test", HOST["torch"], spelled_loss=spelled)) for spelled in (False, True))
    found, rows, logits = pieces(graph), 2 * SEQ, 2 * SEQ * VOCAB // tp
    costs = HOST["torch"]
    for phase, moved, passes, small in (("forward", 32, 5, 16), ("backward", 8, 1, 9)):
        ops = getattr(found, phase)["last"]
        short, long = getattr(one, phase)(ops), getattr(many, phase)(ops)
        gone = [x for x in short if x.shape is not None and "_log_softmax" in x.shape.name]
        assert len(gone) == 1 and not any("_log_softmax" in name for name in kernels_of(long))
        assert len(kernels_of(long)) == len(kernels_of(short)) + passes + small - 1
        new = [x.shape for x in long if x not in short and x.shape is not None]
        of_logits = [s for s in new if len(s.out_shapes[0]) > 1]
        assert sum(s.bytes_read + s.bytes_written for s in of_logits) == moved * logits
        assert {s.in_shapes for s in new if len(s.out_shapes[0]) == 1} == {((rows,),)}
        calls = 3 * costs.message if phase == "forward" and tp == 1 else 0.0  # split ranks send them: counted there
        more = sum(x.host for x in long) - sum(x.host for x in short)
        assert more == pytest.approx((passes + small - 1) * costs.op + calls)


def test_metrics_are_cross_entropies_once_more_after_the_loss() -> None:
    """14 bytes a logit each: 16 bits read, 32 written, and those once over."""
    graph = traced("bfloat16").at_batch(2)
    local = local_step(graph, ParallelPlan(global_batch=2, precision="bf16"), SEQ, VOCAB, True)
    found = pieces(graph)
    none, two = (
        Kernels(local, Software("test", HOST["torch"], fused_loss=True, loss="logits", metrics=n)) for n in (0, 2)
    )
    plain, logged = none.forward(found.forward["last"]), two.forward(found.forward["last"])
    new = [x.shape for x in logged if x not in plain and x.shape is not None]
    assert sum(s.bytes_read + s.bytes_written for s in new if len(s.out_shapes[0]) > 1) == 2 * 14 * 2 * SEQ * VOCAB
    assert none.backward(found.backward["last"]) == two.backward(found.backward["last"])


def test_linear_layers_cost_the_host_of_transformer_engine_more_in_forward() -> None:
    """Four of them in a block; the rest of a call is in the launch, the function at a border, the module and views."""
    graph, found = traced("bfloat16").at_batch(4), pieces(traced("bfloat16").at_batch(4))
    local = local_step(graph, ParallelPlan(global_batch=4, precision="bf16"), SEQ, VOCAB, True)
    plain, engine = (Kernels(local, Software("test", HOST[name])) for name in ("torch", "transformer-engine"))
    hosts = [sum(x.host for x in kernels.forward(found.forward["block"])) for kernels in (plain, engine)]
    assert hosts[1] - hosts[0] == pytest.approx(4 * (115e-6 - 40.5e-6))
    backward = [sum(x.host for x in kernels.backward(found.backward["block"])) for kernels in (plain, engine)]
    assert backward[0] == pytest.approx(backward[1])
