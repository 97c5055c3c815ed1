"""Products with a sparse matrix: N:M on tensor cores, unstructured (SpMM) by density, blocks. Device seconds.

A dense product of the same dims is priced by the device's own law; the sparse kernel is that product with fewer FLOP at
a lower share of the rate, and with the bytes of the values and their indices at the bandwidth that the dense one
reaches. 2:4 gains where units for it exist (`has_two_of_four`), nowhere else. All shares are ASSUMPTIONS over published
speed-ups (shared/facts/compute.md B5), none is fitted; prices say "roofline" with `ERROR`.
"""

from __future__ import annotations

from dataclasses import dataclass

from costmodels.device import Device
from costmodels.price import Price
from costmodels.relatives import vendor

ERROR = 0.35  # expected relative error: published speed-ups of one kind differ by this much between shapes

# 2:4 on tensor cores: twice the rate in the data sheet, 1.5 to 1.8 times a dense product on large shapes (B5). Small
# products gain nothing: the launch, and the compressed operand's layout, cost what they cost.
N_M_SPEEDUP = 1.65
N_M_INDEX_BITS = 2  # of each value that is kept, for its place among four
# Formats of sparse units: NVIDIA's from Ampere on (A100 white paper: tf32, 16-bit floats, 8-bit integers; float8 from
# Ada and Hopper on) and AMD's from CDNA3 on (MI300 data sheet; both from memory).
N_M_DTYPES = ("tf32", "float16", "bfloat16", "int8")
# Unstructured: tuned kernels (Sputnik) beat dense fp32 products from 70 to 80 % zeros on, and products on tensor cores
# from 95 % on (B5, from memory): at 75 % zeros they run at a quarter of the dense rate, which is that of fp32 units.
UNSTRUCTURED_SHARE = 0.25
INDEX_BYTES = 4
# Blocks of 16 or more keep their rate inside a block; loads of blocks are less regular. 95 % zeros gave up to 16.7
# times on the MLP alone (B5): 1 / (0.05 x 16.7) is 1.2 times the time of the FLOP that are left.
BLOCK_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Sparse:
    """A sparse m x k matrix times a dense k x n one. density: share of values that are kept. block: edge of square
    blocks (1: single values). pattern: (N, M) where N of each M values are kept, none where they lie anywhere."""

    m: int
    n: int
    k: int
    density: float
    dtype: str = "bfloat16"
    block: int = 1
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}; it must be more than 0 and at most 1")
        if self.pattern and self.pattern[0] / self.pattern[1] != self.density:
            raise ValueError(f"a {self.pattern[0]}:{self.pattern[1]} pattern has density "
                             f"{self.pattern[0] / self.pattern[1]:g}, not {self.density:g}; give that one")  # fmt: skip


def sparse_price(device: Device, product: Sparse) -> Price:
    """The price of a sparse product: never slower than the dense one, which a program can always run instead."""
    dense, note = dense_seconds(device, product), ""
    if product.pattern and not runs_as_two_of_four(device, product):
        n, m = product.pattern
        note = f"{n}:{m} in {product.dtype} has no units on {device.name}: priced as the dense product"
    return Price(min(dense, sparse_seconds(device, product)), "roofline", ERROR, note)


def has_two_of_four(device: Device, dtype: str) -> bool:
    """Whether a device computes 2:4 sparse products of a dtype in units of their own: NVIDIA's GPUs that list bfloat16
    (Ampere and later; Volta, Turing and older have none), AMD's that list float8 (CDNA3 and later)."""
    marks = {"NVIDIA": "bfloat16", "AMD": "float8_e4m3fn"}
    mark = marks.get(vendor(device)) if device.kind == "gpu" else None
    if mark is None or mark not in device.peak_flops:
        return False
    return dtype in N_M_DTYPES or (dtype.startswith("float8") and "float8_e4m3fn" in device.peak_flops)


def runs_as_two_of_four(device: Device, p: Sparse) -> bool:
    """Whether a pattern leaves at most two values in every aligned four, and the device has units for that."""
    if p.pattern is None or not has_two_of_four(device, p.dtype):
        return False
    n, m = p.pattern
    return n <= 2 if m % 4 == 0 else 4 % m == 0 and n * (4 // m) <= 2


def dense_seconds(device: Device, p: Sparse) -> float:
    """The product as if nothing were zero."""
    from costmodels.ops import OpShape, price
    from opgraph.graph import DTYPE_BYTES

    size = DTYPE_BYTES[p.dtype]
    shape = OpShape(
        "aten.mm.default", "forward", ((p.m, p.k), (p.k, p.n)), ((p.m, p.n),), p.dtype, 2 * p.m * p.n * p.k,
        size * (p.m * p.k + p.k * p.n), size * p.m * p.n,
    )  # fmt: skip
    return price(device, shape).seconds


def sparse_seconds(device: Device, p: Sparse) -> float:
    """The sparse kernel: the larger of its compute and its bytes, plus a launch."""
    from costmodels.ops import peak_of
    from costmodels.rowwise import LAUNCH
    from opgraph.graph import DTYPE_BYTES

    size, kept = DTYPE_BYTES[p.dtype], p.density * p.m * p.k
    dense = dense_seconds(device, p)
    if p.pattern:
        # The gain is that of half the values; a sparser pattern than 2:4 runs as 2:4 does.
        compute = dense / N_M_SPEEDUP if runs_as_two_of_four(device, p) else dense
        index = N_M_INDEX_BITS / 8
    elif p.block >= 16:
        compute, index = dense * p.density / BLOCK_SHARE, INDEX_BYTES / p.block**2
    else:
        rate = peak_of(device, "float32") if p.dtype != "float64" else peak_of(device, p.dtype)
        compute, index = 2.0 * kept * p.n / (rate * UNSTRUCTURED_SHARE), float(INDEX_BYTES)
    whole = float(size * (p.m * p.k + p.k * p.n + p.m * p.n))
    moved = kept * (size + index) + size * (p.k * p.n + p.m * p.n)
    # Where the roofline says that bytes bound the dense product, its time is theirs; else the smaller share that the
    # roofline gives them.
    reading, computing = whole / device.memory_bandwidth, 2.0 * p.m * p.n * p.k / peak_of(device, p.dtype)
    bytes_of_dense = max(reading, (dense - LAUNCH) * min(1.0, reading / computing))
    return LAUNCH + max(compute, bytes_of_dense * moved / whole)


def crossover(device: Device, m: int, n: int, k: int, dtype: str = "bfloat16") -> float:
    """The density below which an unstructured kernel beats the dense product; 0 where none does."""
    low, high = 0.0, 1.0
    dense = dense_seconds(device, Sparse(m, n, k, 1.0, dtype))
    for _ in range(30):
        middle = (low + high) / 2
        faster = sparse_seconds(device, Sparse(m, n, k, middle, dtype)) < dense
        low, high = (middle, high) if faster else (low, middle)
    return low
