"""Attention: monotone, causal cheaper, published rates of kernels met, and what torch's ops say of their masks."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from costmodels import attention_law
from costmodels.attention import Kernel, attention_price, attention_prices, calls_of, kernel_of, law_of
from costmodels.attention_law import HEAD_DIMS, head_rate, head_table, step_keys, steps_of
from costmodels.device import Device, load_device
from costmodels.ops import OpShape, price, shape_of
from opgraph.trace import trace

H100, A100, B200 = load_device("h100-sxm"), load_device("a100-sxm-80gb"), load_device("b200")
FLASH, CUDNN = "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"


def call(
    batch: int, heads: int, tokens: int, width: int, *, causal: bool = False, name: str = CUDNN, kv_heads: int = 0,
    keys: int = 0, backward: bool = False, dtype: str = "bfloat16",
) -> OpShape:  # fmt: skip
    q, k = (batch, heads, tokens, width), (batch, kv_heads or heads, keys or tokens, width)
    ins = (q, q, k, k) if backward else (q, k, k)
    full = f"aten.{name}{'_backward' if backward else ''}.default"
    flops = 4 * batch * heads * tokens * (keys or tokens) * width * (5 if backward else 2) // 2
    return OpShape(full, "backward" if backward else "forward", ins, (q,), dtype, flops, 0, 0, causal)


def seconds(device: Device, shape: OpShape) -> float:
    found = attention_price(device, shape)
    assert found is not None
    return found.seconds


@pytest.mark.parametrize("device", [A100, H100, B200], ids=lambda d: d.name)
@given(
    dims=st.tuples(st.integers(1, 8), st.integers(1, 32), st.integers(16, 4096), st.sampled_from([64, 128, 192, 256])),
    axis=st.integers(0, 2), more=st.integers(1, 500), causal=st.booleans(),
)  # fmt: skip
def test_larger_attention_costs_no_less(
    device: Device, dims: tuple[int, int, int, int], axis: int, more: int, causal: bool
) -> None:
    batch, heads, tokens = (n + more * (i == axis) for i, n in enumerate(dims[:3]))
    assert 0 < seconds(device, call(*dims, causal=causal)) <= seconds(
        device, call(batch, heads, tokens, dims[3], causal=causal)
    ) * (1 + 1e-9)


@pytest.mark.parametrize("device", [A100, H100, B200], ids=lambda d: d.name)
def test_a_causal_mask_saves_almost_half_of_long_sequences_and_nothing_of_short_ones(device: Device) -> None:
    long = [seconds(device, call(4, 32, 8192, 128, causal=c)) for c in (True, False)]
    assert 0.5 < long[0] / long[1] < 0.56
    short = [seconds(device, call(4, 32, 64, 128, causal=c)) for c in (True, False)]
    assert short[0] == pytest.approx(short[1])


# FlashAttention-3 on H100 SXM, forward, head dim 128, no mask, 16k tokens in all, 2048 wide: TFLOP/s by sequence
# length, from the paper's figure (shared/facts/compute.md B3). The law was fitted to vLLM's timings of other shapes,
# whose kernel (ragged batches, paged keys) is 15 to 20 % slower than the paper's on short sequences.
FLASH3 = {512: 467, 1024: 565, 2048: 625, 4096: 638, 8192: 646, 16384: 648}
FLASH2 = {512: 309, 16384: 370}


@pytest.mark.parametrize("tokens", FLASH3)
def test_rates_of_flash_attention_3_as_published(tokens: int) -> None:
    shape = call(16384 // tokens, 16, tokens, 128)
    launch = H100.kernels["attention"]["bfloat16"]["launch"]  # the paper's loop hides it
    rate = shape.flops / (seconds(H100, shape) - launch) / 1e12
    assert rate / FLASH3[tokens] == pytest.approx(1, abs=0.12) if tokens >= 2048 else 0.78 < rate / FLASH3[tokens] < 1


@pytest.mark.parametrize("tokens", FLASH2)
def test_torchs_own_flash_kernel_is_flash_attention_2_on_hopper_too(tokens: int) -> None:
    shape = call(16384 // tokens, 16, tokens, 128, name=FLASH)
    assert shape.flops / seconds(H100, shape) / 1e12 == pytest.approx(FLASH2[tokens], rel=0.15)
    on_a100 = [seconds(A100, call(8, 16, 2048, 128, name=n)) for n in (FLASH, CUDNN)]
    assert on_a100[0] == on_a100[1]  # the A100's table is FlashAttention-2


def test_flash_attention_2_on_a100_reaches_the_published_share_of_the_peak() -> None:
    shape = call(2, 16, 8192, 128, name=FLASH)
    assert 0.50 < shape.flops / seconds(A100, shape) / 312e12 < 0.73


@pytest.mark.parametrize("device", [A100, H100, B200], ids=lambda d: d.name)
def test_backward_takes_two_and_a_half_times_the_work_at_a_lower_rate(device: Device) -> None:
    forward, backward = (seconds(device, call(4, 32, 4096, 128, causal=True, backward=b)) for b in (False, True))
    assert 2.5 < backward / forward < 3.4


def test_unfused_attention_pays_for_its_scores() -> None:
    fused, math = (seconds(A100, call(4, 16, 2048, 64, name=n)) for n in (FLASH, "_scaled_dot_product_attention_math"))
    assert math > 2 * fused
    assert math > 4 * 4 * 16 * 2048**2 * 2 / A100.memory_bandwidth


def test_one_query_reads_the_cache_once() -> None:
    shape = call(64, 32, 1, 128, kv_heads=8, keys=8192)
    assert kernel_of(shape) == "decode"
    cache = 2 * 64 * 8 * 8192 * 128 * 2
    assert cache / H100.memory_bandwidth < seconds(H100, shape) < 2 * cache / H100.memory_bandwidth
    assert seconds(H100, shape) < seconds(H100, call(64, 32, 1, 128, kv_heads=32, keys=8192))


def test_rates_between_and_beyond_the_tables_head_dims() -> None:
    heads = head_table({"head_dims": [64, 128], "rates": [0.5, 0.7]})
    widths = [64.0, 96.0, 128.0, 256.0, 32.0, 16.0]
    rates = [head_rate(heads, width) for width in widths]
    assert rates[:3] == pytest.approx([0.5, 0.6, 0.7])
    assert 0.7 < rates[3] < 0.8 and 0.2 < rates[4] < 0.3 and rates[5] == pytest.approx(rates[4] / 2)
    assert widths[4] == HEAD_DIMS[0]


def test_devices_without_a_table_borrow_and_say_so() -> None:
    own, lent = (attention_price(load_device(n), call(4, 32, 2048, 128)) for n in ("h100-sxm", "h800"))
    assert own is not None and lent is not None
    assert own.source == "interpolated" and lent.source == "extrapolated" and lent.error > own.error
    assert lent.seconds == pytest.approx(own.seconds, rel=0.1)
    assert attention_price(load_device("tpu-v4"), call(4, 32, 2048, 128)) is None


def test_many_prices_are_the_single_ones_and_shapes_of_another_form_have_none() -> None:
    shapes = [call(2, 8, 256 * i, 64, causal=bool(i % 2), backward=i == 3) for i in range(1, 6)]
    odd = dataclasses.replace(shapes[0], in_shapes=((4, 8),) * 3)
    many = attention_prices(H100, [*shapes, odd])
    assert many == [*(attention_price(H100, s) for s in shapes), None]
    assert price(H100, shapes[0]) == many[0]


class Model(torch.nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.mix = causal, torch.nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(x).view(2, 16, 4, 12).transpose(1, 2).split(4, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


@pytest.mark.parametrize("causal", [True, False])
def test_traced_attentions_know_their_mask(causal: bool) -> None:
    graph = trace(Model(causal), (torch.randn(2, 16, 16),))
    masks = {op.phase: shape_of(graph, op).causal for op in graph.ops if "attention" in op.name}
    assert masks == {"forward": causal, "backward": causal}
    assert not any(shape_of(graph, op).causal for op in graph.ops if "attention" not in op.name)


@pytest.mark.parametrize("rows, keys", [(128, 64), (64, 256), (64, 128), (64, 64)])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300, 1024, 1025])
def test_steps_under_a_causal_mask_are_those_of_a_count(rows: int, keys: int, tokens: int) -> None:
    (masked, longest), full = (steps_of(float(rows), float(keys), float(tokens), float(tokens), c) for c in (1, 0))
    tiles, along = -(-tokens // rows), -(-tokens // keys)
    # A tile walks to the end of its last row, by whole steps, but never past the keys.
    counted = sum(min(-(-(i + 1) * rows // keys), along) for i in range(tiles))
    assert longest == along and full == (tiles * along, along)
    assert counted <= masked <= counted + max(rows // keys - 1, 0)


def test_head_dims_have_their_own_steps_and_default_to_64_keys() -> None:
    plain = {"head_dims": [64, 128, 256], "rates": [0.5, 0.6, 0.7]}
    widths = (32.0, 64.0, 96.0, 128.0, 256.0, 512.0)
    own, usual = head_table({**plain, "tile_keys": [256, 128, 64]}), head_table(plain)
    assert [step_keys(own, width) for width in widths] == [256, 256, 128, 128, 64, 64]
    assert [step_keys(usual, width) for width in widths] == [64] * 6


def test_a_paged_kernel_computes_whole_steps_of_its_keys() -> None:
    """L40S's table is of a kernel that walks 256 keys at a time at head dim 64: fewer cost as much."""
    l40s = load_device("l40s")
    times = [seconds(l40s, call(8, 32, 64, 64, keys=keys)) for keys in (64, 256, 512)]
    assert times[0] == pytest.approx(times[1]) and times[2] > 1.1 * times[1]


@pytest.mark.parametrize("name", ["h100-sxm", "l40s"])  # packs heads; has tiles of its own
def test_compiled_and_plain_python_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = load_device(name)
    dims = [(2, 16, 8, 2048, 2048, 128), (1, 8, 1, 24, 24, 80), (3, 32, 32, 100, 700, 256), (64, 32, 8, 1, 8192, 32)]
    ways = [(causal, backward) for causal in (False, True) for backward in (False, True)]
    calls = calls_of([
        call(b, h, q, w, causal=c, kv_heads=kv, keys=k, backward=back) for b, h, kv, q, k, w in dims for c, back in ways
    ])  # fmt: skip
    laws = [law_of(device.kernels["attention"]["bfloat16"], device, "bfloat16", kernel)
            for kernel in get_args(Kernel)]  # fmt: skip
    compiled = [law.seconds(calls) for law in laws]
    for function, found in vars(attention_law).copy().items():
        monkeypatch.setattr(attention_law, function, getattr(found, "py_func", found))
    for law, seconds_compiled in zip(laws, compiled):
        assert (seconds_compiled > 0).all() and law.seconds(calls) == pytest.approx(seconds_compiled, rel=1e-12)
