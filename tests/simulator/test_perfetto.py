import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings

from simulator import ProgramBuilder, Resource, perfetto, program_from_arrays, simulate, write_perfetto
from simulator.perfetto import server_of, trace_events
from tests.simulator.programs import SEEDS, random_program


def test_file_holds_processes_threads_and_tasks(tmp_path: Path) -> None:
    builder = ProgramBuilder()
    gpu, net = builder.resource("gpu", rank=1), builder.resource("network", kind="link")
    a = builder.task('matmul "a"', "forward", 0.001, gpu)
    builder.task("all-reduce", "all_reduce", 0.0025, net, deps=[a], rank=1)
    write_perfetto(simulate(builder.build()), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["name"], e["pid"], e["tid"]): e["args"] for e in events if e["ph"] == "M"}
    first, second = (e for e in events if e["ph"] == "X")
    assert (first["name"], first["cat"], first["ts"], first["dur"]) == ('matmul "a"', "forward", 0.0, 1000.0)
    assert (second["ts"], second["dur"], second["args"]) == (1000.0, 2500.0, {"task": 1, "rank": 1})
    assert names["process_name", first["pid"], 0] == {"name": "rank 1"}
    assert names["thread_name", first["pid"], first["tid"]] == {"name": "gpu"}
    assert names["process_name", second["pid"], 0] == {"name": "shared"}
    assert names["thread_name", second["pid"], second["tid"]] == {"name": "network"}
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_slices_of_one_thread_never_overlap(seed: int) -> None:
    timeline = simulate(random_program(seed, 40, 4, pools=1, ties=bool(seed % 2)))
    events = [json.loads(json.dumps(event)) for event in trace_events(timeline)]
    slices = [event for event in events if event["ph"] == "X"]
    assert sorted(event["args"]["task"] for event in slices) == list(range(40))
    threads: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in slices:
        begin = round(event["ts"] * 1000)
        threads.setdefault((event["pid"], event["tid"]), []).append((begin, begin + round(event["dur"] * 1000)))
    assert len({tid for _, tid in threads}) == len(threads)
    for spans in threads.values():
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(spans)))


def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "trace.json"
    target.write_text("old")
    builder = ProgramBuilder()
    builder.task("a", "x", 1.0)

    def broken(timeline: object) -> object:
        yield {"ph": "M"}
        raise OSError("disk full")

    monkeypatch.setattr(perfetto, "trace_events", broken)
    with pytest.raises(OSError, match="disk full"):
        write_perfetto(simulate(builder.build()), target)
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_empty_program(tmp_path: Path) -> None:
    write_perfetto(simulate(ProgramBuilder().build()), tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == []


def test_a_server_is_used_again_once_it_is_free() -> None:
    program = program_from_arrays(
        [2.0, 1.0, 1.0, 1.0, 5.0], [], [], resource=[0, 0, 0, 0, 1], resources=[Resource("wide", 2), Resource("narrow")]
    )
    assert server_of(simulate(program)).tolist() == [1, 0, 0, 0, 0]
