"""Models built from their own dimensions in plain torch.nn; `opgraph.models` names them.

`sizes`, `names`, `overrides` and `huggingface` hold the numbers and need no torch. Every family is a module of its
own: its nn.Module and `workload(name, sizes)`. `factory` makes workloads from users' files. Blocks stand in one list
and run one after another; q, k, v are linear layers of their own and head counts are never spelled out, so that a
column-sharded projection works with the heads it has.
"""
