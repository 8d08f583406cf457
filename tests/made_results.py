"""One small result of each kind, made by hand, with every text in it chosen by the test."""

from __future__ import annotations

from dataclasses import replace

from made_cells import cell_results

from surgeon.anatomy import Entry, Region, Site
from surgeon.edit import FactForecast, LayerForecast, Preflight, Radar, Step, Touched
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
)
from surgeon.explain import Written as WrittenTexts
from surgeon.find import (
    Candidate,
    CriticalSet,
    Detection,
    ExpertProfile,
    FindResult,
    Link,
    Rejection,
    Suspect,
    Verification,
)
from surgeon.find.detect import Contribution, Heights
from surgeon.find.index import AGREES, Check, Published
from surgeon.find.results import CriticalEntry, SearchedHeights, SetDamage
from surgeon.measure import (
    BeforeAfter,
    Behaviour,
    Behaviours,
    BehaviourState,
    Control,
    Controls,
    FreeText,
    Scorecard,
    ScoredFact,
    Share,
    ThreeStates,
)
from surgeon.measure.scorecard import Says
from surgeon.quantize import (
    ActivationConfig,
    ActivationNLL,
    ActivationRow,
    ActivationTable,
    MatrixReport,
    QuantizeConfig,
    RoundedWeights,
    Row,
    SmoothedCount,
    TensorTypes,
)
from surgeon.repair import (
    ControlRepair,
    Divergence,
    GraftChoice,
    Look,
    RepairResult,
    WindowCounts,
)
from surgeon.repair import HeldOut as HeldOutText
from surgeon.result import CorpusRecord, Provenance, Result
from surgeon.studies.ablate import Injury
from surgeon.studies.apply import Applied
from surgeon.studies.demo import Demo, State
from surgeon.studies.edit import EditResult
from surgeon.studies.edit_layers import LayerRanking, LayerTrial
from surgeon.studies.edit_many import EditsResult
from surgeon.studies.export import Exported
from surgeon.studies.holdout import HeldOut
from surgeon.studies.index import Index
from surgeon.studies.index_verify import IndexCheck
from surgeon.studies.measure import Generation, Measurement, TaskAccuracy
from surgeon.studies.quantize import Base, QuantizeResult
from surgeon.studies.quantized_folder import Written
from surgeon.studies.recipes.conditioning import Conditioned, Conditioning
from surgeon.studies.recipes.edits import EditsRecipe, NamedEdit
from surgeon.studies.recipes.repair import Figure, RepairRecipe
from surgeon.studies.sites import SiteList, SiteRecord
from surgeon.studies.sweep import FailedTask, PlannedTask, SweepResult
from surgeon.studies.sweep_table import SweepTable
from surgeon.studies.undo import Undone
from surgeon.trace import Corruption, LayerEffect, RestoredSite, TraceAverage, TraceResult
from surgeon.trace.result import AverageIntervals, TraceIntervals

DOWN = Site(0, "mlp.down")
STATES = ("base", "broken", "patched")
NLL = ThreeStates(0.7, 1.4, 0.8)
BAND = {"q05": -0.1, "q50": 0.0, "q95": 0.1}


def made_results(text: str = "text") -> dict[str, Result]:
    """Results by kind; names of models, files, prompts, reasons and commands are `text`."""
    results = (
        find_result(text),
        detection(text),
        verification(text),
        injury(text),
        measurement(text),
        site_list(text),
        edit_result(text),
        edits_result(text),
        layer_ranking(text),
        trace_result(text),
        trace_average(text),
        quantize_result(text),
        repair_result(text),
        explanation(text),
        demo(text),
        repair_recipe(text),
        edits_recipe(text),
        conditioning(text),
        swept(text),
        sweep_table(text),
        Applied([text], text, provenance=provenance(text, "apply")),
        Undone(text, text, provenance=provenance(text, "undo")),
        Exported(text, text, text, 4, [text], provenance=provenance(text, "export")),
        Index(text, [published_weight(text)], provenance=provenance(text, "index")),
        index_check(text),
        *cell_results(text, provenance, controls(text)),
    )
    return {one.kind: one for one in results}


def provenance(text: str, verb: str) -> Provenance:
    return Provenance(
        model=text,
        fingerprint="0" * 64,
        corpus=CorpusRecord(text, 500, True, 2, 250),
        settings={"text": text, "seed": 0},
        seed=0,
        surgeon="0.1",
        command=f"surgeon {verb} '{text}'",
    )


def controls(text: str) -> Controls:
    return Controls([0.001 * i for i in range(-9, 11)], text)


def find_result(text: str = "text") -> FindResult:
    entries = [CriticalEntry(Entry(DOWN, 3, col), -2.5, 0.4, 7) for col in (5, 6)]
    damage = SetDamage(0.75, [0.5, 0.25], [0.1, 0.2], (0.6, 0.9), 0.0476, None, 500, 1.0, 8)
    critical = CriticalSet(
        [Region(DOWN, 3, 5), Region(DOWN, 3, 6)],
        2,
        [3],
        [[2.0, 9.0, 8.0]],
        1.0,
        entries,
        damage,
        controls(text),
        True,
        True,
        text,
        4,
    )
    row = Region(DOWN, 4, None)
    elsewhere = replace(critical, parts=[row], size=48, channels=[], heights=[], agreement=None)
    return FindResult(
        [critical, elsewhere],
        [Rejection(text, text, height=12.0, entries=8, joint_nats=0.04)],
        SearchedHeights(4.0, [5.0, 12.0, 11.0], 0.7),
        [Suspect(row, "row", -0.1, 0.5, 0.7)],
        [Link(1, 2, 3, (0.75, 0.7), 0.8, 0.05)],
        [ExpertProfile(0, 1, 9.0, 3, 0.25, 0.5, True)],
        provenance=provenance(text, "find"),
    )


def detection(text: str = "text") -> Detection:
    strongest = Contribution(Entry(DOWN, 3, 5), 0.2, -0.4, 9.0)
    return Detection(
        [Candidate(3, 0, 12.0, [2.0, 12.0, 11.0], 1.0, 1.0, (strongest,))],
        [Rejection(text, text, height=5.0, persistence=0.2)],
        Heights(4.0, [5.0, 12.0, 11.0]),
        provenance=provenance(text, "find"),
    )


def verification(text: str = "text") -> Verification:
    state = BehaviourState(0.3, 0.1, [Behaviour(text, f"{text} {text}", 0.1)])
    return Verification(
        at=[Region(DOWN, 3, 5), Region(DOWN, 3, None)],
        base_nll=0.7,
        tokens=500,
        single_nats=[0.5, 0.25],
        joint_nats=0.75,
        leave_one_out_nats=[0.1, 0.2],
        ci95=(0.6, 0.9),
        p_value=0.0476,
        restored_nats=0.1,
        controls=controls(text),
        windows=4,
        vital=True,
        close=True,
        criteria=text,
        behaviour=Behaviours(0.7, 0.5, state, state),
        provenance=provenance(text, "verify"),
    )


def injury(text: str = "text") -> Injury:
    return Injury(text, 2, [text], provenance=provenance(text, "ablate"))


def measurement(text: str = "text") -> Measurement:
    return Measurement(
        patches=[text],
        at=[],
        mode=None,
        nll=0.8,
        tokens=500,
        kl_from_base=0.1,
        top1_agreement=0.9,
        base_nll=0.7,
        generations=[Generation(text, text, f"{text} {text}")],
        loop_rate=0.0,
        tasks={text: TaskAccuracy(0.5, 0.4)},
        provenance=provenance(text, "measure"),
    )


def quantize_result(text: str = "text") -> QuantizeResult:
    """The four methods; `table` can be replaced by a sweep's, with weights None."""
    nll = {"rtn": None, "clip": 0.9, "restore": 1.1, "holdout": 0.8}
    rows = [
        Row(method, 4, text, 4.125, value, value and 0.1, 0.9, {text: 0.5})
        for method, value in nll.items()
    ]
    report = MatrixReport((32, 48), 4, 12, 2.5, 3, 1, 0.01, True, 4.125)
    entry = Entry(DOWN, 3, 5)
    treatment = ActivationRow("token", "holdout", 8, None, None, "norms", 0.01, 0.85, 0.1, 0.9)
    return QuantizeResult(
        8,
        2,
        HeldOut([entry], text),
        Base(0.7, {text: 0.6}),
        rows,
        RoundedWeights(QuantizeConfig(), [entry], {DOWN: report}),
        ActivationTable(
            ActivationConfig(),
            QuantizeConfig(),
            0.5,
            [entry],
            8,
            2,
            ActivationNLL(0.7, 0.8),
            {"norms": SmoothedCount(2, 0)},
            [treatment],
        ),
        Written("sidecar", text, 1000, {DOWN: report, Site(1, "mlp.down"): None}),
        TensorTypes({text: (DOWN,)}, "q8_0"),
        provenance=provenance(text, "quantize"),
    )


def site_list(text: str = "text") -> SiteList:
    site = SiteRecord(DOWN, (32, 48), text, text, text, text, [Site(None, "embed")])
    return SiteList(text, 1, [site], provenance=provenance(text, "sites"))


def edit_parts(text: str) -> dict[str, object]:
    """The fields that one edit and several have in common."""
    forecast = LayerForecast(DOWN, 0.23, 0.0081, 1.0, 100.0, 10.0)
    fact = FactForecast(text, text, [text], False, [text])
    share = Share(1, 0.0, 1.0, (1.0, 1.0), -0.9, 0.9)
    free = FreeText(text, text, f"{text} {text}")
    scored = ScoredFact(text, text, text, BeforeAfter(0.0, 0.99), Says(False, True), [free])
    both = BeforeAfter(0.5, 0.25)
    return {
        "method": text,
        "preflight": Preflight([forecast], [fact]),
        "scorecard": Scorecard(share, share, share, 4, 3, both, both, both, both, [scored]),
        "controls": [Control(text, (text, 0.9), (f"{text} {text}", 0.4))],
        "radar": Radar(500, 0.01, 0.5, 0.001, [Touched(0, 3, text, text, 0.5, 0.2)]),
        "seconds": 1.5,
    }


def edit_result(text: str = "text") -> EditResult:
    return EditResult(**edit_parts(text), provenance=provenance(text, "edit"))


def edits_result(text: str = "text") -> EditsResult:
    steps = [Step(text, text, True, 0, 0.7, 0.2, 0.09), Step(text, text, True, 1, 0.9, 0.4, 0.1)]
    about = provenance(text, "edit many")
    return EditsResult(**edit_parts(text), steps=steps, stopped=text, provenance=about)


def layer_ranking(text: str = "text") -> LayerRanking:
    trials = [
        LayerTrial(1, 0.9, (0.8, 1.0), 0.1, 0.4, (0.3, 0.5)),
        LayerTrial(0, 0.85, (0.7, 0.95), None, None, None),
        LayerTrial(2, 0.2, (0.1, 0.3), 0.5, 0.1, (0.0, 0.2)),
    ]
    return LayerRanking(text, 2, trials, provenance=provenance(text, "edit layers"))


def trace_result(text: str = "text") -> TraceResult:
    state, severed = [[0.8, 0.2], [0.3, 0.9]], [[0.5, 0.2], [0.3, 0.9]]
    spans = [[(0.7, 0.9), (0.1, 0.3)], [(0.2, 0.4), (0.8, 1.0)]]
    best = [RestoredSite(1, 1, text, 0.9)]
    return TraceResult(
        prompt=text,
        tokens=[text, "b"],
        bos=False,
        subject_range=(0, 1),
        answer=text,
        versus=None,
        metric="probability",
        p_clean=0.9,
        p_corrupt=0.1,
        state=state,
        mlp=None,
        attn=None,
        severed=severed,
        ci=TraceIntervals(text, (0.0, 0.2), state=spans, severed=spans),
        best={"state": best, "severed": best},
        corruption=Corruption("noise", 0.1, text, 3.0, None, 2, 0),
        window=1,
        sever="mlp",
        warnings=[text],
        provenance=provenance(text, "trace"),
    )


def trace_average(text: str = "text") -> TraceAverage:
    spans = [[(0.3, 0.5), None], [(0.0, 0.2), None]]
    return TraceAverage(
        facts=5,
        skipped=1,
        metric="probability",
        p_clean=0.9,
        p_corrupt=0.1,
        places=["last subject token", text],
        facts_with_place=[5, 0],
        state=None,
        mlp=[[0.4, None], [0.1, None]],
        attn=None,
        severed=None,
        ci=AverageIntervals(text, (0.8, 1.0), (0.0, 0.2), mlp=spans),
        layers_by_mlp=[LayerEffect(0, 0.4, (0.3, 0.5)), LayerEffect(1, 0.1, (0.0, 0.2))],
        corruption=Corruption("noise", 0.1, text, 3.0, None, 2, 0),
        window=1,
        sever=None,
        warnings=[text],
        provenance=provenance(text, "trace average"),
    )


def repair_result(text: str = "text") -> RepairResult:
    return RepairResult(
        method="graft+distil",
        target_rows={"L0.mlp.down": [3]},
        windows=WindowCounts(8, 2, 2),
        nll=NLL,
        kl=Divergence(0.7, 0.1),
        control=ControlRepair(0.05, 1.365, {}),
        held_out=HeldOutText(text, True, NLL),
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
        provenance=provenance(text, "repair"),
    )


def word_group(text: str = "text", p_corrected: float = 0.29) -> WordGroup:
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


def explanation(
    text: str = "text",
    story: WordGroup | None = None,
    tokens: dict[str, list[object]] | None = None,
) -> Explanation:
    line = Line(
        region=Region(DOWN, 3, None),
        norms={"base": 2.0, "broken": 1.0, "delta": 1.5, "merged": 2.1},
        cosines={"delta_base": 0.1, "delta_broken": 0.0, "merged_base": 0.9, "broken_base": 0.5},
        participation=3.5,
        entropy=4.0,
        changed=8,
        top=[EntryChange(Entry(DOWN, 3, 5), 1.0, 0.0, 0.5, 0.5, 1)],
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
            [Channel(3, DOWN, 1, dict.fromkeys(STATES, channel))],
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
            groups=[word_group(text) if story is None else story],
            documents=[stratum, stratum],
            frequencies=[stratum],
        ),
        behaviour=SideBySide(
            dict.fromkeys(STATES, WrittenTexts(0.1, 0.2, 0.3, 0.4)),
            [Continuations(text, text, text, text)],
        ),
        tokens=tokens,
        provenance=provenance(text, "explain"),
    )


def demo(text: str = "text") -> Demo:
    states = [
        State("intact", 0.7, 331, True, [f"a b {text}"]),
        State("without the set", 1.5, 300, False, [f"a c {text}"]),
        State("put back", 0.7, 331, True, [f"a b {text}"]),
    ]
    return Demo(
        find=find_result(text),
        repair=repair_result(text),
        no_repair=None,
        edit=edit_result(text),
        no_edit=None,
        facts=331,
        prompts=[text],
        states=states,
        provenance=provenance(text, "demo"),
    )


def repair_recipe(text: str = "text") -> RepairRecipe:
    figures = [Figure(text, 0.9, 0.8)]
    about = provenance(text, "run")
    return RepairRecipe(f"{text}, repaired", figures, repair_result(text), provenance=about)


def edits_recipe(text: str = "text") -> EditsRecipe:
    edits = [NamedEdit(text, edit_result(text))]
    return EditsRecipe(f"{text}, edited", edits, [text], provenance=provenance(text, "run"))


def conditioning(text: str = "text") -> Conditioning:
    first = Conditioned(2.5, 0.01, text, True, 0.5, 0.1, 100.0, 0.9, 0.9, 1, 0.01)
    second = replace(first, position_zero=False, update_norm_ratio=0.1)
    return Conditioning(text, [first, second], 3, [text], provenance=provenance(text, "run"))


def swept(text: str = "text") -> SweepResult:
    failed, missing = FailedTask("1", text, text), PlannedTask("1", text)
    about = provenance(text, "sweep")
    return SweepResult(text, text, "local", 3, 1, 1, [failed], [missing], provenance=about)


def sweep_table(text: str = "text") -> SweepTable:
    rows = [{text: text, "nll": 0.5, "model": text}, {text: None, "nll": "inf", "model": text}]
    about = provenance(text, "sweep table")
    return SweepTable(text, 0, [text, "nll", "model"], rows, provenance=about)


def published_weight(text: str) -> Published:
    return Published(text, 0, 3, 5, -1.5, text, text, text, text)


def index_check(text: str = "text") -> IndexCheck:
    about = vars(published_weight(text))
    check = Check(
        **about, measured=-1.5, rank_abs=1, shape=(32, 48), dtype="bfloat16", verdict=AGREES
    )
    return IndexCheck([check], provenance=provenance(text, "index verify"))
