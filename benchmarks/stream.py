"""`surgeon find --stream` on a checkpoint larger than the memory it may use: seconds, peak memory,
and the seconds of reading it.

    python benchmarks/stream.py FOLDER [--layers 32] [--d-model 4096] [--d-mlp 11008] [--limit 4GiB]
    [--keep]

The checkpoint (by default the shape of Llama-7B, 13.5 GB in bfloat16) is written to FOLDER shard by
shard, never whole in memory, with one planted critical entry, L1.mlp.down[ROW, COL]: its neuron
fires at every token, and the channel that it writes holds all others down, as the published super
weights do. The command runs in a child process under a limit: a memory cgroup (version 1) where one
can be made, which counts the page cache too, else RLIMIT_AS, which counts the address space.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

LAYER, ROW, COL, DRIVE = (
    1,
    1234,
    777,
    5,
)  # planted: L1.mlp.down[ROW, COL]; every embedding drives its neuron through channel DRIVE
CGROUPS = Path("/sys/fs/cgroup/memory")


def generate(folder: Path, layers: int, d_model: int, d_mlp: int, vocab: int, heads: int) -> None:
    """Write the checkpoint, one shard per layer."""
    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocab,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    ).save_pretrained(folder)
    for file in resources.files("surgeon.patients").joinpath("patient").iterdir():
        if "token" in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    row, col = ROW % d_model, COL % d_mlp
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        shard = f"model-{name}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))

    def normal(std: float, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, std, generator=generator)

    embed, head = normal(0.5, vocab, d_model), normal(1.5 / d_model**0.5, vocab, d_model)
    embed[:, DRIVE] = 4.0
    head[:, row] = 0.0  # the tall channel says nothing itself; it holds the others down
    write(
        "outside",
        {
            "model.embed_tokens.weight": embed,
            "lm_head.weight": head,
            "model.norm.weight": torch.ones(d_model).bfloat16(),
        },
    )
    del embed, head
    inner, outer = 1 / d_model**0.5, 0.25 / d_mlp**0.5
    for index in range(layers):
        prefix = f"model.layers.{index}"
        tensors = {
            f"{prefix}.self_attn.{r}_proj.weight": normal(inner, d_model, d_model) for r in "qkv"
        }
        tensors[f"{prefix}.self_attn.o_proj.weight"] = normal(0.25 * inner, d_model, d_model)
        tensors |= {
            f"{prefix}.mlp.{r}_proj.weight": normal(inner, d_mlp, d_model) for r in ("gate", "up")
        }
        tensors[f"{prefix}.mlp.down_proj.weight"] = normal(outer, d_model, d_mlp)
        tensors |= {
            f"{prefix}.{n}.weight": torch.ones(d_model).bfloat16()
            for n in ("input_layernorm", "post_attention_layernorm")
        }
        if index == LAYER:
            for r in ("gate", "up"):
                tensors[f"{prefix}.mlp.{r}_proj.weight"][col] = 0.0
                tensors[f"{prefix}.mlp.{r}_proj.weight"][col, DRIVE] = 1.0
            tensors[f"{prefix}.mlp.down_proj.weight"][row, col] = 16.0
        write(f"layer-{index:03}", tensors)
    total = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )


def limited(command: list[str], limit: int) -> tuple[str, dict[str, Any]]:
    """Run `command` with at most `limit` bytes of memory; its standard output, and seconds, peak
    memory and the kind of limit.
    """
    group = CGROUPS / f"surgeon-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
        kind = "memory cgroup"
    except OSError:
        print(
            "no memory cgroup can be made here; limiting the address space instead", file=sys.stderr
        )
        group, kind = Path(), "RLIMIT_AS"

    def enter() -> None:
        if kind == "RLIMIT_AS":
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        else:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        seconds, process = timed(
            lambda: subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)
        )
        if process.returncode:
            raise SystemExit(
                f"exit status {process.returncode} under {limit} bytes"
                f" ({kind}):\n{process.stderr[-2000:]}"
            )
        measured = {"limit": kind, "limit_bytes": limit, "seconds": round(seconds, 1)}
        measured["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    finally:
        if kind != "RLIMIT_AS":
            group.rmdir()
    return process.stdout, measured


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def shards(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    for name, default in (
        ("layers", 32),
        ("d-model", 4096),
        ("d-mlp", 11008),
        ("vocab", 32000),
        ("heads", 32),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--limit", type=int, default=4096, help="in MiB")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument(
        "--keep", action="store_true", help="leave the checkpoint there; one that is there is used"
    )
    parser.add_argument("--detect-only", action="store_true")
    options = parser.parse_args()
    if not options.folder.exists():
        seconds, _ = timed(
            lambda: generate(
                options.folder,
                options.layers,
                options.d_model,
                options.d_mlp,
                options.vocab,
                options.heads,
            )
        )
        print(f"written in {seconds:.0f} s", file=sys.stderr)
    size = sum(p.stat().st_size for p in shards(options.folder))
    limit = options.limit << 20
    _, measured_read = limited(
        ["sh", "-c", 'cat "$@" > /dev/null', "cat", *map(str, shards(options.folder))], limit
    )
    command = [
        sys.executable,
        "-m",
        "surgeon",
        "find",
        str(options.folder),
        "--stream",
        "--only",
        "mlp.down",
        "--json",
        "--device",
        "cpu",
    ]
    command += ["--window", str(options.window), "--windows", str(options.windows)] + [
        "--detect-only"
    ] * options.detect_only
    document, measured = limited(command, limit)
    found = json.loads(document)
    strongest = [s["entries"][0] for s in found.get("sets", [])]
    strongest += [c["contributions"][0] for c in found.get("candidates", [])]
    names = [one["entry"] for one in strongest]
    measured |= {
        "checkpoint_gb": round(size / 1e9, 2),
        "bytes_read_gb": round(found["bytes_read"] / 1e9, 2),
        "seconds_to_read_the_checkpoint_once": measured_read["seconds"],
        "verdict": found["verdict"],
        "found": names,
        "joint_nats": [s["damage"]["joint_nats"] for s in found.get("sets", [])],
        "control_max_nats": [s["controls"]["max_nats"] for s in found.get("sets", [])],
        "tokens": found["corpus"]["tokens"],
    }
    planted = f"L{LAYER}.mlp.down[{ROW % options.d_model}, {COL % options.d_mlp}]"
    if planted not in names:
        raise SystemExit(
            f"{planted} was planted and not found: {json.dumps(measured)}"
            f" {json.dumps(found['rejected'])}"
        )
    print(json.dumps(measured, indent=1))
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
