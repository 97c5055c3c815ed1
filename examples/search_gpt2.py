"""Ranked plans for GPT-2 on four GPUs of a DGX H100: step time, memory, lower bound, and what was left out."""

from __future__ import annotations

import parplan


def main() -> None:
    workload = parplan.load_workload("gpt2:layers=4,seq=512,batch=4")
    graph = parplan.trace_workload(workload)
    cluster = parplan.load_cluster("dgx-h100")
    result = parplan.search(workload, graph, cluster, global_batch=16, devices=4)
    print(f"{result.considered} plans considered, {result.infeasible} do not fit, {result.seconds:.1f} s")
    for ranked in result.plans[:5]:
        prediction = ranked.prediction
        print(
            f"{ranked.plan.label:28} {prediction.step_seconds * 1e3:7.2f} ms, "
            f"{max(prediction.peak_bytes) / 2**30:.2f} GiB, MFU {prediction.mfu:.1%}, {ranked.gap:.0%} above its bound"
        )
    for rejected in result.rejected:
        print(f"left out: {rejected.label} ({rejected.count}): {rejected.reason}")
    result.plans[0].plan.save("best_plan.json")  # for `parplan simulate --plan best_plan.json`


if __name__ == "__main__":
    main()
