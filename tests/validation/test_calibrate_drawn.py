"""Further calibration models: the same ones every time, of every family, and measured at the pace of the first."""

import time
from pathlib import Path

import pytest
import torch

from costmodels.families import FREE, family
from parplan.cli_calibrate import BUDGET
from validation.calibrate import USUAL_BUDGET, _at_pace_of, run_ranks
from validation.calibrate_drawn import FAMILIES, SMALL_FAMILIES, TABLE, drawn, drawn_small
from validation.calibrate_models import SOURCES
from validation.calibrate_record import Sample, part_of, prepare


def kind(number: int) -> str:
    return drawn(number).name.partition("-")[2]


def test_every_family_is_drawn_within_two_groups_and_some_of_them_in_half() -> None:
    first = [drawn(n) for n in range(120)]
    assert {s.name.partition("-")[2] for s in first} == {name for name, _ in FAMILIES}
    assert 1 <= sum(s.bf16 for s in first) <= 20
    assert not {s.name for s in first} & {s.name for s in SOURCES}


@pytest.mark.parametrize("name", sorted({name for name, _ in FAMILIES}))
def test_a_drawn_model_is_the_same_every_time_and_trains(name: str) -> None:
    torch.manual_seed(0)
    number = next(n for n in range(210) if kind(n) == name)
    once, again = (prepare(drawn(number)) for _ in range(2))
    assert once.shapes == again.shapes and len(once.shapes) > 20
    assert {s.phase for s in once.shapes} == {"forward", "backward", "optimizer"}
    weights = [s.in_shapes[0] for s in once.shapes if family(s.name) == "embedding" and s.in_shapes]
    assert all(rows * width <= 2 * TABLE for rows, width in (w for w in weights if len(w) == 2))


@pytest.mark.parametrize("number", range(24))
def test_a_small_model_leaves_the_caches_full(number: int) -> None:
    torch.manual_seed(0)
    source = drawn_small(number)
    assert source.name.partition("-")[2] in {name for name, _ in SMALL_FAMILIES}
    once, again = (prepare(drawn_small(number)) for _ in range(2))
    assert once.shapes == again.shapes
    assert once.phases == ("forward", "backward") * source.micro + ("optimizer",)
    priced = [s for s in once.shapes if family(s.name) not in FREE]
    assert sum(s.swept == 0 for s in priced) > 0.8 * len(priced)


@pytest.mark.executed
def test_a_group_is_measured_and_brought_to_the_first_pace(tmp_path: Path) -> None:
    numbers = next(n for n in range(210) if kind(n) == "digits" and kind(n + 1) in ("mlp", "depthwise", "digits"))
    job = {
        "ranks": 2, "store": str(tmp_path / "store"), "anchor": 4, "kinds": [], "models": [], "timeout": 120,
        "drawn": [numbers, numbers + 2], "small": [5, 6], "least_rounds": 2, "until": time.time(),
    }  # fmt: skip
    results = run_ranks(job, tmp_path, lambda what, fraction: None)
    assert len(results) == 2 and all(len(r["samples"]) > 20 and not r["unrepeatable"] for r in results)
    times = {"products": 2, "convolutions": 8, "passes": 3, "calls": 5}
    slower = [{"parts": {part: times[part] * seconds for part, seconds in r["parts"].items()}} for r in results]
    found = _at_pace_of(slower, results)
    samples: list[Sample] = [s for r in results for s in r["samples"]]
    assert [s.shape for s in found] == [s.shape for s in samples]
    expected = times | {"convolutions": 4}  # between products and the anchor's convolutions
    factors = [expected[part_of(s.shape)] for s in samples]
    assert len(set(factors)) > 1
    assert [s.seconds for s in found] == pytest.approx([k * s.seconds for k, s in zip(factors, samples)])


def test_the_command_line_names_the_usual_budget() -> None:
    """Which it does not import: that would take as long as torch does."""
    assert BUDGET == USUAL_BUDGET
