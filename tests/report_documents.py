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
    state = {"nll": 0.7, "ppl": 2.0, "facts_known": 331, "same_bits": True}
    states = [
        {**state, "state": "intact", "texts": [f"a b {text}"]},
        {
            **state,
            "state": "without the set",
            "nll": 1.5,
            "ppl": 4.5,
            "facts_known": 300,
            "same_bits": False,
            "texts": [f"a c {text}"],
        },
        {**state, "state": "put back", "texts": [f"a b {text}"]},
    ]
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
    point = {"k": 1, "largest": 0.3, "random": 0.01, "random_range": [0.0, 0.02], "trained": 0.4}
    line = {
        "region": f"L0.mlp.down[3, :]{text}",
        "norms": {"base": 2.0, "broken": 1.0, "delta": 1.5, "merged": 2.1},
        "cosines": {"delta_base": 0.1, "delta_broken": 0.0, "merged_base": 0.9, "broken_base": 0.5},
        "participation": 3.5,
        "entropy": 4.0,
        "changed": 8,
        "top": [
            {"entry": text, "base": 1.0, "broken": 0.0, "delta": 0.5, "merged": 0.5, "rank": 1}
        ],
    }
    channel = {"positions": [600.0, 300.0, 310.0], "peak": 600.0, "ratio": 0.14}
    excess, mean = {"q05": -0.1, "q50": 0.0, "q95": 0.1}, {"q05": 0.9, "q50": 1.0, "q95": 1.1}
    null = {"excess_kl": 0.05, "null": excess, "null_naive": mean}
    stratum = {
        "name": text,
        "tokens": 100,
        "mean_kl": 1.2,
        "expected_kl": 1.0,
        **null,
        "p": 0.2,
        "p_corrected": 0.4,
    }
    group = {
        "name": text,
        "tokens": 30,
        "words": 4,
        "mean_kl": 1.7,
        "others_kl": 1.3,
        "same_documents_kl": 1.5,
        "documents_nats": 0.1,
        **null,
        "null_document": None,
        "p_naive": 0.008,
        "p_within": 0.29,
        "p_document": None,
        "p_corrected": 0.29,
        "in_top": 0.4,
        "in_text": 0.25,
        "in_one_document": 1.0,
        "document": text,
        "holds": False,
    }
    token = {"kl_broken": 5.0, "context": text, "token": text, "word": text, "title": text}
    explain = {
        "patches": [f"{text}.safetensors"],
        "corpus": corpus,
        "geometry": {"lines": [line], "of": 1},
        "topk_curve": {
            "nll": nll,
            "tokens": 500,
            "points": [point, {**point, "k": 2, "random": None, "random_range": None}],
        },
        "channel": {
            "channels": [
                {
                    "channel": 3,
                    "written_by": text,
                    "written_at": 1,
                    "states": dict.fromkeys(STATES, channel),
                }
            ],
            "attention_sink": {
                "states": {state: [0.5, 0.1] for state in STATES},
                "uniform": 0.02,
                "windows": 2,
            },
        },
        "influence": {
            "mean_kl": {"broken": 0.7},
            "documents_rule": text,
            "documents_seen": 3,
            "top": [token],
            "top_by_document": {text: 1},
            "permutations": 199,
            "groups": [group],
            "documents": [stratum, stratum],
            "frequencies": [stratum],
        },
        "behaviour": {
            "summary": {},
            "generations": [{"prompt": text, **dict.fromkeys(STATES, text)}],
        },
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
    trace = {
        "prompt": text,
        "tokens": [text, "b"],
        "subject_range": [0, 1],
        "answer": text,
        "metric": "probability",
        "p_clean": 0.9,
        "p_corrupt": 0.1,
        "state": [[0.8, 0.2], [0.3, 0.9]],
        "severed": [[0.5, 0.2], [0.3, 0.9]],
    }
    average = {
        "facts": 5,
        "skipped": 1,
        "p_clean": 0.9,
        "p_corrupt": 0.1,
        "places": ["last subject token", text],
        "facts_with_place": [5, 0],
        "mlp": [[0.4, None], [0.1, None]],
        "ci": {"mlp": [[[0.3, 0.5], None], [[0.0, 0.2], None]]},
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
    return {
        "edit": {**model, **edit},
        "edits": {**model, "edits": [{**edit, "name": text}], "published": [text]},
        "conditioning": {
            **model,
            "conditioning": [conditioning, {**conditioning, "position_zero": False}],
            "published": [text],
        },
        "trace": {**model, **trace},
        "average": {**model, "average": average},
        "demo": {**model, "find": find, "prompts": [text], "states": states, "facts": 331},
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
        "repair": {
            **model,
            "injury": f"{text}.safetensors",
            "patch": f"{text}.safetensors",
            **repair,
        },
        "recipe": {
            **model,
            "title": text,
            "figures": [{"figure": text, "published": 0.9, "measured": 0.8}],
            "repair": repair,
        },
        "explain": {**model, **explain},
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
