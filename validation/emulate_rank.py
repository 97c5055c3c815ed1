"""One rank of an emulated network: reads tasks from stdin, a JSON object a line, and answers each with one line."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any


def main() -> None:
    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore", category=FutureWarning)  # collectives with newer names in torch 2.13
    rank, size, store, latency = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    torch.set_num_threads(1)
    backend = "gloo"
    if latency:
        from validation.emulate_shim import register

        backend = register(latency)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    print(json.dumps({"ready": rank}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps({"seconds": measure(rank, size, **task)}), flush=True)
    dist.destroy_process_group()


def measure(
    rank: int, size: int, kind: str, nbytes: int, repetitions: int, pause: float = 0.0, apart: float = 0.0
) -> list[float]:
    """Seconds of each repetition on this rank, each after a barrier; a send is half a round trip. pause: seconds for
    which those that send first keep the others waiting, whose own times are 0 then. apart: seconds by which one rank
    comes later than the others, in turn; it computes meanwhile, as a rank does that comes late."""
    import torch.distributed as dist

    call = operation(kind, nbytes, rank, size)
    times = []
    for i in range(repetitions + 2):
        dist.barrier()
        if pause and rank < size // 2:
            time.sleep(pause)
        begun = time.perf_counter()
        while apart and (i + rank) % size == 0 and time.perf_counter() < begun + apart:
            pass
        begun = time.perf_counter()
        call()
        spent = (time.perf_counter() - begun) / (2 if kind == "send" else 1)
        if i >= 2:
            times.append(0.0 if pause and rank >= size // 2 else spent)
    return times


def operation(kind: str, nbytes: int, rank: int, size: int) -> Callable[[], Any]:
    """The collective on float32 buffers; `nbytes` as nccl-tests counts. send: rank r to r + P/2 and back."""
    import torch
    import torch.distributed as dist

    whole = torch.ones(max(nbytes // 4, size) // size * size)
    part = torch.ones(whole.numel() // size)
    peer = (rank + size // 2) % size
    match kind:
        case "all_reduce":
            return lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX)
        case "all_gather":
            return lambda: dist.all_gather_into_tensor(whole, part)
        case "reduce_scatter":
            return lambda: dist.reduce_scatter_tensor(part, whole, op=dist.ReduceOp.MAX)
        case "broadcast":
            return lambda: dist.broadcast(whole, 0)
        case "all_to_all":
            other = torch.empty_like(whole)
            return lambda: dist.all_to_all_single(other, whole)
    assert kind == "send", kind

    def bounce() -> None:
        if rank < size // 2:
            dist.send(whole, peer)
            dist.recv(whole, peer)
        else:
            dist.recv(whole, peer)
            dist.send(whole, peer)

    return bounce


if __name__ == "__main__":
    main()
