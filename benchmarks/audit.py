"""What an audit of two checkpoints of a 7B model costs: seconds beside what importing takes, and
bytes read beside bytes stored.

    python benchmarks/audit.py [DIR]

Two checkpoints of Llama-7B's shape in bfloat16 are made in DIR, 13.5 GB each, and deleted again.
They are sparse files: all that is not audited are holes. `L2.mlp.down` is random, with the
published entry planted in both, at 0.6 of its size in OTHER. One run is warmed up, in a process of
its own; then the whole command, the same without the audit, and the audit alone in one process.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from surgeon.anatomy import Entry
from surgeon.audit import Watched, audit, open_pair

CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
)
WEIGHT, ENTRY, VALUE = "model.layers.2.mlp.down_proj.weight", "L2.mlp.down[3968, 7003]", -1.9268
SHARDS, REPEATS = 3, 3


def generate(folder: Path, factor: float) -> int:
    """A checkpoint whose matrix of interest is real, and whose other tensors are holes; its size in
    bytes.
    """
    folder.mkdir(parents=True)
    CONFIG.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tuple(p.shape)
            for name, p in AutoModelForCausalLM.from_config(CONFIG).named_parameters()
        }
    names = list(shapes)
    per_shard = -(-len(names) // SHARDS)
    index: dict[str, str] = {}
    total = 0
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names[number * per_shard : (number + 1) * per_shard]:
            size = 2 * torch.Size(shapes[name]).numel()
            header[name] = {
                "dtype": "BF16",
                "shape": shapes[name],
                "data_offsets": [end, end + size],
            }
            index[name] = file
            end += size
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + end)
            if WEIGHT in header:
                matrix = (
                    torch.randn(shapes[WEIGHT], generator=torch.Generator().manual_seed(0))
                    .mul_(0.02)
                    .bfloat16()
                )
                matrix[3968, 7003] = VALUE * factor
                out.seek(8 + len(raw) + header[WEIGHT]["data_offsets"][0])  # type: ignore[index]
                out.write(matrix.view(torch.uint8).numpy().tobytes())
        total += end
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


def cost(*command: str) -> tuple[float, float, str]:
    """Seconds on the clock, seconds of CPU, and what the command printed."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, busy, done.stdout


def main(parent: Path) -> None:
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="audit-", dir=parent))
    try:
        base, other = str(folder / "base"), str(folder / "other")
        stored = generate(folder / "base", 1.0) + generate(folder / "other", 0.6)
        command = ("-m", "surgeon", "audit", base, other)
        runs: dict[str, list[tuple[float, float]]] = {"command": [], "imports": [], "audit": []}
        for repeat in range(REPEATS + 1):
            *whole, output = cost(*command, "--at", ENTRY, "--json")
            *empty, _ = cost("-c", "import surgeon.cli; from transformers import LlamaForCausalLM")
            start, busy = time.perf_counter(), time.process_time()
            result = audit(*open_pair(base, other), [Watched((Entry.parse(ENTRY),))])
            alone = time.perf_counter() - start, time.process_time() - busy
            if repeat:  # the first one warms up the disk
                for name, (clock, cpu) in (
                    ("command", whole),
                    ("imports", empty),
                    ("audit", alone),
                ):
                    runs[name].append((clock, cpu))
        document = json.loads(output)
        (entry,) = document["entries"]
        print(
            f"{entry['entry']}: ratio {entry['ratio']:.3f}, rank {entry['rank']}:"
            f" {document['verdict']}"
        )
        share = result.bytes_read / stored
        print(
            f"stored {stored / 1e9:.1f} GB in both, read {result.bytes_read / 1e6:.0f} MB:"
            f" {share:.2%}"
        )
        for name, values in runs.items():
            clock, cpu = (statistics.median(v) for v in zip(*values, strict=True))
            print(
                f"{name:8} {cpu:6.2f} s of CPU, {clock:6.2f} s on the clock (medians of {REPEATS})"
            )
        clock, cpu, output = cost(*command, "--json")
        known = json.loads(output)
        print(
            f"without --at {cpu:.2f} s of CPU, {clock:.2f} s on the clock: {known['source']},"
            f" {known['bytes_read'] / 1e6:.0f} MB read"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()))
