"""NLL of a model at 8, 4 and 3 bits, all kinds of blocks, the four methods and the installed peers,
as Markdown tables.

    python benchmarks/quantize.py [MODEL[=TEXT] ...]      # default: patient

The first 8 windows of the text are for calibration (weighted searches, GPTQ); 24 others are judged
on. The critical entries are found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from surgeon.anatomy import Anatomy, load_model
from surgeon.corpus import load_corpus, read_text
from surgeon.find import find
from surgeon.measure import mean_nll
from surgeon.patients import heldout_text
from surgeon.quantize import (
    METHODS,
    Block,
    Grid,
    QuantizeConfig,
    input_mean_squares,
    missing_peers,
    quantized_sites,
    sweep,
    table,
)
from surgeon.quantize.peers import GPTQ, PEERS

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
CALIBRATION, JUDGED, WINDOW = 8, 24, 256
CLIPS = {
    "z": {"clip": "z"},
    "z per block": {"clip": "z", "clip_per": "block"},
    "z weighted": {"clip": "z", "weighted": True},
    "percentile": {"clip": "percentile"},
    "mse": {"clip": "mse"},
    "mse weighted": {"clip": "mse", "weighted": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["patient"])
    for each in parser.parse_args().models:
        name, _, text = each.partition("=")
        loaded = load_model(name)
        anatomy = Anatomy.of(loaded.model)
        assert loaded.tokenizer is not None
        source = read_text(text) if text else heldout_text()
        corpus = load_corpus(
            loaded.tokenizer,
            source,
            Path(text).name or "held-out text",
            WINDOW,
            CALIBRATION + JUDGED,
        )
        critical = [
            c.entry for s in find(anatomy, corpus).sets if s.verification.vital for c in s.entries
        ]
        calibration, windows = corpus.windows[:CALIBRATION], corpus.windows[CALIBRATION:]
        squares = input_mean_squares(
            anatomy, calibration, quantized_sites(anatomy, QuantizeConfig())
        )
        base = mean_nll(anatomy.model, windows)
        print(
            f"\n## {Path(name).name}: NLL {base:.4f} intact, {len(windows)} windows of"
            f" {corpus.name}, {len(critical)} critical entries\n"
        )

        blocks = [Block.parse(b) for b in BLOCKS]
        rows = sweep(
            anatomy,
            windows,
            QuantizeConfig(),
            BITS,
            blocks,
            critical,
            progress=tell,
            calibration=calibration,
        )
        found = {(r.bits, r.block, r.method): r for r in rows}
        methods = [m for m in (*METHODS, *PEERS, GPTQ) if any(r.method == m for r in rows)]
        heading("bits", "block", "bits/weight", *methods)
        for bits in BITS:
            for block in BLOCKS:
                values = [found.get((bits, block, m)) for m in methods]
                stored = found[bits, block, "rtn"].bits_per_weight
                line(
                    bits,
                    block,
                    f"{stored:.3f}",
                    *best([None if r is None else r.nll for r in values]),
                )

        print("\nThe hold-out (both) by how its limits are set:\n")
        heading("bits", "block", "rtn", *CLIPS)
        for bits in BITS[1:]:
            for block in ("tensor", "flat:4096", "square:32", "channel", "group:32"):
                config = QuantizeConfig(Grid(bits, block=Block.parse(block)))
                nll = [found[bits, block, "rtn"].nll]
                for settings in CLIPS.values():
                    nll.append(
                        table(
                            anatomy,
                            windows,
                            replace(config, **settings),
                            critical,
                            squares,
                            methods=["both"],
                        )[0].nll
                    )
                line(bits, block, *best(nll))
    print("\n" + " ".join(missing_peers()))


def tell(what: str, done: int, total: int) -> None:
    print(what, done, "of", total, file=sys.stderr, flush=True)


def best(values: Sequence[float | None]) -> list[str]:
    """The values as text, the least in bold."""
    least = min(v for v in values if v is not None)
    return ["" if v is None else f"**{v:.4f}**" if v == least else f"{v:.4f}" for v in values]


def heading(*cells: object) -> None:
    line(*cells)
    line(*("---" for _ in cells))


def line(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
