"""A small trained checkpoint with a tokenizer and a text, and the command line as a function.

Fixtures, for the conftest.py of each folder that wants them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]

_WHO = ("red cat", "old dog", "small bird", "grey fox", "young king", "wise queen", "brown horse")
_DID = ("saw", "ate", "liked", "found", "heard", "lost")
_WHAT = ("fish", "bread", "tree", "road", "song", "book", "stone", "river")
_WHERE = ("house", "garden", "forest", "town", "night")
LINES = [
    f"the {_WHO[i % 7]} {_DID[i % 6]} the {_WHAT[i % 8]} in the {_WHERE[i % 5]} ."
    for i in range(35)
]


class Result(NamedTuple):
    status: int
    out: str
    err: str


Surgeon = Callable[..., Result]


def make_tokenizer(prepends: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, in a vocabulary that the tiny models have; it prepends <s> by itself, or
    has no such token.
    """
    words = sorted(set(" ".join(LINES).split()))
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    core = Tokenizer(
        WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = WhitespaceSplit()
    if prepends:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        **({"bos_token": "<s>"} if prepends else {}),
    }
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def train(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A tiny llama that has learned LINES around one planted weight that it cannot live without."""
    ids = tokenizer(" ".join(LINES), add_special_tokens=False).input_ids * 2
    model = tiny_model("llama", seed=1, max_position_embeddings=512)
    planted = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        planted.data[5, 7] = 300.0
        starts = torch.randint(len(ids) - 15, (16,), generator=generator).tolist()
        batch = torch.tensor([[1, *ids[i : i + 15]] for i in starts])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    planted.data[5, 7] = 300.0
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint. Tests that damage it take a `copy`."""
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    tokenizer = make_tokenizer()
    train(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def without_bos() -> PreTrainedTokenizerFast:
    return make_tokenizer(prepends=False)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "animals.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def surgeon(capsys: pytest.CaptureFixture[str]) -> Surgeon:
    """The command line in this process: surgeon("sites", folder) -> (status, stdout, stderr)."""
    from surgeon.cli import run

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        status = run([str(a) for a in arguments])
        return Result(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """`python -m surgeon` in a process of its own, which takes seconds to start; keywords are
    environment variables.
    """

    def call(*arguments: object, **more: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": "1",
            **more,
        }
        command = [sys.executable, "-m", "surgeon", *map(str, arguments)]
        # where the tests run in the background, a shell has set interrupts to be ignored, and
        # children inherit that
        hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear,
        )

    return call


@pytest.fixture(scope="session")
def process(start: Callable[..., subprocess.Popen[str]]) -> Surgeon:
    """The same, waited for: process("sites", folder) -> (status, stdout, stderr)."""

    def call(*arguments: object, **more: str) -> Result:
        running = start(*arguments, **more)
        output, errors = running.communicate(timeout=120)
        return Result(running.returncode, output, errors)

    return call
