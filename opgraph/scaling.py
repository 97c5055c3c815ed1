"""Loss scaling of steps in float16, by the ops of `torch.amp.GradScaler`: tracing and execution run the same code.

Gradients below 6e-8 vanish in float16, so the loss is multiplied before backward, and one pass over all gradients
divides them and looks for values that are not finite (`_amp_foreach_non_finite_check_and_unscale_`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

FIRST_SCALE = 2.0**16  # GradScaler's defaults
BACKOFF, GROWTH, GROWTH_STEPS = 0.5, 2.0, 2000


def scaled(loss: torch.Tensor, scale: float) -> torch.Tensor:
    """The loss that goes backward; in float32, as float16 ends at 65,504."""
    return loss.float() * scale


def unscale(gradients: Iterable[torch.Tensor], scale: float) -> torch.Tensor | None:
    """Divides the gradients in place. 1 in one element where any is not finite, else 0; None without gradients."""
    held = list(gradients)
    if not held:
        return None
    found = torch.zeros((), device=held[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(held, found, torch.full((), 1 / scale, device=held[0].device))
    return found


def next_scale(scale: float, steps: int, overflowed: bool) -> tuple[float, int]:
    """The scale of the next step, and how many steps in a row it has held.

    >>> next_scale(65536.0, 7, True), next_scale(65536.0, 1999, False)
    ((32768.0, 0), (131072.0, 0))
    """
    if overflowed:
        return scale * BACKOFF, 0
    return (scale * GROWTH, 0) if steps + 1 == GROWTH_STEPS else (scale, steps + 1)
