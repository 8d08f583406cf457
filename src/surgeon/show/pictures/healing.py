"""Sections on the repair: base, broken and repaired on one axis with the control, the training, a
recipe's published figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .charts import Row, dumbbells, lines
from .critical import generations
from .folder import Result
from .picture import Picture, Table, command, many, nats, percent


def repair_pictures(result: Result) -> Iterator[Picture]:
    d = result.data
    if "injury" in d:
        made_by = command(
            "repair",
            result.model,
            "--injury",
            d["injury"],
            "-o",
            d["patch"],
            "--method",
            d["method"],
            corpus=d["corpus"],
        )
    else:
        made_by = command("run", "RECIPE", "-o", "DIR")
    yield _recovery(d, result.file, made_by)
    if d.get("curve"):
        yield _training(d, result.file, made_by)


def _recovery(d: dict[str, Any], file: str, made_by: str) -> Picture:
    """One axis for all measures, the share of the damage undone; the values themselves stand at the
    dots.
    """
    kl = {"base": 0.0, **d["kl"]}
    measures: list[tuple[str, dict[str, float], str]] = [
        ("NLL", d["nll"], "{:.3f}"),
        ("perplexity", d["ppl"], "{:.2f}"),
        ("KL to intact", kl, "{:.3f}"),
    ]
    second = d["held_out"]
    if second["second_text"]:
        measures.append(("NLL, second text", second["nll"], "{:.3f}"))
    control = d.get("control")
    if control and control.get("recovered") is not None:
        measures.append(("NLL, random row", {**d["nll"], "patched": control["nll"]}, "{:.3f}"))
    rows: list[Row] = []
    table = []
    for name, values, how in measures:
        damage = values["broken"] - values["base"]
        share = None if damage <= 0 else 1 - (values["patched"] - values["base"]) / damage
        table.append(
            (
                name,
                values["base"],
                values["broken"],
                values["patched"],
                None if share is None else f"{share:.4f}",
            )
        )
        if share is None:
            continue
        at = {"broken": 0.0, "intact": 1.0, "repaired": share}  # the repaired one last, on top
        say = {"broken": values["broken"], "intact": values["base"], "repaired": values["patched"]}
        place = {"broken": "low" if share >= 0 else "mid", "intact": "high", "repaired": "mid"}
        rows += [
            {"row": name, "x": x, "series": s, "says": how.format(say[s]), "place": place[s]}
            for s, x in at.items()
        ]
    judged = d["corpus"].get("judged_on")
    return Picture(
        "Before, broken, repaired",
        _headline(d),
        "0% = as broken, 100% = as intact; the numbers at the dots are the measured values (NLL"
        f" and KL in nats per token). Judged on {many(judged, 'window') if judged else 'windows'}"
        " that the repair never saw. The control spends the same effort on a random other row of"
        f" the same matrix. The change has a cosine of {d['cosine_to_row']:+.2f} to the intact row:"
        " near 1 it puts back what was taken out, near 0 it is another way to the same end.",
        file,
        made_by,
        chart=dumbbells(
            rows,
            {"broken": "broken", "repaired": "patched", "intact": "base"},
            "share of the damage undone",
            percent=True,
        ),
        table=Table(("measure", "intact", "broken", "repaired", "share undone"), table),
    )


def _headline(d: dict[str, Any]) -> str:
    size = (
        f"A patch of {d['patch_bytes'] / 1000:.1f} kB undoes {percent(d['recovered'])} of the"
        " damage"
    )
    control = d.get("control")
    if not control:
        return f"{size}; no control was run, so how much any row would have undone is not known"
    if control["recovered"] is None:
        return f"{size}; there was no other row for a control"
    return f"{size}; the same on a random row: {percent(control['recovered'])}"


def _training(d: dict[str, Any], file: str, made_by: str) -> Picture:
    curve = d["curve"]
    shares = all(point[3] is not None for point in curve)
    name = "repair, on the windows that choose the step"
    rows = [
        {"x": step, "y": share if shares else loss, "series": name}
        for step, loss, _, share in curve
    ]
    control = (d.get("control") or {}).get("recovered")
    kept = d["kept_step"]
    at_kept = next((p for p in curve if p[0] == kept), curve[-1])
    reached = f"recovers {percent(at_kept[3])}" if shares else f"has a loss of {at_kept[1]:.4f}"
    start = f"from {percent(curve[0][3])}" if shares else f"from {curve[0][1]:.4f}"
    return Picture(
        "Training",
        f"Of {many(d['steps'], 'step')}, step {kept:,} is kept: it {reached}, {start} at the start",
        (
            "Recovered share of the damage on windows that only choose which step to keep; the"
            " final figure above is on others. The dashed line is the control's final share."
            if shares
            else "Loss on the windows that choose which step to keep."
        ),
        file,
        made_by,
        chart=lines(
            rows,
            {name: "patched"},
            "training step",
            "recovered share of the damage" if shares else "loss",
            control if shares else None,
            "a random row, in the end",
            percent=shares,
        ),
        table=Table(
            ("step", "loss", "NLL, nats per token", "recovered share"),
            [(int(p[0]), *p[1:]) for p in curve],
        ),
    )


def recipe_pictures(result: Result) -> Iterator[Picture]:
    figures = result.data["figures"]
    if not figures:
        return
    far = max(
        figures, key=lambda f: abs(f["measured"] - f["published"]) / max(abs(f["published"]), 1e-12)
    )
    yield Picture(
        "Published and measured",
        f"{many(len(figures), 'figure')} beside the published; farthest apart is {far['figure']}:"
        f" {far['published']:g} published, {far['measured']:.4g} here",
        "NLL and KL in nats per token; norms in units of the weights.",
        result.file,
        command("run", "RECIPE", "-o", "DIR"),
        shown=Table(
            ("figure", "published", "measured"),
            [(f["figure"], f["published"], f["measured"]) for f in figures],
        ),
    )


def measure_pictures(result: Result) -> Iterator[Picture]:
    d = result.data
    with_patches = [word for p in d.get("patches", ()) for word in ("--patch", str(p))]
    made_by = command("measure", result.model, *with_patches, corpus=d["corpus"])
    far = d["kl_from_base"]
    headline = f"NLL {d['nll']:.3f} nats per token, perplexity {d['ppl']:.2f}"
    yield Picture(
        "Measured",
        headline if far is None else f"{headline}, {nats(far)} nats of KL from the unpatched model",
        f"On {d['corpus']['name']}, {many(d['tokens'], 'token')},"
        f" {'with' if d['corpus']['bos'] else 'without'} BOS.",
        result.file,
        made_by,
        shown=Table(
            ("measure", "value"),
            [
                ("NLL, nats per token", d["nll"]),
                ("perplexity", d["ppl"]),
                ("KL from the unpatched model, nats", far),
                ("most likely token agrees, share", d["top1_agreement"]),
                ("share of repeated 3-grams in what it writes", d["loop_rate"]),
            ],
        ),
    )
    if d["generations"]:
        states = ("base", "patched") if with_patches else ("base",)
        yield generations(
            [(g["prompt"], [(s, g[s]) for s in states]) for g in d["generations"]],
            result.file,
            made_by,
        )
