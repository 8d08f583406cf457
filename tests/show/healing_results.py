"""One small result each of repair, explain and demo, with every text in it chosen by the test."""

from __future__ import annotations

from made_results import edit_result

from surgeon.anatomy import Entry, Region, Site
from surgeon.explain import (
    Channel,
    ChannelState,
    ChannelTrace,
    Continuations,
    Curve,
    CurvePoint,
    EntryChange,
    Explanation,
    Geometry,
    Influence,
    Line,
    SideBySide,
    Sink,
    Stratum,
    TokenRow,
    WordGroup,
    Written,
)
from surgeon.find import FindResult
from surgeon.find.find import CriticalEntry, CriticalSet, SearchedHeights, SetDamage
from surgeon.measure import Controls, ThreeStates
from surgeon.repair import (
    ControlRepair,
    Divergence,
    GraftChoice,
    HeldOut,
    Look,
    RepairResult,
    WindowCounts,
)
from surgeon.result import CorpusRecord, Provenance
from surgeon.studies.demo import Demo, State

STATES = ("base", "broken", "patched")
SITE = Site.parse("L0.mlp.down")
NLL = ThreeStates(0.7, 1.4, 0.8)
BAND = {"q05": -0.1, "q50": 0.0, "q95": 0.1}


def provenance(text: str) -> Provenance:
    corpus = CorpusRecord(text, 500, True, 2, 250)
    return Provenance(text, "0", corpus, {}, 0, "1", f"surgeon repair '{text}'")


def a_repair(text: str = "text") -> RepairResult:
    return RepairResult(
        method="graft+distil",
        target_rows={"L0.mlp.down": [3]},
        windows=WindowCounts(8, 2, 2),
        nll=NLL,
        kl=Divergence(0.7, 0.1),
        control=ControlRepair(0.05, 1.365, {}),
        held_out=HeldOut(text, True, NLL),
        recovered_fitted=0.9,
        delta_norm=1.0,
        row_norm=2.0,
        cosine_to_row=0.1,
        patch_bytes=5576,
        seconds=1.0,
        steps=50,
        kept_step=25,
        curve=[
            Look(0, 0.2, 1.0, 0.5),
            Look(25, 0.1, 0.8, 0.85),
            Look(50, 0.11, 0.81, 0.84),
        ],
        graft={"L0.mlp.down": GraftChoice(1.0, 0.01, 0.8)},
        provenance=provenance(text),
    )


def a_story(text: str = "text", p_corrected: float = 0.29) -> WordGroup:
    return WordGroup(
        name=text,
        tokens=30,
        words=4,
        mean_kl=1.7,
        others_kl=1.3,
        same_documents_kl=1.5,
        documents_nats=0.1,
        excess_kl=0.05,
        null=BAND,
        null_naive={"q05": 0.9, "q50": 1.0, "q95": 1.1},
        null_document=None,
        p_naive=0.008,
        p_within=p_corrected,
        p_document=None,
        p_corrected=p_corrected,
        in_top=0.4,
        in_text=0.25,
        in_one_document=1.0,
        document=text,
    )


def an_explanation(
    text: str = "text",
    story: WordGroup | None = None,
    tokens: dict[str, list[object]] | None = None,
) -> Explanation:
    line = Line(
        region=Region(SITE, 3, None),
        norms={"base": 2.0, "broken": 1.0, "delta": 1.5, "merged": 2.1},
        cosines={"delta_base": 0.1, "delta_broken": 0.0, "merged_base": 0.9, "broken_base": 0.5},
        participation=3.5,
        entropy=4.0,
        changed=8,
        top=[EntryChange(Entry(SITE, 3, 5), 1.0, 0.0, 0.5, 0.5, 1)],
        ablated=[],
        injured=0,
    )
    points = [
        CurvePoint(1, 0.3, 0.01, (0.0, 0.02), 0.4),
        CurvePoint(2, 0.8, None, None, None),
    ]
    channel = ChannelState([1.0], [1.0], [1.0], [600.0, 300.0, 310.0], 600.0, 0.14)
    naive = {"q05": 0.9, "q50": 1.0, "q95": 1.1}
    stratum = Stratum(text, 100, 1.2, 1.0, 0.05, BAND, naive, 0.2, 0.4)
    row = TokenRow(
        window=0,
        position=1,
        token_id=2,
        token=text,
        word=text,
        context=text,
        document=0,
        title=text,
        word_count=1,
        token_count=1,
        kl_broken=5.0,
        nll_base=0.1,
        nll_broken=5.1,
    )
    return Explanation(
        patches=[f"{text}.safetensors"],
        geometry=Geometry([line], 1),
        topk_curve=Curve(NLL, 500, points),
        no_topk_curve=None,
        channel=ChannelTrace(
            [Channel(3, SITE, 1, dict.fromkeys(STATES, channel))],
            None,
            Sink({state: [0.5, 0.1] for state in STATES}, 0.02, 2),
            None,
        ),
        influence=Influence(
            mean_kl={"broken": 0.7},
            documents_rule=text,
            documents_seen=3,
            top=[row],
            top_by_document={text: 1},
            permutations=199,
            groups=[a_story(text) if story is None else story],
            documents=[stratum, stratum],
            frequencies=[stratum],
        ),
        behaviour=SideBySide(
            dict.fromkeys(STATES, Written(0.1, 0.2, 0.3, 0.4)),
            [Continuations(text, text, text, text)],
        ),
        tokens=tokens,
        provenance=provenance(text),
    )


def a_finding(text: str = "text") -> FindResult:
    entry = CriticalEntry(Entry(SITE, 3, 5), -2.5, 0.4, 7)
    damage = SetDamage(
        joint_nats=0.75,
        single_nats=[0.5, 0.25],
        leave_one_out_nats=[0.1, 0.2],
        ci95=(0.6, 0.9),
        p_value=0.0476,
        restored_nats=None,
        tokens=500,
        full_nats=1.0,
        full_size=8,
    )
    one = CriticalSet(
        channels=[3],
        heights=[[2.0, 9.0, 8.0]],
        agreement=1.0,
        entries=[entry, CriticalEntry(Entry(SITE, 3, 6), 2.0, 0.2, 9)],
        damage=damage,
        controls=Controls([0.001 * i for i in range(-9, 11)], "entries"),
        vital=True,
        criteria="enough",
    )
    heights = SearchedHeights(4.0, [5.0, 12.0, 11.0], 0.7)
    return FindResult([one], [], heights, provenance=provenance(text))


def a_demo(text: str = "text") -> Demo:
    states = [
        State("intact", 0.7, 331, True, [f"a b {text}"]),
        State("without the set", 1.5, 300, False, [f"a c {text}"]),
        State("put back", 0.7, 331, True, [f"a b {text}"]),
    ]
    return Demo(
        find=a_finding(text),
        repair=a_repair(text),
        no_repair=None,
        edit=edit_result(text),
        no_edit=None,
        facts=331,
        prompts=[text],
        states=states,
        provenance=provenance(text),
    )
