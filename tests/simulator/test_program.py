import numpy as np
import pytest

from simulator import Pool, ProgramBuilder, Resource, program_from_arrays


def test_builder_fills_the_arrays() -> None:
    builder = ProgramBuilder()
    cores = builder.pool("host", 4)
    gpu = builder.resource("gpu", pool=cores, rank=3)
    a = builder.task("a", "forward", 1.5, gpu)
    b = builder.task("b", "backward", 2.0, gpu, deps=[a], demand=0.5)
    c = builder.task("c", "forward", 0.0, deps=(a, b), rank=1)
    builder.edge(a, c)
    program = builder.build()
    assert (a, b, c) == (0, 1, 2) and len(program) == 3
    assert program.duration.tolist() == [1.5, 2.0, 0.0]
    assert program.resource.tolist() == [0, 0, -1]
    assert program.demand.tolist() == [1.0, 0.5, 1.0]
    assert program.categories == ("forward", "backward") and program.category.tolist() == [0, 1, 0]
    assert program.rank.tolist() == [3, 3, 1]
    assert program.succ_ptr.tolist() == [0, 3, 4, 4] and program.succ.tolist() == [1, 2, 2, 2]
    assert program.indegree.tolist() == [0, 1, 3]
    assert program.labels == ("a", "b", "c")
    assert program.pools == (Pool("host", 4),) and program.resources == (Resource("gpu", 1, 0, 3),)
    dtypes = [program.duration.dtype, program.resource.dtype, program.category.dtype, program.succ.dtype]
    assert dtypes == [np.float64, np.int32, np.int16, np.int32]


def test_arrays_are_read_only() -> None:
    program = program_from_arrays([1.0], [], [])
    with pytest.raises(ValueError, match="read-only"):
        program.duration[0] = 2.0


def test_empty_program() -> None:
    program = ProgramBuilder().build()
    assert len(program) == 0 and program.succ_ptr.tolist() == [0]


def test_numbered_labels_are_made_when_asked_for() -> None:
    program = program_from_arrays(np.ones(10**6), [], [])
    assert program.labels[17] == "task 17" and program.labels[-1] == "task 999999" and len(program.labels) == 10**6
    assert program.labels[2:4] == ("task 2", "task 3")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_duration_and_demand_must_be_sensible(value: float) -> None:
    builder = ProgramBuilder()
    builder.task("matmul", "forward", value)
    with pytest.raises(ValueError, match=r"duration of task 0 \(matmul\)"):
        builder.build()
    with pytest.raises(ValueError, match="demand of task 1"):
        program_from_arrays([1.0, 1.0], [], [], demand=[0.0, value])


def test_cycle_names_its_tasks() -> None:
    builder = ProgramBuilder()
    a = builder.task("a", "x", 1.0)
    b = builder.task("b", "x", 1.0, deps=[a])
    builder.task("c", "x", 1.0, deps=[b])
    builder.edge(b, a)
    with pytest.raises(ValueError, match="cycle") as error:
        builder.build()
    assert "a (task 0)" in str(error.value) and "b (task 1)" in str(error.value) and "c (" not in str(error.value)


def test_long_cycle_is_shortened() -> None:
    ring = np.arange(100)
    with pytest.raises(ValueError, match=r"\.\.\. 94 more"):
        program_from_arrays(np.ones(100), ring, (ring + 1) % 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": [0], "target": [2]}, "edge names number 2 of 2 tasks"),
        ({"source": [-1], "target": [1]}, "edge names number -1 of 2 tasks"),
        ({"source": [0], "target": [1, 1]}, "1 edge sources are given for 2 targets"),
        ({"resource": [0, 1]}, "task names number 1 of 1 resources"),
        ({"resource": [-2, 0]}, "task names number -2 of 1 resources"),
        ({"category": 1}, "task names number 1 of 1 categories"),
        ({"rank": -2}, "ranks"),
        ({"demand": [1.0, 1.0, 1.0]}, "one value per task"),
        ({"labels": ["only one"]}, "1 labels are given for 2 tasks"),
        ({"resources": [Resource("r", capacity=0)]}, "resource r has capacity 0"),
        ({"resources": [Resource("r", pool=0)]}, "resource r is in pool 0"),
        ({"resources": [Resource("r", kind="gpu")]}, "of kind 'gpu'"),  # type: ignore[arg-type]
        ({"pools": [Pool("p", 0.0)]}, "pool p has capacity 0.0"),
        ({"pools": [Pool("p", float("nan"))]}, "pool p has capacity nan"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    given = {"duration": [1.0, 1.0], "source": [], "target": [], "resources": [Resource("r")], **arguments}
    with pytest.raises(ValueError, match=message):
        program_from_arrays(**given)
