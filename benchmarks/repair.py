"""Graft, distil and graft+distil beside the reference procedure written out plainly, on the same
injury in one process.

    python benchmarks/repair.py MODEL [--text FILE] [--entries N]

The injury is the N strongest entries of the set that `find` returns that lie in the row of the
strongest, since the plain procedure knows one row; the injured entries stay out. It runs the intact
and the broken model whole at every step (AdamW, the row, constant rate, batch 2, length 128) and is
given two rates: the reference's 1e-3 and the one that `distil` takes. All are judged on the same
windows, which none has seen.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from surgeon import Anatomy, ablate, load_corpus, load_model, read_text
from surgeon.corpus import Corpus
from surgeon.find import find
from surgeon.measure import ThreeStates, mean_nll
from surgeon.patch import Patch
from surgeon.patients import heldout_text
from surgeon.repair import DistilConfig, RepairConfig, recut, repair, split

STEPS, BATCH, LENGTH = 400, 2, 128


def plain(
    anatomy: Anatomy, injury: Patch, corpus: Corpus, rate: float | None
) -> tuple[float, float]:
    """The reference procedure; NLL on the judging windows and seconds."""
    fit, _, judge = split(corpus)
    windows = recut(fit, corpus.bos, LENGTH)
    student = copy.deepcopy(anatomy.model)
    other = Anatomy.of(student)
    injury.apply_(other)
    (site,) = injury.sites
    mask = injury.touched(site)
    row = int(mask.any(1).nonzero()[0])
    weight = other.view(site).stored  # the Linear's own weight, (out, in)
    weight.requires_grad_(True)
    allowed = torch.zeros_like(weight)
    allowed[row] = (~mask[row]).to(weight)
    # as `distil` has it: without the injured entries
    scale = float(anatomy.view(site).read()[row][~mask[row]].float().square().mean().sqrt())
    optimizer = torch.optim.AdamW(
        [weight], lr=rate or DistilConfig().relative_lr * scale, weight_decay=0.0
    )
    order = torch.randint(len(windows), (STEPS, BATCH), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for step in range(STEPS):
        ids = windows[order[step]]
        with torch.no_grad():
            target = anatomy.model(ids).logits[:, :-1].log_softmax(-1)
        loss = (
            F.kl_div(
                student(ids).logits[:, :-1].log_softmax(-1),
                target,
                log_target=True,
                reduction="none",
            )
            .sum(-1)
            .mean()
        )
        loss.backward()
        weight.grad *= allowed
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    weight.requires_grad_(False)
    return mean_nll(student, judge), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--entries", type=int, default=12)
    options = parser.parse_args()
    loaded = load_model(options.model)
    anatomy = Anatomy.of(loaded.model)
    text = heldout_text() if options.text is None else read_text(options.text)
    corpus = load_corpus(loaded.tokenizer, text, "text", 256, 200)
    critical = find(anatomy, Corpus(corpus.name, corpus.windows[:24], corpus.bos)).sets[0]
    first = critical.entries[0].entry
    in_row = [c.entry for c in critical.entries if (c.entry.site, c.row) == (first.site, first.row)]
    injury = ablate(anatomy, in_row[: options.entries])
    print(
        f"{options.model}: {len(in_row[: options.entries])} strongest entries of row {first.row} of"
        f" {first.site}, from a vital {critical.geometry}; {len(corpus.windows)} windows",
        flush=True,
    )
    for method in ("graft", "distil", "graft+distil"):
        result = repair(anatomy, injury, corpus, RepairConfig(method=method, exclude_injured=True))
        control = None if result.control is None else result.control.recovered
        print(
            f"  {method:<14} recovered {result.recovered:.3f}  control {control:.3f} "
            f" {result.seconds:.1f} s",
            flush=True,
        )
    nll = result.nll
    for rate in (1e-3, None):
        patched, seconds = plain(anatomy, injury, corpus, rate)
        share = ThreeStates(nll.base, nll.broken, patched).recovered
        print(
            f"  plain, {'the same rate' if rate is None else f'rate {rate:g}':<14} recovered"
            f" {share:.3f}  {seconds:.1f} s",
            flush=True,
        )
    size = sum(p.stat().st_size for p in loaded.folder.glob("*.safetensors"))
    print(
        f"  damage {nll.damage:.3f} nats; patch {result.patch_bytes} bytes, checkpoint {size} bytes"
    )


if __name__ == "__main__":
    main()
