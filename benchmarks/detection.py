"""What the detection pass of `find` costs beside one plain forward pass on the same batch: time and
peak memory, as ratios.

    python benchmarks/detection.py [MODEL ...]

Each pair is run in turn, A B A B, in one process; the median ratio is printed. Peak memory is
measured in a child process each.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from surgeon.anatomy import Anatomy, load_model
from surgeon.find import detect

REPEATS = 7
MEDIUM = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "vocab_size": 8192,
}


def build(name: str) -> Anatomy:
    if name != "medium":
        return Anatomy.of(load_model(name).model)
    torch.manual_seed(0)
    return Anatomy.of(LlamaForCausalLM(LlamaConfig(**MEDIUM)).eval().requires_grad_(False))


def passes(anatomy: Anatomy) -> dict[str, Callable[[], object]]:
    vocab = anatomy.view("embed").shape[1]
    ids = torch.randint(3, vocab, (8, 256), generator=torch.Generator().manual_seed(0))

    def plain() -> object:
        with torch.no_grad():
            return anatomy.model(input_ids=ids, use_cache=False)

    return {"plain": plain, "detect": lambda: detect(anatomy, ids)}


def peak(name: str, which: str, results: multiprocessing.Queue[int]) -> None:
    run = passes(build(name))[which]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (Linux)
    before = high_water()
    run()
    results.put(high_water() - before)


def high_water() -> int:
    """Peak resident memory of this process in kB since the mark was reset."""
    return int(
        next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        ).split()[1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["patient", "medium"])
    for name in parser.parse_args().models:
        runs = passes(build(name))
        seconds: dict[str, list[float]] = {which: [] for which in runs}
        for repeat in range(REPEATS + 1):
            for which, run in runs.items():
                start = time.perf_counter()
                run()
                if repeat:  # the first round warms up
                    seconds[which].append(time.perf_counter() - start)
        ratios = [d / p for d, p in zip(seconds["detect"], seconds["plain"], strict=True)]
        memory = {}
        for which in runs:
            results: multiprocessing.Queue[int] = multiprocessing.get_context("spawn").Queue()
            child = multiprocessing.get_context("spawn").Process(
                target=peak, args=(name, which, results)
            )
            child.start()
            memory[which] = results.get() / 1024
            child.join()
        print(
            f"{name}: detection pass / plain pass: time {statistics.median(ratios):.2f}"
            f" ({min(ratios):.2f} to {max(ratios):.2f}), plain"
            f" {statistics.median(seconds['plain']):.2f} s; memory added {memory['detect']:.0f} MB"
            f" against {memory['plain']:.0f} MB"
        )


if __name__ == "__main__":
    main()
