"""The grid of settings, and the model of the published PowerSGD run."""

from __future__ import annotations

from opgraph.batch import trace_workload
from opgraph.models import load_workload
from validation.compression_grid import COMPRESSIONS, _points, cluster_of, report
from validation.resnet18 import workload

SMALL = "alexnet:width=16,hidden=256,classes=40,dropout=0,batch=8"


def test_compression_wins_where_the_network_is_slow_enough_and_never_where_it_is_not():
    graph = trace_workload(load_workload(SMALL))
    slow = _points("small", graph, cluster_of(8, 0.01), 8, 8, 10, COMPRESSIONS)
    fast = _points("small", graph, cluster_of(8, 1e4), 8, 8, 25, COMPRESSIONS)
    assert all(s.wins for s in slow) and not any(s.wins for s in fast)
    assert all(s.after >= s.compressed * (1 - 1e-9) and s.after > 0 for s in slow)
    assert all(s.codec > 0 for s in (*slow, *fast)) and len({s.plain for s in slow}) == 1
    text = report([*slow, *fast], (0.312, 0.239), "a command")
    assert "wins in 3 of 6 settings" in text and "| sign | small | 1 of 1 | 0 of 1 |" in text and "312 ms" in text


def test_nodes_of_the_grid():
    cluster = cluster_of(96, 25)
    assert (cluster.nodes, cluster.devices_per_node, cluster.inter.ports) == (24, 4, 1)
    assert cluster.inter.bandwidth == 25e9 / 8


def test_resnet18_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in workload().build().parameters()) == 11_173_962
    graph = trace_workload(workload())
    assert graph.param_count == 11_173_962
