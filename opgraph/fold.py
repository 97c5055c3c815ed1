"""Repeated blocks: found among a model's modules, and left out while it is traced.

A model with N identical blocks is traced with four of them (the first, two from the middle, the last);
`opgraph.unfold` puts the others back. What may differ between blocks is only a number that counts them (a layer
index); that a block behaves otherwise because of its index is seen where it changes ops, shapes or arguments of the
two from the middle, and cannot be seen elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

LEAST = 6  # fewer blocks than this are not worth folding
KEPT = 4

# Attributes of nn.Module that are compared one by one below, or that say nothing about what it computes; the flat ones
# are a recurrent layer's parameters once more.
OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook", "_flat_weights",
       "_flat_weight_refs"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fold:
    """`count` identical blocks in one list: their paths are `{container}.{start}` to `{container}.{start+count-1}`."""

    container: str
    start: int
    count: int

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(f"{self.container}.{self.start + i}" for i in range(self.count))

    def place(self, path: str) -> tuple[int, str] | None:
        """Index in the container and the path below, of a path into the container."""
        head = f"{self.container}."
        if not path.startswith(head):
            return None
        index, _, rest = path[len(head) :].partition(".")
        return (int(index), rest) if index.isdigit() else None


def find_fold(module: nn.Module, blocks: Sequence[str]) -> Fold | None:
    """The longest run of identical blocks in one list of the module, or None where it is shorter than LEAST."""
    best: Fold | None = None
    runs: dict[str, list[int]] = {}
    for path in blocks:
        container, _, number = path.rpartition(".")
        if container and number.isdigit():
            runs.setdefault(container, []).append(int(number))
    uses = _uses(module)
    for container, indices in runs.items():
        children = _children(module, container)
        if max(indices) >= len(children):
            continue
        start = indices[0]
        for previous, index in zip([*indices, -1], [*indices[1:], -1]):
            ends = index != previous + 1 or not _alike(children[start], children[index], index - start, uses)
            if ends:
                if previous - start + 1 >= max(LEAST, best.count + 1 if best else 0):
                    best = Fold(container, start, previous - start + 1)
                start = index
    return best


def _children(module: nn.Module, container: str) -> list[nn.Module]:
    """The children of a ModuleList or Sequential whose names count from 0; else nothing."""
    from torch import nn

    try:
        found = module.get_submodule(container)
    except AttributeError:
        return []
    names = list(found._modules)
    if not isinstance(found, nn.ModuleList | nn.Sequential) or names != [str(i) for i in range(len(names))]:
        return []
    return list(found.children())


def _uses(module: nn.Module) -> Counter[int]:
    """How often every module, parameter and buffer hangs in the tree."""
    uses: Counter[int] = Counter()
    for _, m in module.named_modules(remove_duplicate=False):
        uses.update(id(t) for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        uses[id(m)] += 1
    return uses


def _alike(a: nn.Module, b: nn.Module, distance: int, uses: Counter[int]) -> bool:
    """Whether two blocks, `distance` apart, have the same structure and share nothing with anyone."""
    ours, theirs = list(a.named_modules()), list(b.named_modules())
    return len(ours) == len(theirs) and all(
        m == n and type(x) is type(y) and uses[id(x)] == 1 and uses[id(y)] == 1 and _same_module(x, y, distance, uses)
        for (m, x), (n, y) in zip(ours, theirs)
    )


def _same_module(x: nn.Module, y: nn.Module, distance: int, uses: Counter[int]) -> bool:
    for ours, theirs in ((x._parameters, y._parameters), (x._buffers, y._buffers)):
        if list(ours) != list(theirs) or not all(_same_tensor(ours[k], theirs[k], uses) for k in ours):
            return False
    mine, other = vars(x), vars(y)
    if mine.keys() != other.keys() or x.extra_repr() != y.extra_repr():
        return False
    return all(_same_value(k, mine[k], other[k], distance) for k in mine if k not in OWN)


def _same_tensor(a: Any, b: Any, uses: Counter[int]) -> bool:
    if a is None or b is None:
        return a is b
    facts = [(type(t), t.shape, t.stride(), t.dtype, t.requires_grad) for t in (a, b)]
    return facts[0] == facts[1] and uses[id(a)] == 1 and uses[id(b)] == 1


def _same_value(name: str, a: Any, b: Any, distance: int) -> bool:
    """Equal attributes; an int may count the blocks. Hooks never compare equal: each has state of its own."""
    if "_hooks" in name:
        return not a and not b
    if a is b:
        return True
    if type(a) is int and type(b) is int:
        return b - a in (0, distance)
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # whatever cannot be compared (tensors, arrays) is not alike
        return False


@contextmanager
def shortened(module: nn.Module, fold: Fold) -> Iterator[None]:
    """Leaves KEPT blocks in the list: the first, two from the middle, the last."""
    found = module.get_submodule(fold.container)
    whole = dict(found._modules)
    children = list(whole.values())
    first, end = fold.start, fold.start + fold.count
    kept = [*children[: first + 2], *children[end - 2 :]]
    try:
        found._modules.clear()
        found._modules.update({str(i): child for i, child in enumerate(kept)})
        yield
    finally:
        found._modules.clear()
        found._modules.update(whole)
