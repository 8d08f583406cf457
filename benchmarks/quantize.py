"""NLL of a model at 8, 4 and 3 bits, all kinds of blocks, the four methods and the installed peers,
as Markdown tables.

    python benchmarks/quantize.py [MODEL[=TEXT] ...]      # default: patient

The first 8 windows of the text are for calibration (weighted searches, GPTQ); 24 others are judged
on. The critical entries are found.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from models import heading, line, models_asked_for
from peers import GPTQ, PEERS, all_peers, missing_peers

from surgeon.measure import Reference, mean_nll
from surgeon.quantize import (
    METHODS,
    Block,
    Grid,
    QuantizeConfig,
    input_mean_squares,
    quantized_sites,
    sweep,
    table,
)
from surgeon.quantize.quantize import swapped

BITS = (8, 4, 3)
BLOCKS = (
    "tensor",
    "flat:16384",
    "flat:4096",
    "square:128",
    "square:32",
    "channel",
    "group:128",
    "group:32",
)
CALIBRATION, JUDGED = 8, 24
CLIPS = {
    "z": {"clip": "z"},
    "z per block": {"clip": "z", "clip_per": "block"},
    "z weighted": {"clip": "z", "weighted": True},
    "percentile": {"clip": "percentile"},
    "mse": {"clip": "mse"},
    "mse weighted": {"clip": "mse", "weighted": True},
}


def main() -> None:
    for model in models_asked_for(__doc__, CALIBRATION + JUDGED):
        anatomy, corpus, critical = model.anatomy, model.corpus, model.critical
        calibration, windows = corpus.windows[:CALIBRATION], corpus.windows[CALIBRATION:]
        squares = input_mean_squares(
            anatomy, calibration, quantized_sites(anatomy, QuantizeConfig())
        )
        base = mean_nll(anatomy.model, windows)
        reference = Reference(anatomy.model, windows)
        print(
            f"\n## {model.name}: NLL {base:.4f} intact, {len(windows)} windows of"
            f" {corpus.name}, {len(critical)} critical entries\n"
        )

        grids = [Grid(n, block=Block.parse(b)) for n in BITS for b in BLOCKS]
        rows = sweep(
            anatomy,
            reference,
            QuantizeConfig(),
            grids,
            critical,
            progress=tell,
        )
        nlls = {(r.bits, r.block, r.method): r.nll for r in rows}
        stored = {(r.bits, r.block): r.bits_per_weight for r in rows if r.method == "rtn"}
        sites = quantized_sites(anatomy, QuantizeConfig())
        for bits, block in stored:
            peers = all_peers(anatomy, bits, Block.parse(block), sites, calibration)
            for peer, (tensors, _) in peers.items():
                nlls[bits, block, peer] = reference.compare(partial(swapped, anatomy, tensors)).nll
        methods = [m for m in (*METHODS, *PEERS, GPTQ) if any(key[2] == m for key in nlls)]
        heading("bits", "block", "bits/weight", *methods)
        for bits in BITS:
            for block in BLOCKS:
                values = [nlls.get((bits, block, m)) for m in methods]
                line(bits, block, f"{stored[bits, block]:.3f}", *best(values))

        print("\nThe hold-out by how its limits are set:\n")
        heading("bits", "block", "rtn", *CLIPS)
        for bits in BITS[1:]:
            for block in ("tensor", "flat:4096", "square:32", "channel", "group:32"):
                config = QuantizeConfig(Grid(bits, block=Block.parse(block)))
                nll = [nlls[bits, block, "rtn"]]
                for settings in CLIPS.values():
                    own = replace(config, **settings)
                    (held,) = table(anatomy, reference, own, critical, squares, methods=["holdout"])
                    nll.append(held.row.nll)
                line(bits, block, *best(nll))
    print("\n" + " ".join(missing_peers()))


def tell(what: str, done: int, total: int) -> None:
    print(what, done, "of", total, file=sys.stderr, flush=True)


def best(values: Sequence[float | None]) -> list[str]:
    """The values as text, the least in bold."""
    least = min(v for v in values if v is not None)
    return ["" if v is None else f"**{v:.4f}**" if v == least else f"{v:.4f}" for v in values]


if __name__ == "__main__":
    main()
