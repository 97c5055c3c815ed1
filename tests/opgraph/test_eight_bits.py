"""Which products run in fp8, and what weights in 8 bits weigh."""

from opgraph.batch import trace_workload
from opgraph.eight_bits import in_eight_bits, mark_of
from opgraph.graph import DTYPE_BYTES
from opgraph.models import load_workload

LLAMA = "llama3-8b:layers=2,hidden=64,heads=4,kv_heads=2,ffn=128,seq=32,vocab=256,batch=2"


def test_products_of_blocks_run_in_fp8_and_those_for_weights_find_their_factors_cast():
    graph = trace_workload(load_workload(LLAMA), precision="fp8")
    assert graph.precision == "fp8"
    marked = [op for op in graph.ops if mark_of(op)]
    # q, k, v, o, gate, up and down of two blocks, each with two products in backward; not the head
    assert len(marked) == 2 * 7 * 3 and not any("head" in op.module for op in marked)
    assert [op for op in graph.ops if "head" in op.module and ".mm" in op.name]
    found = [op for op in marked if mark_of(op) == "found"]
    assert len(found) == 2 * 7 and {op.phase for op in found} == {"backward"}


def test_dims_that_are_no_multiples_of_16_stay_in_16_bits():
    graph = trace_workload(load_workload(LLAMA.replace("ffn=128", "ffn=120")), precision="fp8")
    names = {op.module.rpartition(".")[2] for op in graph.ops if mark_of(op)}
    whole = trace_workload(load_workload(LLAMA), precision="fp8")
    assert len({op.module.rpartition(".")[2] for op in whole.ops if mark_of(op)} - names) == 3  # gate, up, down


def test_kept_weights_take_a_byte_an_element():
    graph = trace_workload(load_workload(LLAMA), precision="bf16")
    assert not any(t.dtype.startswith("float8") for t in in_eight_bits(graph, weights=True).tensors)  # masters: float32
    from planner.inference_graph import trace_forward

    plain, eight = (trace_forward(load_workload(LLAMA), p) for p in ("bf16", "fp8"))
    for name, t in eight.parameters.items():
        size = 1 if name.startswith(tuple(op.module for op in eight.ops if mark_of(op))) else 2
        assert eight.storages[t.storage].bytes == size * t.numel, name
        assert DTYPE_BYTES[t.dtype] == size and plain.storages[t.storage].bytes == 2 * t.numel
