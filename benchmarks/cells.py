"""Cell models: training on scanpy's example, and a checkpoint in the published whole-human shape.

    python benchmarks/cells.py [--steps N] [--skip-training]

One thread. Times are wall seconds and CPU seconds of this process: on a machine that is busy with
other work the second tells more. The module is timed beside torch's own encoder (without its fast
path) on the same tensors, as a ratio in one process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import nn

from surgeon.cells import (
    Batch,
    CellConfig,
    ScGPT,
    TrainConfig,
    expression,
    load_cells,
    masked_nll,
    masks,
    read_cells,
    save_cells,
    train,
)
from surgeon.show.text import print_result


@contextmanager
def timed(what: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    print(
        f"{what}: {time.perf_counter() - wall:.2f} s, CPU {time.process_time() - cpu:.2f} s",
        flush=True,
    )


def training(steps: int | None) -> None:
    config = TrainConfig() if steps is None else replace(TrainConfig(), steps=steps)
    with timed("training"):
        made = train(expression(read_cells("pbmc68k_reduced")), config)
    print_result(made.figures)


def whole_human(cells: int) -> None:
    torch.manual_seed(0)
    shape = CellConfig()
    with timed("generate"):
        model = ScGPT(shape).eval().requires_grad_(False)
    vocab = {f"G{i}": i for i in range(shape.pad_id)} | {
        "<pad>": shape.pad_id,
        "<cls>": shape.pad_id + 1,
        "<eoc>": shape.pad_id + 2,
    }
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters,"
        f" {len(model.state_dict())} tensors"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with timed("save (best_model.pt and safetensors)"):
            save_cells(folder, model, vocab)
        with timed("load model.safetensors"):
            load_cells(folder)
        (folder / "model.safetensors").unlink()
        with timed("load best_model.pt"):
            loaded = load_cells(folder)
    same = all(
        torch.equal(a, b)
        for a, b in zip(
            model.state_dict().values(), loaded.model.state_dict().values(), strict=True
        )
    )
    print(f"{loaded.report}; bit-identical: {same}")
    for pos in (256, 1200):
        genes = torch.randint(shape.pad_id, (cells, pos))
        genes[:, 0] = vocab["<cls>"]
        values = torch.randint(1, 51, (cells, pos)).float()
        batch = Batch(
            genes,
            values,
            torch.zeros(cells, pos, dtype=torch.bool),
            [*vocab],
            [f"c{i}" for i in range(cells)],
        )
        hidden = masks(batch)
        with timed(f"one evaluation, {cells} cells x {pos} tokens"):
            masked_nll(loaded.model, batch, hidden)
    versus_torch(loaded.model)


@torch.no_grad()
def versus_torch(model: ScGPT, cells: int = 4, pos: int = 512, rounds: int = 3) -> None:
    shape = model.shape
    layer = nn.TransformerEncoderLayer(shape.d_model, shape.n_heads, shape.d_mlp, batch_first=True)
    peer = nn.TransformerEncoder(layer, shape.n_layers, enable_nested_tensor=False).eval()
    prefix = "transformer_encoder."
    peer.load_state_dict(
        {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
    )
    states = torch.randn(cells, pos, shape.d_model)
    torch.backends.mha.set_fastpath_enabled(False)

    def ours() -> torch.Tensor:
        out = states
        for block in model.layers:
            out = block(out, None)
        return out

    def cost(run: Callable[[], torch.Tensor]) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    difference = float((ours() - peer(states)).abs().max())
    ratio = median(cost(ours) / cost(lambda: peer(states)) for _ in range(rounds))
    print(
        f"the blocks against torch's own encoder: {ratio:.2f} of its CPU time, largest difference"
        f" {difference:.1e}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--skip-training", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole_human(options.cells)
    if not options.skip_training:
        training(options.steps)
