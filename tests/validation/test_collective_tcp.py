"""Rows of torch.distributed over TCP become clusters: nodes share their port, and only AWS caps a flow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parplan.cli import main
from validation.collective_tcp import cluster_of, in_sample, is_tcp, tcp_points

ROW = {"backend": "nccl", "hardware": "AWS p3.2xlarge", "num_nodes": "4", "delay_ms": "1", "bandwidth_gbps": "10",
       "collective": "all_reduce", "bytes": "1e8", "time_us": "1e6"}  # fmt: skip


def row(**changes: str) -> dict[str, str]:
    return ROW | changes


def seconds(**changes: str) -> float:
    return tcp_points([row(**changes)])[2][0]


def test_devices_of_a_node_share_its_port() -> None:
    one, four = cluster_of(row()), cluster_of(row(gpus_per_node="4", hardware="AWS p3.8xlarge, four V100"))
    assert (one.size, four.size, four.devices_per_node, four.inter.ports) == (4, 16, 4, 1)
    assert four.intra.name == "NVLink" and four.intra.bandwidth > 10 * four.inter.bandwidth
    assert cluster_of(row(gpus_per_node="2", hardware="lab")).intra.name == "PCIe"
    shared = seconds(gpus_per_node="4", hardware="AWS p3.8xlarge, four V100")
    assert shared > 1.2 * seconds()  # 2 (n-1)/n of the bytes: 1.875 of 16 ranks, 1.5 of 4
    gloo = cluster_of(row(backend="gloo", gpus_per_node="2"))
    assert gloo.fabric == "loopback" and seconds(backend="gloo", gpus_per_node="2") > 0


def test_only_aws_caps_one_flow() -> None:
    aws, lab = (cluster_of(row(backend="gloo", hardware=name)).inter for name in ("AWS p3.2xlarge", "my lab, V100"))
    assert aws.flow_cap == pytest.approx(aws.bandwidth / 2) and lab.flow_cap == lab.bandwidth == aws.bandwidth
    assert aws.window == lab.window  # that of the kernel
    capped = cluster_of(row(backend="gloo", hardware="", source="github BinhangYuan/tc_cluster_setting")).inter
    assert capped == aws


@pytest.mark.parametrize(
    ("hardware", "rate", "said"),
    [
        ("AWS p3.2xlarge", 1.25e9, ""),
        ("", 1.25e9, ""),
        ("my lab, V100 16Gb", 1.25e9, " (10 Gb/s assumed)"),
        ("V100 on 25GbE", 3.125e9, ""),
        ("2x 10 Gbit/s", 2.5e9, ""),
    ],
)
def test_a_port_that_was_not_shaped_is_what_the_words_say(hardware: str, rate: float, said: str) -> None:
    case = row(backend="gloo", hardware=hardware, bandwidth_gbps="")
    assert cluster_of(case).inter.bandwidth == pytest.approx(rate)
    assert tcp_points([case])[3][0].partition("tcp")[2] == said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_nodes": ""}, "num_nodes is ''"),
        ({"num_nodes": "1"}, "two ranks or more"),
        ({"gpus_per_node": "1.5"}, "gpus_per_node is '1.5'"),
        ({"delay_ms": "fast"}, "delay_ms is 'fast'"),
        ({"bandwidth_gbps": "-1"}, "bandwidth_gbps is '-1'"),
        ({"time_us": ""}, "more than 0"),
        ({"backend": ""}, "backend '' has no model"),
        ({"collective": "scan"}, "'scan' is no known collective"),
        ({"collective": "barrier"}, "no bytes to sweep"),
    ],
)
def test_odd_cells_are_reasons(changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tcp_points([row(**changes)])


def test_spellings_of_collectives_and_backends_are_alike() -> None:
    for mine, usual in (("AllReduce", "all_reduce"), (" all_to_all_single", "alltoall"), ("PS-Sharded", "ps_sharded")):
        assert seconds(collective=mine, backend=" NCCL") == seconds(collective=usual)
    known, step = row(num_nodes="8", collective="Allreduce"), row(num_nodes="8", collective="all_reduce_step")
    assert in_sample(known) and not in_sample(step) and seconds(collective="all_reduce_step") == seconds()


def test_more_devices_a_node_are_out_of_sample() -> None:
    case = row(num_nodes="8")
    assert in_sample(case) and not in_sample(case | {"gpus_per_node": "4"})


def test_columns_with_a_usual_value_may_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_tcp({"backend": "gloo"}) and not is_tcp({"backend": "nccl", "interconnect": "8x400G"})
    path = tmp_path / "tcp.csv"
    path.write_text("config_id,Backend,num_nodes,collective,bytes,time_us\na,gloo,4,all_reduce,1e8,2e5\n")
    assert main(["collectives", "--cases", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["configs"][0]["constants"] == "formula"
    path.write_text("config_id,backend,collective,bytes,time_us\na,gloo,all_reduce,1e8,2e5\n")
    assert main(["collectives", "--cases", str(path)]) == 2
    assert "columns num_nodes are missing" in capsys.readouterr().err
