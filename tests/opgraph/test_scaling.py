"""Loss scaling: what torch's GradScaler does to gradients and scale."""

import torch

from opgraph.scaling import FIRST_SCALE, GROWTH_STEPS, next_scale, scaled, unscale


def test_the_loss_is_scaled_in_float32():
    """3 times 65,536 is more than float16 holds."""
    assert scaled(torch.tensor(3.0, dtype=torch.float16), FIRST_SCALE).item() == 3 * FIRST_SCALE


def test_gradients_are_divided_in_place_and_overflow_is_found():
    good, bad = [torch.full((3,), 4.0), torch.ones(2, 2)], [torch.tensor([1.0, float("inf")])]
    assert unscale(good, 4.0).item() == 0 and good[0].tolist() == [1.0] * 3 and good[1][0, 0].item() == 0.25
    assert unscale([*good, *bad], 4.0).item() == 1
    assert unscale([], 4.0) is None


def test_the_scale_moves_as_that_of_torch():
    theirs = torch.amp.GradScaler("cpu", growth_interval=GROWTH_STEPS)
    theirs.scale(torch.ones(1))
    scale, steps = FIRST_SCALE, 0
    overflows = [False, True, *[False] * (GROWTH_STEPS - 1), True, *[False] * (GROWTH_STEPS + 1)]
    for overflowed in overflows:
        torch._amp_update_scale_(
            theirs._scale, theirs._growth_tracker, torch.tensor(float(overflowed)), 2.0, 0.5, GROWTH_STEPS
        )
        scale, steps = next_scale(scale, steps, overflowed)
        assert (scale, steps) == (theirs._scale.item(), theirs._growth_tracker.item())
    assert scale == FIRST_SCALE / 2
