"""Checkpoints quantized shard by shard: the same bits as in memory, one tensor at a time, resumed
after a kill.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIGS, tiny_model
from transformers import AutoModelForCausalLM

import surgeon.quantize.formats.dense as dense
from surgeon import Anatomy, Entry, load_model
from surgeon.errors import BadInput, PackedWeight, SurgeonError, UnknownSite
from surgeon.files import unfinished
from surgeon.quantize import (
    Block,
    ExportPlan,
    Grid,
    QuantizeConfig,
    export_dense,
    input_mean_squares,
    quantize_,
    quantized_sites,
)
from surgeon.result import as_json

IDS = torch.arange(3, 35)[None]
CONFIG = QuantizeConfig(Grid(4, block=Block.parse("square:8")), weighted=True)
ENTRIES = (Entry.parse("L0.mlp.down[3, 5]"),)


def saved(path: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(kind).to(dtype).save_pretrained(path, max_shard_size="40KB")
    return path


EVERY = [(kind, torch.float32) for kind in sorted(CONFIGS)] + [
    (kind, torch.bfloat16) for kind in ("llama", "gpt2", "mixtral")
]


@pytest.mark.parametrize(("kind", "dtype"), EVERY)
def test_a_dense_export_loads_and_computes_what_the_model_in_memory_does(
    kind: str, dtype: torch.dtype, tmp_path: Path
):
    folder = saved(tmp_path / "model", kind, dtype)
    loaded = load_model(str(folder)).model
    anatomy = Anatomy.of(loaded)
    squares = input_mean_squares(anatomy, IDS, quantized_sites(anatomy, CONFIG))
    entries = (Entry(anatomy.downs()[0], 3, 5),)
    reports = export_dense(ExportPlan(folder, tmp_path / "out", CONFIG, entries, squares))
    quantize_(anatomy, CONFIG, entries, squares)
    again = type(loaded).from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert again.dtype == dtype
    assert torch.equal(again(input_ids=IDS).logits, loaded(input_ids=IDS).logits)
    assert len(list(folder.glob("*.safetensors"))) > 1
    record = json.loads((tmp_path / "out" / "surgeon_quantize.json").read_text())
    assert set(record["matrices"]) == set(map(str, quantized_sites(anatomy, CONFIG)))
    assert list(reports) == quantized_sites(anatomy, CONFIG)
    assert as_json(reports) == record["matrices"]
    assert sum(m["held"] for m in record["matrices"].values()) == 1


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


THREE = QuantizeConfig(Grid(3))


def plan(
    folder: Path, target: Path, config: QuantizeConfig = THREE, entries: tuple[Entry, ...] = ENTRIES
) -> ExportPlan:
    return ExportPlan(folder, target, config, entries)


def test_the_same_twice_is_the_same_bytes_and_only_the_projections_change(tmp_path: Path):
    folder = saved(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    for name in ("one", "two"):
        export_dense(plan(folder, tmp_path / name))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert set(files(tmp_path / "one")) == {*files(folder), "surgeon_quantize.json"} - {
        "pytorch_model.bin"
    }
    assert (tmp_path / "one" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    for shard in folder.glob("*.safetensors"):
        old, new = load_file(shard), load_file(tmp_path / "one" / shard.name)
        assert list(old) == list(new)
        for name in old:
            projection = "_proj" in name
            assert torch.equal(old[name], new[name]) != projection, name
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")


class Killed(BaseException):
    """As a kill would be: nothing may catch it."""


def test_a_killed_export_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = saved(tmp_path / "model")
    export_dense(plan(folder, tmp_path / "whole"))
    done: list[str] = []
    real = dense.quantize_view_

    def dies(view, *rest):
        if len(done) == 12:
            raise Killed
        done.append(str(view.site))
        return real(view, *rest)

    monkeypatch.setattr(dense, "quantize_view_", dies)
    with pytest.raises(Killed):
        export_dense(plan(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    part = unfinished(tmp_path / "out")
    kept = {
        site
        for reports in json.loads((part / "manifest.json").read_text())["shards"].values()
        for site in reports
    }
    assert 0 < len(kept) < 12  # the shard at hand is not finished
    after: list[str] = []
    told: list[tuple[int, int]] = []

    def counts(view, *rest):
        after.append(str(view.site))
        return real(view, *rest)

    monkeypatch.setattr(dense, "quantize_view_", counts)
    export_dense(
        ExportPlan(
            folder,
            tmp_path / "out",
            QuantizeConfig(Grid(3)),
            ENTRIES,
            progress=lambda _, n, of: told.append((n, of)),
        )
    )
    record = json.loads((tmp_path / "whole" / "surgeon_quantize.json").read_text())
    assert set(after) | kept == set(record["matrices"])
    assert not set(after) & kept
    assert told == [(n, 21) for n in range(len(kept) + 1, 22)]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not part.exists()


def test_other_settings_or_another_source_start_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = saved(tmp_path / "model")
    real = dense.quantize_view_
    calls: list[str] = []

    def dies(view, *rest):
        calls.append(str(view.site))
        if len(calls) == 12:
            raise Killed
        return real(view, *rest)

    def begin() -> None:
        calls.clear()
        monkeypatch.setattr(dense, "quantize_view_", dies)
        with pytest.raises(Killed):
            export_dense(plan(folder, tmp_path / "out"))
        calls.clear()

    begin()
    calls.append("so that none is the twelfth")
    calls.extend([""] * 20)
    export_dense(plan(folder, tmp_path / "out", QuantizeConfig(Grid(4))))
    assert len(calls) == 21 + 21
    (tmp_path / "out").rename(tmp_path / "first")
    begin()
    calls.extend([""] * 21)
    export_dense(plan(folder, tmp_path / "out", entries=()))
    assert len(calls) == 21 + 21
    (tmp_path / "out").rename(tmp_path / "second")
    begin()
    calls.extend([""] * 21)
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())  # written again, so perhaps with other numbers
    export_dense(plan(folder, tmp_path / "out"))
    assert len(calls) == 21 + 21


def test_a_full_disk_is_one_sentence_and_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = saved(tmp_path / "model")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dense, "overwrite", full)
    with pytest.raises(SurgeonError, match=r"No space left on device; what is finished stays in"):
        export_dense(plan(folder, tmp_path / "out"))
    monkeypatch.undo()
    export_dense(plan(folder, tmp_path / "out"))


def test_refused_before_anything_is_written(tmp_path: Path):
    folder = saved(tmp_path / "model")
    before = sorted(tmp_path.iterdir())
    uneven = QuantizeConfig(Grid(4, block=Block("group", 7), pad=False))
    for bad, error in (
        (plan(folder, tmp_path / "model"), BadInput),
        (plan(folder, tmp_path / "none" / "out"), BadInput),
        (plan(folder, folder / "out"), BadInput),
        (plan(folder, tmp_path / "out", uneven), BadInput),
        (plan(folder, tmp_path / "out", entries=(Entry.parse("L7.mlp.down[0, 0]"),)), UnknownSite),
        (plan(folder, tmp_path / "out", entries=(Entry.parse("L0.mlp.down[0, 99]"),)), BadInput),
    ):
        with pytest.raises(error):
            export_dense(bad)
        assert sorted(tmp_path.iterdir()) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(PackedWeight, match="quantized already"):
        export_dense(plan(folder, tmp_path / "out"))
