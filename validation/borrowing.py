"""What borrowing costs: held-out rows of a measured device, priced with its nearest other measured device's law."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from costmodels.device import load_device
from costmodels.relatives import distance
from validation.fit_common import Array, Fitted


def borrowed_errors(fits: Sequence[Fitted]) -> pd.DataFrame:
    """One row per section that has a possible lender: mean error with its own constants and with the lender's."""
    rows = []
    for fit in fits:
        others = [f for f in fits if f.law == fit.law and f.dtype == fit.dtype and f.device != fit.device]
        if not others:
            continue
        device = load_device(fit.device)
        lender = min(others, key=lambda f: distance(device, load_device(f.device)))
        errors: Array = fit.again(lender.constants) / fit.measured - 1
        rows.append({
            "law": fit.law, "device": fit.device, "lender": lender.device, "own": float(np.abs(fit.errors).mean()),
            "borrowed": float(np.abs(errors).mean()),
        })  # fmt: skip
    return pd.DataFrame(rows)
