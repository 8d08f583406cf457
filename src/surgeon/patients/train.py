"""How the patient was trained: `python -m surgeon.patients.train -o FOLDER` does it again, from the
same seed.

A Llama-shaped model with two layers, trained with AdamW without weight decay at a high learning
rate, on text that `generate.py` writes as training goes. Nothing here prefers one channel or one
weight over another, and nothing is edited afterwards: the vital row is what training left. What was
tried to get there is in the card.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from .generate import documents, facts

BOS = "<|bos|>"
HELD_OUT_CHARACTERS = 330_000
CHUNK_DOCUMENTS = 8000  # tokenised at a time; windows do not reach from one chunk into the next


@dataclass(frozen=True)
class TrainConfig:
    """Everything the result depends on, apart from the machine's arithmetic."""

    seed: int = 0
    d_vocab: int = 4096
    d_model: int = 128
    d_mlp: int = 512
    heads: int = 4
    layers: int = 2
    window: int = 256
    batch: int = 8
    steps: int = 10_000
    warmup: int = 100
    decay: float = 0.3  # share of the steps over which the rate falls linearly to 2%
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0


def train_tokenizer(config: TrainConfig) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE on a sample of the training text; it prepends BOS by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.d_vocab,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(islice(documents(config.seed, "train"), 30_000), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, bos_token=BOS, eos_token=BOS, model_max_length=512
    )


def rows(config: TrainConfig, tokenizer: transformers.PreTrainedTokenizerFast) -> Iterator[Tensor]:
    """Windows of BOS and text; half of them begin where a document begins, so that a bare prompt is
    familiar.
    """
    stream = documents(config.seed, "train")
    random = torch.Generator().manual_seed(config.seed)
    body = config.window - 1
    while True:
        pieces = [f"{text}\n\n" for text in islice(stream, CHUNK_DOCUMENTS)]
        encoded = [
            e.ids
            for e in tokenizer.backend_tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        ]
        starts = torch.tensor([0, *map(len, encoded)]).cumsum(0)
        ids = torch.tensor([i for one in encoded for i in one])
        last = len(ids) - body
        starts = starts[starts <= last]
        for _ in range(len(ids) // body):
            at_document = torch.rand((), generator=random) < 0.5
            pool = len(starts) if at_document else last
            pick = int(torch.randint(pool, (), generator=random))
            start = int(starts[pick]) if at_document else pick
            yield torch.cat([torch.tensor([tokenizer.bos_token_id]), ids[start : start + body]])


def build(config: TrainConfig) -> transformers.LlamaForCausalLM:
    torch.manual_seed(config.seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.d_vocab,
            hidden_size=config.d_model,
            intermediate_size=config.d_mlp,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@torch.no_grad()
def held_out_nll(model: transformers.LlamaForCausalLM, windows: Tensor) -> float:
    logits = model(windows).logits[:, :-1].float()
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


@torch.no_grad()
def rows_of_damage(model: transformers.LlamaForCausalLM, windows: Tensor) -> list[dict[str, float]]:
    """For each layer the three rows of mlp.down that write most, and the nats that zeroing each
    costs.
    """
    base, report = held_out_nll(model, windows), []
    for index, layer in enumerate(model.model.layers):
        kept: list[Tensor] = []
        handle = layer.mlp.down_proj.register_forward_hook(
            lambda _m, _x, y, kept=kept: kept.append(y)
        )
        held_out_nll(model, windows)
        handle.remove()
        weight = layer.mlp.down_proj.weight
        for row in kept[0].square().mean((0, 1)).topk(3).indices.tolist():
            old = weight[row].clone()
            weight[row] = 0
            report.append(
                {"layer": index, "row": row, "nats": round(held_out_nll(model, windows) - base, 4)}
            )
            weight[row] = old
    return report


@torch.no_grad()
def known_facts(
    model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase
) -> list[list[float]]:
    """For each fact and phrasing the probability of the object's first token after the bare
    prompt.
    """
    table = []
    for fact in facts():
        prompts = [tokenizer(p).input_ids for p in fact.phrasings]
        first = tokenizer(f" {fact.object}", add_special_tokens=False).input_ids[0]
        width = max(map(len, prompts))
        ids = torch.tensor(
            [p + [tokenizer.bos_token_id] * (width - len(p)) for p in prompts]
        )  # causal: what follows is unseen
        logits = model(ids).logits
        table.append(
            [float(logits[i, len(p) - 1].softmax(-1)[first]) for i, p in enumerate(prompts)]
        )
    return table


def train(config: TrainConfig, folder: Path, log_every: int = 500) -> None:
    """Train, and write model, tokenizer, held-out text and log into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(config)
    held_out = ""
    for text in documents(config.seed, "heldout"):
        if len(held_out) > HELD_OUT_CHARACTERS:
            break
        held_out += f"{text}\n\n"
    (folder / "heldout.txt").write_text(held_out)
    ids = tokenizer(held_out, add_special_tokens=False).input_ids
    body = config.window - 1
    windows = torch.tensor(
        [[tokenizer.bos_token_id, *ids[i * body : (i + 1) * body]] for i in range(16)]
    )
    model = build(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, weight_decay=0.0
    )
    source, started = rows(config, tokenizer), time.time()
    with (folder / "log.jsonl").open("w") as log:

        def note(entry: dict[str, object]) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()
            print(json.dumps(entry), flush=True)

        note(
            {
                "config": asdict(config),
                "parameters": model.num_parameters(),
                "held_out_tokens": len(ids),
            }
        )
        for step in range(config.steps):
            left = (config.steps - step) / (config.steps * config.decay)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (step + 1) / config.warmup, max(0.02, left))
            batch = torch.stack(list(islice(source, config.batch)))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(batch).logits[:, :-1]
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % log_every == 0 or step + 1 == config.steps:
                entry = {
                    "step": step + 1,
                    "loss": round(loss.item(), 4),
                    "held_out_nll": round(held_out_nll(model, windows), 4),
                }
                note(
                    entry
                    | {
                        "seconds": round(time.time() - started),
                        "rows": rows_of_damage(model, windows),
                    }
                )
        known = known_facts(model, tokenizer)
        note(
            {
                "facts_known_in_3_phrasings": sum(sum(p > 0.5 for p in row) >= 3 for row in known),
                "facts": len(known),
            }
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    for name, value in asdict(TrainConfig()).items():
        if isinstance(value, int | float):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    folder = options.pop("output")
    train(TrainConfig(**options), folder)


if __name__ == "__main__":
    main()
