"""The paper's tables and figure, and what its readers ask: which runs each needs, and what it tells of them."""

from __future__ import annotations

import dataclasses
import lzma
import math
import statistics
from collections.abc import Callable

from mla_ext.multimodal import checkpoint

from . import figures
from .measures import BINS
from .methods import ALPHA, METHODS
from .protocol import MAIN, Evidence, modalities_of, name_of
from .ranking import ranking
from .report import Table, correlation, difference, numbers, percent
from .runs import Run
from .untuned import table0, tolerance

MISSING_METHODS = ("concat", "late", "qmf", "mmin", "alternating", "released", "mla")
CHOSEN_MISSING = ("late", "qmf", "alternating", "mla")  # the best of them
MLA = tuple(name for name in METHODS if name.startswith("mla"))
RATES = (0.0, 0.2, 0.4, 0.6, 0.8)
CURVE_ALPHAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e3)
CURVE_FORGETS = (1e-3, 1e-2, 1e-1, 3e-1)


# ---- The paper's tables and figure -----------------------------------------------------------------------------------


def table1(e: Evidence) -> None:
    """Methods × datasets: the fused accuracy, and each modality's."""
    e.tune(MAIN)
    e.complete([r for source in e.sources for m in MAIN for r in e.final(source, m)], "table 1")
    fused = {(source, m): e.accuracies(e.final(source, m)) for source in e.sources for m in MAIN}
    rows = []
    for m in MAIN:
        cells = []
        for source in e.sources:
            cells += [percent(fused[source, m])]
            cells += ["-" if m == "alternating" else difference(fused[source, m], fused[source, "alternating"])]
        rows.append([METHODS[m].title, *cells])
    cells = []
    for source in e.sources:
        best = fused[source, e.best_of(source, MLA)]
        cells += [percent(best), difference(best, fused[source, "alternating"])]
    rows.append([f"MLA, the best of these {len(MLA)} on validation", *cells])
    columns = ["method"]
    for source in e.sources:
        columns += [name_of(source), "against alternation"]
    tables = [Table("Test accuracy of all modalities together", columns, rows)]

    for source in e.sources:
        rows = []
        for m in MAIN:
            runs = e.final(source, m)
            setting = f"lr {runs[0].lr:g}, weight decay {runs[0].weight_decay:g}"
            setting += "" if METHODS[m].own is None else f", {METHODS[m].own} {runs[0].own:g}"
            each = [percent(e.values(runs, "modalities", modality)) for modality in modalities_of(source)]
            drops = [
                None if last is None else best - last
                for best, last in zip(e.values(runs, "validation"), e.values(runs, "last_validation"), strict=True)
            ]
            together = [percent(fused[source, m]), percent(e.values(runs, "macro_f1"))]
            together += [percent(e.values(runs, "validation")), percent(drops)]
            rows.append([METHODS[m].title, setting, *each, *together, METHODS[m].unimodal])
        columns = ["method", "chosen", *modalities_of(source), "together", "macro F1"]
        columns += ["validation", "lost there after the best epoch", "one modality alone is"]
        tables.append(Table(f"{name_of(source)}: each modality alone", columns, rows))
    best = "; ".join(f"{name_of(source)}: {METHODS[e.best_of(source, MLA)].title}" for source in e.sources)
    text = f"""{e.protocol} FiLM and BiGated are defined for two modalities; `methods/` says what is made of three. The
    last row had {len(MLA)} times the trials of the others ({best})."""
    e.write("table1", "Table 1: methods and datasets", text, tables)
    figures.dots(
        {name_of(s): {METHODS[m].title: fused[s, m] for m in MAIN} for s in e.sources},
        METHODS["alternating"].title,
        e.out / "table1.png",
    )


def table2(e: Evidence) -> None:
    """Missing modalities, in training and test alike."""
    e.tune(MISSING_METHODS)

    def runs(source: str, method: str, rate: float) -> list[Run]:
        return e.final(source, method, missing=rate)

    e.complete([r for s in e.sources for m in MISSING_METHODS for rate in RATES for r in runs(s, m, rate)], "table 2")
    tables = []
    for source in e.sources:
        dropped = [statistics.mean(e.values(runs(source, "concat", rate), "dropped")) for rate in RATES]
        columns = ["method", *(f"rate {rate:.0%} (drops {d:.0%})" for rate, d in zip(RATES, dropped, strict=True))]
        columns += [f"{METHODS['mla'].title} against it at {RATES[-1]:.0%}"]
        mla = e.accuracies(runs(source, "mla", RATES[-1]))
        rows = []
        for m in MISSING_METHODS:
            accuracies = [e.accuracies(runs(source, m, rate)) for rate in RATES]
            against = "-" if m == "mla" else difference(mla, accuracies[-1])
            rows.append([METHODS[m].title, *map(percent, accuracies), against])
        tables.append(Table(name_of(source), columns, rows))
    e.tune(CHOSEN_MISSING, RATES[-1])
    again = {(s, m): e.over_seeds(e.chosen(s, m, RATES[-1])) for s in e.sources for m in CHOSEN_MISSING}
    e.complete([run for runs in again.values() for run in runs], "table 2, settings chosen at the rate")
    rows = []
    for m in CHOSEN_MISSING:
        found = {s: e.accuracies(again[s, m]) for s in e.sources}
        mla = {s: e.accuracies(again[s, "mla"]) for s in e.sources}
        cells = [[percent(found[s]), "-" if m == "mla" else difference(mla[s], found[s])] for s in e.sources]
        rows.append([METHODS[m].title, *(cell for pair in cells for cell in pair)])
    columns = [what for s in e.sources for what in (name_of(s), f"{METHODS['mla'].title} against it")]
    tables.append(Table(f"Settings chosen at {RATES[-1]:.0%}", ["method", *columns], rows))
    text = f"""{e.protocol} Settings are those chosen for complete data, and in the last table those chosen, in as many
    trials, at the highest rate. At rate r each modality of each sample is
    dropped with probability r, in all splits, and what is missing differs by seed; a sample that would lose all it has
    keeps one of them, so the share that is really dropped, given in the head, is lower (with two modalities and
    r = 80 % it is 48 %)."""
    e.write("table2", "Table 2: missing modalities, in training and in test", text, tables)


def table3(e: Evidence) -> None:
    """Ablation: projection × dynamic fusion."""
    parts = [(m, fusion) for m in ("alternating", "mla") for fusion in ("mean", "own")]
    e.tune(("alternating", "mla"))
    e.complete([r for s in e.sources for m, fusion in parts for r in e.final(s, m, fusion=fusion)], "table 3")
    rows = []
    for m, fusion in parts:
        cells = [percent(e.accuracies(e.final(s, m, fusion=fusion))) for s in e.sources]
        rows.append(["yes" if m == "mla" else "no", "no" if fusion == "mean" else "yes", *cells])

    def effect(title: str, a: tuple[str, str], b: tuple[str, str]) -> list[str]:
        return [title] + [
            difference(*(e.accuracies(e.final(s, m, fusion=fusion)) for m, fusion in (a, b))) for s in e.sources
        ]

    effects = [
        effect("the projection, with the mean of the logits", ("mla", "mean"), ("alternating", "mean")),
        effect("the projection, with dynamic fusion", ("mla", "own"), ("alternating", "own")),
        effect("dynamic fusion, without the projection", ("alternating", "own"), ("alternating", "mean")),
        effect("dynamic fusion, with the projection", ("mla", "own"), ("mla", "mean")),
    ]
    names = [name_of(s) for s in e.sources]
    tables = [
        Table("Test accuracy", ["projection", "dynamic fusion", *names], rows),
        Table("What each part adds", ["part", *names], effects),
    ]
    alphas = ", ".join(f"{name_of(s)} {e.chosen(s, 'mla').own:g}" for s in e.sources)
    text = f"""{e.protocol} Without dynamic fusion the logits are averaged, also where the epoch is chosen. The
    projection is that of the alpha chosen for MLA: {alphas}."""
    e.write("table3", "Table 3: projection and dynamic fusion", text, tables)


GAP_METHODS = ("concat", "alternating", "mla")


def figure3(e: Evidence) -> None:
    """The modality gap of the head's inputs."""
    e.tune(GAP_METHODS)
    e.complete([r for s in e.sources for m in GAP_METHODS for r in e.final(s, m)], "figure 3")
    tables = []
    for what, measure in (("Distance of the centroids", "distance"), ("Separability, %", "separability")):
        rows = []
        for m in GAP_METHODS:
            cells = []
            for s in e.sources:
                values = e.values(e.final(s, m), "gap", measure)
                if measure == "distance":
                    found = numbers(values)
                    mean = f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}" if len(found) > 1 else "-"
                    cells.append(mean)
                else:
                    cells.append(percent(values))
            rows.append([METHODS[m].title, *cells])
        tables.append(Table(what, ["method", *(name_of(s) for s in e.sources)], rows))
    text = f"""{e.protocol} Features of the validation split, scaled to length 1. Distance: between the centroids of two
    modalities, the mean over pairs. Separability: how often a linear classifier, trained on one half, tells on the
    other which modality a feature is of. The picture shows the first two principal components of the features of
    seed 0."""
    e.write("figure3", "Figure 3: the modality gap", text, tables)
    figures.gap([[e.chosen(s, m) for m in GAP_METHODS] for s in e.sources], e.out / "figure3.png")


# ---- What readers ask ------------------------------------------------------------------------------------------------


def order(e: Evidence) -> None:
    """Does the order of the modalities matter?"""
    methods = ("alternating", "mla")
    e.tune((*methods, "late"))
    e.complete([r for s in e.sources for r in e.final(s, "late")], "order: how strong each modality is")

    def turns(source: str) -> dict[str, str]:
        given = modalities_of(source)
        late = e.final(source, "late")
        known = {m: numbers(e.values(late, "validation_modalities", m)) for m in given}
        strength = {m: statistics.mean(values) if values else 0.0 for m, values in known.items()}
        weak_first = sorted(given, key=strength.__getitem__)
        named = {"given": given, "reversed": given[::-1], "weak to strong": weak_first}
        named["strong to weak"] = weak_first[::-1]
        texts = {name: "given" if tuple(o) == given else ",".join(o) for name, o in named.items()}
        return texts | {"random, anew each epoch": "random"}

    runs = {
        (s, m, name): e.final(s, m, order=text) for s in e.sources for m in methods for name, text in turns(s).items()
    }
    e.complete([r for group in runs.values() for r in group], "order")
    tables = []
    for s in e.sources:
        rows = []
        for name, text in turns(s).items():
            cells = []
            for m in methods:
                accuracies = e.accuracies(runs[s, m, name])
                cells += [percent(accuracies), difference(accuracies, e.accuracies(runs[s, m, "given"]))]
            shown = ", ".join(modalities_of(s)) if text == "given" else text.replace(",", ", ")
            rows.append([name, "" if text == "random" else shown, *cells])
        columns = ["order", "that is", "Alternation alone", "against given", "MLA", "against given"]
        tables.append(Table(name_of(s), columns, rows))
    text = f"{e.protocol} How strong a modality is, is its own validation accuracy in late fusion."
    e.write("order", "Does the order of the modalities matter?", text, tables)


def curves(e: Evidence) -> None:
    """How much do alpha and forget matter?"""
    e.tune(("mla", "alternating"))

    def alphas(s: str) -> list[list[Run]]:
        return [e.final(s, "mla", own=alpha) for alpha in CURVE_ALPHAS]

    def forgets(s: str) -> list[list[Run]]:
        """At the lr that is chosen for MLA, so that the curve begins at MLA with the default alpha."""
        start = dataclasses.replace(e.chosen(s, "mla"), own=ALPHA)
        rest = [dataclasses.replace(start, method="mla-forget", own=forget) for forget in CURVE_FORGETS]
        return [e.over_seeds(run) for run in (start, *rest)]

    plain = {s: e.final(s, "alternating") for s in e.sources}
    groups = [group for s in e.sources for group in (*alphas(s), *forgets(s), plain[s])]
    e.complete([r for group in groups for r in group], "curves")
    names = [name_of(s) for s in e.sources]
    tables, drawn = [], {}
    for title, values, runs in (
        ("alpha", CURVE_ALPHAS, alphas),
        (f"forget, with alpha {ALPHA}", (0.0, *CURVE_FORGETS), forgets),
    ):
        found = {s: [e.accuracies(group) for group in runs(s)] for s in e.sources}
        rows = [[f"{v:g}", *(percent(found[s][i]) for s in e.sources)] for i, v in enumerate(values)]
        rows.append(["no projection", *(percent(e.accuracies(plain[s])) for s in e.sources)])
        tables.append(Table(title, [title.partition(",")[0], *names], rows))
        drawn[title] = (values, {name_of(s): found[s] for s in e.sources})
    text = f"""{e.protocol} Learning rate and weight decay are those chosen for MLA; "no projection" is alternation
    alone at its own. These curves show the test split for information; no setting was chosen by them."""
    e.write("curves", "How much do alpha and forget matter?", text, tables)
    figures.curves(drawn, {name_of(s): e.accuracies(plain[s]) for s in e.sources}, e.out / "curves.png")


def head(e: Evidence) -> None:
    """Do the baselines keep up with the same head?"""
    pairs = (("sum", "sum-shared"), ("late", "late-shared"))
    names = ("concat", *(m for pair in pairs for m in pair), "alternating", "mla")
    e.tune(names)
    e.complete([r for s in e.sources for m in names for r in e.final(s, m)], "same head")
    rows = [[METHODS[m].title, *(percent(e.accuracies(e.final(s, m))) for s in e.sources)] for m in names]
    effects = [
        [
            f"{METHODS[b].title} against {METHODS[a].title}",
            *(difference(e.accuracies(e.final(s, b)), e.accuracies(e.final(s, a))) for s in e.sources),
        ]
        for a, b in (*pairs, ("late-shared", "alternating"), ("late-shared", "mla"))
    ]
    columns = [name_of(s) for s in e.sources]
    tables = [Table("Test accuracy", ["method", *columns], rows), Table("Differences", ["", *columns], effects)]
    text = f"""{e.protocol} With one shared head the baselines have exactly the parameters of MLA. Late fusion with a
    shared head is alternation without the turns: the same losses, added up in one step."""
    e.write("head", "Do the baselines keep up with the same head?", text, tables)


def gap(e: Evidence) -> None:
    """Does a larger modality gap mean better accuracy? Over the runs of Table 1 and of the curves."""
    table1(e)
    curves(e)
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    rows = []
    for s in e.sources:
        groups = {METHODS[m].title: e.final(s, m) for m in MAIN}
        groups["MLA, alpha varied"] = [r for alpha in CURVE_ALPHAS for r in e.final(s, "mla", own=alpha)]
        pairs = {
            t: zip(e.values(runs, "gap", "distance"), e.accuracies(runs), strict=True) for t, runs in groups.items()
        }
        points[name_of(s)] = {title: [p for p in found if len(numbers(p)) == 2] for title, found in pairs.items()}
        means = [
            [statistics.mean(column) for column in zip(*found, strict=True)]
            for title, found in points[name_of(s)].items()
            if found and title != "MLA, alpha varied"
        ]
        every = [p for title, found in points[name_of(s)].items() if title != "MLA, alpha varied" for p in found]
        varied = points[name_of(s)]["MLA, alpha varied"]
        cells = [correlation(*zip(*found, strict=True)) for found in (every, varied, means)]
        rows.append([name_of(s), *cells])
    columns = ["dataset", "all runs of Table 1", "MLA with alpha varied", "the means of the methods of Table 1"]
    columns[-1] += " (as many as methods)"
    text = f"""{e.protocol} Gap: the distance of the centroids (figure3.md). r: Pearson's, with its 95 % interval; ρ:
    Spearman's."""
    e.write("gap", "Does a larger gap mean better accuracy?", text, [Table("Correlation", columns, rows)])
    figures.scatter(points, e.out / "gap.png")


def entropy(e: Evidence) -> None:
    """Is high entropy really wrong more often, and does the fusion gain by it?"""
    methods = ("alternating", "mla")
    e.tune(methods)
    e.complete([r for s in e.sources for m in methods for r in e.final(s, m)], "entropy")
    halves = [f"{2 * i / BINS:.1f}-{2 * (i + 1) / BINS:.1f}" for i in range(BINS // 2)]
    rows, drawn = [], {}
    for s in e.sources:
        drawn[name_of(s)] = {}
        for modality in modalities_of(s):
            found = [e.results[r]["by_entropy"][modality] for r in e.final(s, "mla")]
            samples, right = ([sum(f[k][i] for f in found) for i in range(BINS)] for k in ("samples", "right"))
            drawn[name_of(s)][modality] = (samples, right)
            cells = []
            for i in range(0, BINS, 2):
                n, good = sum(samples[i : i + 2]), sum(right[i : i + 2])
                cells.append(f"{100 * good / n:.0f} ({n})" if n else "no sample")
            rows.append([name_of(s), modality, *cells])
    tables = [Table("MLA: accuracy in % by entropy (samples)", ["dataset", "modality", *halves], rows)]
    rows = []
    for s in e.sources:
        for m in methods:
            runs = e.final(s, m)
            rates = [p / c if c else math.nan if c == 0 else None for p, c in zip(
                e.values(runs, "right_pick", "picks"), e.values(runs, "right_pick", "cases"), strict=True
            )]  # fmt: skip
            errors = [percent(e.values(runs, "calibration_error", fusion)) for fusion in ("mean", "entropy")]
            fusions = [percent(e.values(runs, "fusions", fusion)) for fusion in ("mean", "entropy")]
            rows.append([name_of(s), METHODS[m].title, percent(rates), *errors, *fusions])
    columns = ["dataset", "method", "the modality of lower entropy is the right one", "calibration error: mean"]
    columns += ["calibration error: entropy fusion", "accuracy: mean", "accuracy: entropy fusion"]
    tables.append(Table("The assumption of the fusion, and its calibration", columns, rows))
    text = f"""{e.protocol} Entropies are divided by log C; samples are added up over the seeds. "The right one": of two
    modalities of a sample of which exactly one predicts the class, how often it is the one of lower entropy.
    Calibration error: of the fused softmax, over 15 bins of confidence. Both fusions at the epoch chosen for entropy
    fusion."""
    e.write("entropy", "Is high entropy really wrong more often?", text, tables)
    figures.entropy(drawn, e.out / "entropy.png")


EXPERIMENTS: dict[str, Callable[[Evidence], None]] = {
    "table0": table0,
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "figure3": figure3,
    "order": order,
    "curves": curves,
    "tolerance": tolerance,
    "head": head,
    "gap": gap,
    "entropy": entropy,
    "ranking": ranking,
}


def everything(e: Evidence) -> None:
    """All of them, and the runs themselves, compressed, beside the tables."""
    for experiment in EXPERIMENTS.values():
        experiment(e)
    runs = e.results.path.read_bytes()
    checkpoint.write_atomic(e.out / "runs.jsonl.xz", lambda file: file.write(lzma.compress(runs)))
