"""Sections on a repair: the three states on one axis with the control, and the training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...measure import ThreeStates
from ...repair import RepairResult
from .charts import Row, dumbbells, lines
from .picture import Cell, Claim, Headline, Picture, Table, many, model_name, percent


def repair_headline(result: RepairResult) -> Headline:
    control = None if result.control is None else result.control.recovered
    beside = "no control was run"
    if control is not None:
        beside = f"the same on a random row: {percent(control)}"
    claim = Claim(
        "patched",
        percent(result.recovered),
        f"of the damage undone by a patch of {_kilobytes(result)}",
        beside,
    )
    model = model_name(result.provenance.model)
    return Headline(f"{model} was broken and repaired", [claim])


def repair_pictures(result: RepairResult) -> Iterator[Picture]:
    """How much came back, and how the training went."""
    yield _recovery(result)
    if result.curve:
        yield _training(result)


class _Measure(NamedTuple):
    """One line of the picture: its name, its values, and how many digits they are written with."""

    name: str
    values: ThreeStates
    digits: int


def _measures(result: RepairResult) -> list[_Measure]:
    nll, kl, second, control = result.nll, result.kl, result.held_out, result.control
    measures = [
        _Measure("NLL", nll, 3),
        _Measure("perplexity", result.ppl, 2),
        _Measure("KL to intact", ThreeStates(0.0, kl.broken, kl.patched), 3),
    ]
    if second.second_text:
        measures.append(_Measure("NLL, second text", second.nll, 3))
    if control is not None and control.nll is not None:
        there = ThreeStates(nll.base, nll.broken, control.nll)
        measures.append(_Measure("NLL, random row", there, 3))
    return measures


def _recovery(result: RepairResult) -> Picture:
    """One axis for all measures, the share of the damage undone; the values themselves stand at the
    dots.
    """
    measures = _measures(result)
    return Picture(
        "Before, broken, repaired",
        _recovered(result),
        "0% = as broken, 100% = as intact; the numbers at the dots are the measured values (NLL"
        f" and KL in nats per token). Judged on {many(result.windows.judged_on, 'window')} that the"
        " repair never saw. The control spends the same effort on a random other row of the same"
        f" matrix. The change has a cosine of {result.cosine_to_row:+.2f} to the intact row: near 1"
        " it puts back what was taken out, near 0 it is another way to the same end.",
        chart=dumbbells(
            [dot for measure in measures for dot in _dots(measure)],
            {"broken": "broken", "repaired": "patched", "intact": "base"},
            "share of the damage undone",
            percent=True,
        ),
        table=Table(
            ("measure", "intact", "broken", "repaired", "share undone"),
            [_cells(measure) for measure in measures],
        ),
    )


def _dots(measure: _Measure) -> list[Row]:
    """The three states of one measure; none where the injury did no damage by it."""
    share = measure.values.recovered
    if share is None:
        return []
    values = measure.values
    return [
        {
            "row": measure.name,
            "x": x,
            "series": series,
            "says": f"{value:.{measure.digits}f}",
            "place": place,
        }
        for series, x, value, place in (
            ("broken", 0.0, values.broken, "low" if share >= 0 else "mid"),
            ("intact", 1.0, values.base, "high"),
            ("repaired", share, values.patched, "mid"),  # last, so that it lies on top
        )
    ]


def _cells(measure: _Measure) -> tuple[Cell, ...]:
    values, share = measure.values, measure.values.recovered
    undone = None if share is None else f"{share:.4f}"
    return measure.name, values.base, values.broken, values.patched, undone


def _recovered(result: RepairResult) -> str:
    size = f"A patch of {_kilobytes(result)} undoes {percent(result.recovered)} of the damage"
    if result.control is None:
        return f"{size}; no control was run, so how much any row would have undone is not known"
    if result.control.recovered is None:
        return f"{size}; there was no other row for a control"
    return f"{size}; the same on a random row: {percent(result.control.recovered)}"


def _kilobytes(result: RepairResult) -> str:
    return f"{result.patch_bytes / 1000:.1f} kB"


def _training(result: RepairResult) -> Picture:
    """The share recovered by step, or the loss where some look had no damage to recover."""
    shares = [look.recovered for look in result.curve if look.recovered is not None]
    known = len(shares) == len(result.curve)
    heights = shares if known else [look.loss for look in result.curve]
    steps = [look.step for look in result.curve]
    kept = steps.index(result.kept_step) if result.kept_step in steps else -1
    name = "repair, on the windows that choose the step"
    if known:
        reached = f"recovers {percent(heights[kept])}, from {percent(heights[0])}"
    else:
        reached = f"has a loss of {heights[kept]:.4f}, from {heights[0]:.4f}"
    return Picture(
        "Training",
        f"Of {many(result.steps, 'step')}, step {result.kept_step:,} is kept: it {reached} at the"
        " start",
        (
            "Recovered share of the damage on windows that only choose which step to keep; the"
            " final figure above is on others. The dashed line is the control's final share."
            if known
            else "Loss on the windows that choose which step to keep."
        ),
        chart=lines(
            [{"x": x, "y": y, "series": name} for x, y in zip(steps, heights, strict=True)],
            {name: "patched"},
            "training step",
            "recovered share of the damage" if known else "loss",
            result.control.recovered if known and result.control is not None else None,
            "a random row, in the end",
            percent=known,
        ),
        table=Table(
            ("step", "loss", "NLL, nats per token", "recovered share"),
            [(look.step, look.loss, look.nll, look.recovered) for look in result.curve],
        ),
    )
