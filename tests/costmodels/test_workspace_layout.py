"""How tensors lie, held to torch's own answers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from costmodels.workspace_layout import as_channels_last, channels_last, contiguous, up

sizes = st.lists(st.integers(1, 4), min_size=4, max_size=5).map(tuple)


@given(sizes, st.randoms())
def test_as_torch_sees_it(shape: tuple[int, ...], draw: object) -> None:
    order = list(range(len(shape)))
    draw.shuffle(order)  # type: ignore[attr-defined]
    t = torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    assert contiguous(shape, t.stride()) == t.is_contiguous()
    assert contiguous(as_channels_last(shape), as_channels_last(t.stride())) == t.is_contiguous(memory_format=form)
    suggested = torch._prims_common.suggest_memory_format(t)
    assert channels_last(shape, t.stride()) == (suggested == form)


def test_multiples() -> None:
    assert [up(n, 16) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]
