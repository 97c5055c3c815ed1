import numpy as np

from simulator.order import compressed_rows, edge_sources, find_cycle, predecessors


def rows(edges: list[tuple[int, int]], n: int) -> tuple[np.ndarray, np.ndarray]:
    source, target = np.array(edges, np.int32).reshape(-1, 2).T
    return compressed_rows(source, target, n)


def test_rows_hold_ascending_targets_of_each_source() -> None:
    pointer, targets = rows([(2, 0), (0, 3), (0, 1), (0, 1)], 4)
    assert pointer.tolist() == [0, 3, 3, 4, 4]
    assert targets.tolist() == [1, 1, 3, 0]
    assert edge_sources(pointer).tolist() == [0, 0, 0, 2]


def test_no_edges_and_no_nodes() -> None:
    pointer, targets = rows([], 0)
    assert pointer.tolist() == [0] and targets.size == 0
    assert find_cycle(pointer, targets) == []


def test_predecessors_turn_the_edges_around() -> None:
    pointer, sources = predecessors(*rows([(0, 2), (1, 2), (2, 3)], 4))
    assert pointer.tolist() == [0, 0, 0, 2, 3]
    assert sources.tolist() == [0, 1, 2]


def test_cycle_is_found_behind_and_before_other_nodes() -> None:
    cycle = find_cycle(*rows([(0, 1), (1, 3), (3, 2), (2, 1), (2, 4), (4, 5)], 6))
    assert sorted(cycle) == [1, 2, 3]
    follows = {1: 3, 3: 2, 2: 1}
    assert all(follows[a] == b for a, b in zip(cycle, cycle[1:] + cycle[:1]))


def test_descending_edges_without_a_cycle_are_fine() -> None:
    assert find_cycle(*rows([(3, 2), (2, 1), (1, 0)], 4)) == []


def test_self_edge_is_a_cycle() -> None:
    assert find_cycle(*rows([(1, 1)], 2)) == [1]
