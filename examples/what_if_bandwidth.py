"""How much does the link between the GPUs matter? One plan on the same node with faster and slower links."""

from __future__ import annotations

from dataclasses import replace

import parplan


def main() -> None:
    workload = parplan.load_workload("gpt2:layers=4,seq=512,batch=4")
    graph = parplan.trace_workload(workload)
    cluster = parplan.load_cluster("dgx-h100")
    plan = parplan.ParallelPlan(global_batch=16, dp=4)
    for factor in (4.0, 1.0, 0.25, 0.05):
        link = replace(cluster.intra, bandwidth=factor * cluster.intra.bandwidth)
        prediction = parplan.predict(graph, plan, replace(cluster, intra=link, cache={}))
        exposed = prediction.breakdown["exposed_communication"] / prediction.step_seconds
        print(
            f"{link.bandwidth / 1e9:7.1f} GB/s: {prediction.step_seconds * 1e3:7.2f} ms, "
            f"{exposed:.0%} of it waits for communication"
        )


if __name__ == "__main__":
    main()
