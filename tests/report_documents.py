"""One small document of each verb, with every text in it chosen by the test."""

from __future__ import annotations

from typing import Any

Documents = dict[str, dict[str, Any]]
STATES = ("base", "broken", "patched")


def documents(text: str = "text") -> Documents:
    """Documents by kind, as the command line writes them; names of models, files, words, documents
    and tokens are `text`.
    """
    corpus = {"name": text, "tokens": 500, "bos": True, "windows": 2, "window": 250}
    entry = {
        "entry": f"L0.mlp.down[3, 5]{text}",
        "layer": 0,
        "row": 3,
        "col": 5,
        "expert": None,
        "weight": -2.5,
        "share": 0.4,
        "rank_abs": 7,
    }
    controls = {
        "n": 20,
        "max_nats": 0.01,
        "median_nats": 0.002,
        "nats": [0.001 * i for i in range(-9, 11)],
        "kind": text,
    }
    damage = {
        "joint_nats": 0.75,
        "single_nats": [0.5, 0.25],
        "leave_one_out_nats": [0.1, 0.2],
        "ci95": [0.6, 0.9],
        "p_value": 0.0476,
        "restored_nats": None,
        "full_nats": 1.0,
        "full_size": 8,
    }
    critical = {
        "geometry": "row",
        "channels": [3],
        "heights": [[2.0, 9.0, 8.0]],
        "agreement": 1.0,
        "entries": [entry, {**entry, "col": 6}],
        "damage": damage,
        "controls": controls,
        "vital": True,
        "criteria": text,
    }
    find = {
        "corpus": corpus,
        "verdict": "found",
        "sets": [critical],
        "rejected": [
            {"entry": text, "reason": text, "height": 12.0, "entries": 8, "joint_nats": 0.04}
        ],
        "detection": {"bar": 4.0, "heights": [5.0, 12.0, 11.0], "base_nll": 0.7},
    }
    nll, ppl = (
        dict(zip(STATES, (0.7, 1.4, 0.8), strict=True)),
        dict(zip(STATES, (2.0, 4.1, 2.2), strict=True)),
    )
    repair = {
        "nll": nll,
        "ppl": ppl,
        "kl": {"broken": 0.7, "patched": 0.1},
        "recovered": 6 / 7,
        "recovered_kl": 6 / 7,
        "steps": 50,
        "seconds": 1.0,
        "patch_bytes": 5576,
        "cosine_to_row": 0.1,
        "delta_norm": 1.0,
        "row_norm": 2.0,
        "control": {"recovered": 0.05, "nll": 1.365, "rows": {}},
        "held_out": {"name": text, "second_text": True, "recovered": 0.8, "nll": nll},
        "method": "graft+distil",
        "rows": {},
        "corpus": {**corpus, "fitted": 8, "chosen_on": 2, "judged_on": 2},
        "kept_step": 25,
        "curve": [[0.0, 0.2, 1.0, 0.5], [25.0, 0.1, 0.8, 0.85], [50.0, 0.11, 0.81, 0.84]],
    }
    model = {"model": text, "fingerprint": "0"}
    share = {
        "prompts": 1,
        "before": 0.0,
        "after": 1.0,
        "ci95": [1.0, 1.0],
        "magnitude_before": -0.9,
        "magnitude_after": 0.9,
    }
    flight = {"verdict": "ok", "update_norm_ratio": 0.23, "relative_damage": 0.09}
    free = [{"prompt": text, "before": text, "after": f"{text} {text}"}]
    edit = {
        "method": text,
        "preflight": flight,
        "target_probability": {"before": 0.0, "after": 0.99},
        "controls": [
            {"prompt": text, "before": [text, 0.9], "after": [text, 0.4], "changed": True}
        ],
        "scorecard": {
            "efficacy": share,
            "paraphrase": share,
            "neighbourhood": share,
            "neighbours_known_before": 4,
            "neighbours_kept": 3,
            "ppl": {"before": 2.0, "after": 2.1},
            "facts": [{"subject": text, "target": text, "free": free}],
        },
    }
    conditioning = {
        "tokens_per_dimension": 2.5,
        "ridge": 0.01,
        "prompt": text,
        "update_norm_ratio": 0.5,
        "relative_damage": 0.1,
        "position_zero": True,
        "direction_stability": 0.9,
        "target_probability": 0.9,
        "controls_changed": 1,
        "nll_rise": 0.01,
    }
    row = {
        "method": "rtn",
        "bits": 4,
        "block": text,
        "bits_per_weight": 4.1,
        "nll": 0.8,
        "kl": 0.1,
        "top1_agreement": 0.9,
        "accuracy": {text: 0.5},
    }
    matrix = {"site": text, "blocks": 4, "clip": 2.5, "clipped": 3, "held": 1, "error": 0.01}
    quantize = {
        **model,
        "corpus": {**corpus, "judged_on": 2},
        "base": {"nll": 0.7, "accuracy": {text: 0.6}},
        "critical": {"entries": [text], "source": text},
        "config": {"method": "holdout", "matrices": [matrix]},
        "notes": [text],
    }
    worse = {**row, "method": "holdout", "nll": None, "kl": None}
    return {
        "edits": {**model, "edits": [{**edit, "name": text}], "published": [text]},
        "conditioning": {
            **model,
            "conditioning": [conditioning, {**conditioning, "position_zero": False}],
            "published": [text],
        },
        "quantize": {**quantize, "table": [row, worse]},
        "sweep": {
            **quantize,
            "sweep": [row, {**row, "method": text, "bits": 8, "nll": 0.75}, worse],
            "pareto": [row],
        },
        "find": {**model, **find},
        "verify": {
            **model,
            "at": [text],
            "base_nll": 0.7,
            "tokens": 500,
            **damage,
            "controls": controls,
            "vital": True,
            "criteria": text,
        },
        "recipe": {
            **model,
            "title": text,
            "figures": [{"figure": text, "published": 0.9, "measured": 0.8}],
            "repair": repair,
        },
        "measure": {
            **model,
            "patches": [text],
            "corpus": corpus,
            "nll": 0.8,
            "ppl": 2.2,
            "tokens": 500,
            "kl_from_base": 0.1,
            "top1_agreement": 0.9,
            "generations": [{"prompt": text, "base": text, "patched": f"{text} {text}"}],
            "loop_rate": 0.0,
        },
    }
