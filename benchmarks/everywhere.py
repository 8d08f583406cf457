"""What `find` names, against brute force: every norm scale and bias, row and column of a model.

    python benchmarks/everywhere.py MODEL --text FILE [--window 128] [--windows 16] [--part 0.1]

Every one is zeroed alone, and its damage measured on all windows. Of those that cost at least
`--least` nats it is counted how many the search names: as a part of a vital set, or measured and
said to be none. `--part` takes a random part of the places, for a model too large for all of them.
Places that are one thing (a tied weight, the column of a neuron and its rows, the column that reads
a scale) count as named if one of their names is. Beside it stands what the first order alone would
have named, and what every vital set of one region costs by brute force.
"""

from __future__ import annotations

import argparse
import random

import surgeon
from surgeon.anatomy import Anatomy, Region
from surgeon.corpus import Corpus
from surgeon.find import FindResult
from surgeon.find.damage import DamageInMemory, Variant
from surgeon.find.elsewhere import estimated
from surgeon.progress import silent
from surgeon.studies.lab import TextSettings


def places(anatomy: Anatomy) -> list[Region]:
    every: list[Region] = []
    for site in anatomy.addresses:
        n_out, n_in = anatomy.view(site).shape
        if n_in == 1:
            every += [Region(site, row, 0) for row in range(n_out)]
        else:
            every += [Region(site, row, None) for row in range(n_out)]
            every += [Region(site, None, col) for col in range(n_in)]
    return [one for one in every if not is_token(one)]


def is_token(part: Region) -> bool:
    """A line of one token, which `find` measures but calls no set."""
    return (part.site.role, part.geometry) in (("embed", "column"), ("unembed", "row"))


def truth(
    anatomy: Anatomy, corpus: Corpus, part: float, least: float
) -> tuple[dict[str, float], int]:
    """The damage of every place that costs so much, and how many were zeroed."""
    every = places(anatomy)
    random.Random(0).shuffle(every)
    every = every[: round(part * len(every))]
    damage = DamageInMemory(anatomy, corpus.windows)
    # the dear ones of a sample, measured on everything: a sample may show half of it
    few = damage.of([Variant([one]) for one in every], sample=damage.few(256))
    likely = [one for one, nats in zip(every, few, strict=True) if float(nats.mean()) > least / 3]
    nats = [float(damage([one]).mean()) for one in likely]
    dear = {str(one): n for one, n in zip(likely, nats, strict=True) if n >= least}
    return dear, len(every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--part", type=float, default=1.0)
    parser.add_argument("--least", type=float, default=0.1)
    asked = parser.parse_args()
    reading = {"text": asked.text, "window": asked.window}
    lab = surgeon.open(asked.model)
    found: FindResult = lab.find(windows=2 * asked.windows, **reading)
    corpus = lab.corpus(TextSettings(windows=asked.windows, **reading))
    dear, many = truth(lab.anatomy, corpus, asked.part, asked.least)

    damage = DamageInMemory(lab.anatomy, corpus.windows)
    ordered = estimated(lab.anatomy, corpus.windows[:8], silent)
    by_first = sorted(ordered, key=lambda one: -abs(one.first))
    in_sets = {str(part) for one in found.sets for part in one.parts}
    said = in_sets | {str(one.part) for one in found.measured}
    few = len(found.measured)
    named = {
        "find": said | {other for name in said for other in alike(lab.anatomy, name)},
        "first order alone": {str(one.part) for one in by_first[:few]},
    }
    print(f"{asked.model}: {many} places zeroed, {len(dear)} cost at least {asked.least:g} nats")
    for way, names in named.items():
        hits = [name for name in dear if names & {name, *alike(lab.anatomy, name)}]
        missed = sorted((n for n in dear if n not in hits), key=lambda n: -dear[n])
        shown = ", ".join(f"{name} {dear[name]:.2f}" for name in missed[:6])
        print(f"  {way:18} names {len(hits)} of {len(dear)}; missed: {shown or 'none'}")
    for one in found.sets:
        if len(one.parts) == 1:
            nats = float(damage(one.parts).mean())
            print(f"  vital: {one.parts[0]} {one.damage.joint_nats:+.3f}, here {nats:+.3f}")


def alike(anatomy: Anatomy, name: str) -> set[str]:
    """Other names of the same thing."""
    if name.count("[") != 1:
        return set()
    part = Region.parse(name)
    site, row, col = part.site, part.row, part.col
    layer = "" if site.layer is None else f"L{site.layer}."
    names: set[str] = set()
    if site.role == "mlp.down" and row is None:
        names |= {f"{layer}mlp.up[{col}, :]", f"{layer}mlp.gate[{col}, :]"}
    if site.role in ("mlp.up", "mlp.gate") and col is None:
        names |= {f"{layer}mlp.{other}[{row}, :]" for other in ("up", "gate")}
        names.add(f"{layer}mlp.down[:, {row}]")
    if site.role == "embed" and col is None:
        names.add(f"unembed[:, {row}]")
    if site.role == "unembed" and row is None:
        names |= {f"embed[{col}, :]", f"final_norm[{col}, 0]"}
    if site.role == "final_norm":
        names.add(f"unembed[:, {row}]")
    if site.role.startswith(("attn", "mlp")) and row is None:
        norms = (s for s in anatomy.addresses if s.layer == site.layer and "norm" in s.role)
        names |= {f"{norm}[{col}, 0]" for norm in norms}
    return names


if __name__ == "__main__":
    main()
