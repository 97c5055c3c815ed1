"""Sharding rules: each rule computes the same parts as the real op on real parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.rules import PARTIAL, REPLICATE, ShardingError, local_shape, place

aten = torch.ops.aten


def parts_of(t, placement, n):
    if placement == REPLICATE:
        return [t] * n
    if placement == PARTIAL:
        weights = [float(i + 1) for i in range(n)]
        return [t * (w / sum(weights)) for w in weights]
    return list(t.chunk(n, placement))


def whole(parts, placement):
    if placement == REPLICATE:
        return parts[0]
    return sum(parts[1:], parts[0]) if placement == PARTIAL else torch.cat(parts, placement)


def check(op, args, placements, n=2):
    """Runs `op` on the parts of its tensor arguments; the rule says how the results make the whole result."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    expected = op(*args)
    ins = [(tuple(t.shape), p) for t, p in zip(tensors, placements)]
    refs = tuple(a if not isinstance(a, torch.Tensor) else object() for a in args)
    out = expected if isinstance(expected, torch.Tensor) else expected[0]
    found = place(str(op), ins, [tuple(out.shape)], refs, n)[0]
    split = [parts_of(t, p, n) for t, p in zip(tensors, placements)]
    results = []
    for i in range(n):
        local = iter([s[i] for s in split])
        here = [next(local) if isinstance(a, torch.Tensor) else a for a in args]
        got = op(*here)
        results.append(got if isinstance(got, torch.Tensor) else got[0])
    torch.testing.assert_close(whole(results, found), out)
    assert tuple(results[0].shape) == local_shape(tuple(out.shape), found, n)
    return found


R, P = REPLICATE, PARTIAL


@pytest.mark.parametrize(
    ("placements", "result"), [((0, R), 0), ((R, 1), 1), ((1, 0), P), ((R, R), R), ((P, R), P), ((R, P), P)]
)
def test_mm(placements, result):
    args = (torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64))
    assert check(aten.mm.default, args, placements) == result


@pytest.mark.parametrize(("placements", "result"), [((0, 0), 0), ((1, R), 1), ((R, 2), 2), ((2, 1), P)])
def test_bmm(placements, result):
    args = (torch.randn(4, 2, 6, dtype=torch.float64), torch.randn(4, 6, 8, dtype=torch.float64))
    assert check(aten.bmm.default, args, placements) == result


def test_addmm_adds_a_split_bias_to_split_columns():
    args = (torch.randn(8), torch.randn(4, 6), torch.randn(6, 8))
    assert check(aten.addmm.default, args, (0, R, 1)) == 1
    assert place("aten.addmm.default", [((8,), R), ((4, 6), 1), ((6, 8), 0)], [(4, 8)], (), 2) == [PARTIAL]
    with pytest.raises(ShardingError, match="bias"):
        place("aten.addmm.default", [((8,), R), ((4, 6), R), ((6, 8), 1)], [(4, 8)], (), 2)


@pytest.mark.parametrize("op", [aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_pointwise_of_equal_parts(op, dim):
    args = (torch.randn(2, 4, 6), torch.randn(2, 4, 6))
    assert check(op, args, (dim, dim)) == dim


def test_pointwise_broadcasts():
    assert check(aten.mul.Tensor, (torch.randn(2, 4, 6), torch.randn(1, 6)), (0, R)) == 0
    assert check(aten.add.Tensor, (torch.randn(2, 4, 6), torch.randn(6)), (2, 0)) == 2
    with pytest.raises(ShardingError, match="split where another is whole"):
        place("aten.add.Tensor", [((2, 4, 6), 2), ((6,), R)], [(2, 4, 6)], (), 2)


def test_sums_of_partial_sums_stay_partial_and_products_do_not():
    assert check(aten.add.Tensor, (torch.randn(4, 4), torch.randn(4, 4)), (P, P)) == P
    for name in ("aten.mul.Tensor", "aten.relu.default", "aten.gelu.default"):
        with pytest.raises(ShardingError, match="reduced first"):
            place(name, [((4, 4), P)] * (2 if "mul" in name else 1), [(4, 4)], (), 2)


@pytest.mark.parametrize(
    ("dims", "keep", "placement", "result"),
    [((0,), True, 1, 1), ((0,), False, 1, 0), ((1,), False, 1, P), ((0, 1), False, 2, 0)],
)
def test_sum(dims, keep, placement, result):
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    assert check(aten.sum.dim_IntList, (x, list(dims), keep), (placement,)) == result


def test_attention_splits_batch_and_heads_only():
    q = torch.randn(2, 4, 8, 16)
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    for dim in (0, 1):
        assert check(op, (q, torch.randn_like(q), torch.randn_like(q)), (dim, dim, dim)) == dim
    with pytest.raises(ShardingError, match="only batch and heads"):
        place(str(op), [(tuple(q.shape), 3)] * 3, [tuple(q.shape)], (), 2)


def test_norm_needs_the_whole_row():
    x, w = torch.randn(4, 6, 8), torch.randn(8)
    assert check(aten.native_layer_norm.default, (x, [8], w, w, 1e-5), (1, R, R)) == 1
    with pytest.raises(ShardingError, match="normalises over the parts"):
        place("aten.native_layer_norm.default", [((4, 6, 8), 2), ((8,), R), ((8,), R)], [(4, 6, 8)], (None, [8]), 2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 4, 6]), min_size=1, max_size=4),
    st.data(),
)
def test_views_keep_parts_or_refuse(shape, data):
    """Where the rule says a reshape is local, the parts of the reshaped tensor are the reshaped parts."""
    total = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    cut = data.draw(st.sampled_from(range(len(shape) + 1)))
    flat = [int(torch.tensor(shape[:cut]).prod()), int(torch.tensor(shape[cut:]).prod())]
    target = data.draw(st.sampled_from([flat, [total.numel()], [1, *shape], [*shape, 1], shape[::-1]]))
    dim = data.draw(st.sampled_from(range(len(shape))))
    if shape[dim] % 2:
        return
    out = total.reshape(target)
    try:
        found = place("aten.view.default", [(tuple(shape), dim)], [tuple(out.shape)], (), 2)[0]
    except ShardingError:
        return
    local = [p.reshape(local_shape(tuple(out.shape), found, 2)) for p in total.chunk(2, dim)]
    assert torch.equal(torch.cat(local, found), out)


def test_transpose_permute_and_unsqueeze_move_the_dim():
    x = torch.randn(2, 4, 6)
    assert check(aten.transpose.int, (x, 0, 2), (2,)) == 0
    assert check(aten.permute.default, (x, [2, 0, 1]), (1,)) == 2
    assert check(aten.unsqueeze.default, (x, 1), (1,)) == 2
    assert check(aten.t.default, (x[0],), (0,)) == 1


def test_slices_and_softmax_along_other_dims_only():
    x = torch.randn(2, 4, 6)
    assert check(aten.slice.Tensor, (x, 1, 0, 2), (0,)) == 0
    assert check(aten._softmax.default, (x, -1, False), (1,)) == 1
    assert check(aten.select.int, (x, 0, 1), (2,)) == 1
    for name, args in (("aten.slice.Tensor", (None, 1, 0, 2)), ("aten._softmax.default", (None, 1, False))):
        with pytest.raises(ShardingError, match="needs all of dim 1"):
            place(name, [((2, 4, 6), 1)], [(2, 4, 6)], args, 2)


def test_uneven_parts_are_refused():
    with pytest.raises(ShardingError, match="does not divide into 2 equal parts"):
        local_shape((3, 4), 0, 2)


def test_an_op_without_a_rule_is_named():
    with pytest.raises(ShardingError, match="convolution"):
        place("aten.convolution.default", [((2, 4, 8, 8), 1), ((4, 4, 3, 3), R)], [(2, 4, 8, 8)], (), 2)


def test_a_selected_dim_comes_back_in_backward() -> None:
    args = (None, (2, 6, 8, 2), -1, 0)
    assert place("aten.select_backward.default", [((2, 6, 8), 2)], [(2, 6, 8, 2)], args, 2) == [2]
    args = (None, (2, 6, 8), 0, 0)
    assert place("aten.select_backward.default", [((6, 8), 1)], [(2, 6, 8)], args, 2) == [2]


def test_expanding_a_tensor_to_its_own_shape_makes_no_new_one() -> None:
    assert place("aten.expand.default", [((4, 8), 0)], [], (None, (4, 8)), 2) == []


def test_halves_of_a_dim_are_no_halves_of_its_parts():
    shape, half = (2, 8, 16), (2, 8, 8)
    assert place("aten.glu.default", [(shape, 1)], [half], (None, -1), 2) == [1]
    for dim, args in ((2, (None, -1)), (2, (None, 2)), (1, (None, 1))):
        with pytest.raises(ShardingError, match="needs all of dim"):
            place("aten.glu.default", [(shape, dim)], [half], args, 2)


def test_rows_of_a_table_are_summed_and_its_columns_stay_apart():
    table, ids, out = (64, 16), (2, 8), (2, 8, 16)
    assert place("aten.embedding.default", [(table, 0), (ids, REPLICATE)], [out], (), 2) == [PARTIAL]
    assert place("aten.embedding.default", [(table, 1), (ids, REPLICATE)], [out], (), 2) == [2]
    with pytest.raises(ShardingError, match="only the table"):
        place("aten.embedding.default", [(table, 0), (ids, 0)], [out], (), 2)


def test_parts_joined_with_an_expanded_whole_are_parts() -> None:
    """Every head's own keys beside a key that all heads share: a rank expands it to its own heads."""
    own, shared = torch.randn(2, 4, 3, 5), torch.randn(2, 1, 3, 2).expand(-1, 4, -1, -1)
    shapes = [(tuple(own.shape), 1), (tuple(shared.shape), R)]
    out = torch.cat((own, shared), -1)
    assert place("aten.cat.default", shapes, [tuple(out.shape)], ([0, 1], -1), 2) == [1]
    for rank in range(2):
        local = torch.cat((own[:, 2 * rank : 2 * rank + 2], shared[:, :2]), -1)
        assert torch.equal(local, out[:, 2 * rank : 2 * rank + 2])
    with pytest.raises(ShardingError):
        place("aten.cat.default", [((4, 4), 0), ((4, 4), 1)], [(8, 4)], ([0, 1], 0), 2)
