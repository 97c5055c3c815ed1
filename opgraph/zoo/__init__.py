"""Models built from their own dimensions in plain torch.nn; `opgraph.models` names them.

`sizes` holds the numbers and needs no torch; every other module is one family: its nn.Module and
`workload(name, sizes)`. Blocks stand in one list and run one after another; q, k, v are linear layers of their own
and head counts are never spelled out, so that a column-sharded projection works with the heads it has.
"""
