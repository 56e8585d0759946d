"""Sentences with numbers, each made from the committed results: a template and its numbers.

A number of README.md or docs/comparison.md is either here or in a table of
`benchmarks.harness.pages`, so that none can differ from the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from statistics import fmean

from benchmarks.harness.committed import Committed
from benchmarks.harness.suite import find_benchmark, load_script
from benchmarks.harness.sweeps import ends_of
from stages.catalogue import MultistepParams
from stages.columns import target_of
from stages.report.paired import find_best
from stages.report.rows import name_of
from stages.report.summary import PUBLISHED, SECTIONS, Lines

_ONE = SECTIONS["oneshot", False]
_TUNED = SECTIONS["oneshot", True]
_STEPS = SECTIONS["multistep", False]
_REFINED = SECTIONS["refined", False]
_LEARNED = ("fls", "fishleg")
_TRAIN_IMAGES = 45_000  # of CIFAR-10; 5,000 more are the validation images


def best_one_step(results: Committed) -> str:
    """Return which one-step row of ResNet20 is the highest at each sparsity."""
    lines = results.one_step("estimators", "resnet20")
    best: dict[str, list[str]] = {}
    for sparsity in sorted({at for line in lines.values() for at in line}):
        points = {name: line[sparsity] for name, line in lines.items() if sparsity in line}
        name = max(points, key=lambda one: points[one].mean)
        others = len(find_best(lines, sparsity).names) - 1
        equals = f", {others} not told from it" if others else ""
        best.setdefault(name, []).append(f"{sparsity:g} ({points[name].mean:.2f}{equals})")
    if len(best) == 1:
        return f"{next(iter(best))} has the highest one-step row at every sparsity."
    listed = "; ".join(f"{name} at {joined(places)}" for name, places in best.items())
    return f"No method has the highest one-step row at every sparsity: {listed}."


def learned_one_step(results: Committed) -> str:
    """Return how the best learned inverse of ResNet20 compares with the best row.

    Learned are the rows of `fls` and `fishleg`: their factors minimise J or L.
    """
    lines = results.one_step("estimators", "resnet20")
    parts, ahead = [], 0
    for sparsity in sorted({at for line in lines.values() for at in line}):
        means = {name: line[sparsity].mean for name, line in lines.items() if sparsity in line}
        learned = {name: mean for name, mean in means.items() if name.startswith(_LEARNED)}
        others = {name: mean for name, mean in means.items() if name not in learned}
        if not learned:
            continue
        ours, theirs = max(learned, key=learned.__getitem__), max(others, key=others.__getitem__)
        ahead += learned[ours] > others[theirs]
        parts.append(f"{ours} {learned[ours]:.2f}, {theirs} {others[theirs]:.2f} at {sparsity:g}")
    if not parts:
        return "No learned inverse has committed results."
    verdict = (
        f"A learned inverse is the highest row at {ahead} of {len(parts)} sparsities"
        if ahead
        else "A learned inverse is the highest row at no sparsity"
    )
    return f"{verdict}. The highest learned row and the highest other one: {'; '.join(parts)}."


def seeds_used(results: Committed) -> str:
    """Return the numbers of calibration seeds of the rows of ResNet20."""
    one = _counts(results.section("estimators", _ONE))
    several = _counts(results.section("resnet20", _STEPS))
    refined = _counts(results.section("resnet20", _REFINED))
    return (
        f"One-step rows have n = {one} calibration seed, rows in several steps n = {several}, "
        f"refined ones n = {refined}."
    )


def distillation(results: Committed) -> str:
    """Return the training that refinement is, up to the last sparsity of ResNet20."""
    params = results.params("resnet20", "refined")
    refinement = MultistepParams.model_validate(
        {**params, "sparsity": params["sparsity"], "seed": 0}
    ).refinement
    steps = refinement.steps if isinstance(refinement.steps, list) else []
    images = sum(steps) * refinement.batch_size
    return (
        f"Refinement is training: {sum(steps):,} steps of Adam up to {params['sparsity']:g}, a "
        f"distillation from the dense network without labels, over {images:,} images "
        f"({images / _TRAIN_IMAGES:.1f} epochs' worth; {refinement.samples:,} different ones)."
    )


def refinement_gain(results: Committed) -> str:
    """Return what refinement changes on ResNet20."""
    plain = results.section("resnet20", _STEPS)["eigen"]
    refined = results.section("resnet20", _REFINED)["eigen"]
    gains = [
        f"{refined[at].mean - point.mean:+.2f} at {at:g}"
        for at, point in plain.items()
        if at in refined
    ]
    return f"Refinement changes the accuracy of eigen by {joined(gains)} points."


def costs(results: Committed, sparsity: float = 0.9) -> str:
    """Return the processor time of the way to one sparsity of ResNet20."""
    rows = results.rows("resnet20")
    times = [
        fmean(
            row["cpu_seconds"]
            for row in rows
            if (row["mode"], name_of(row), target_of(row)) == (mode, "eigen", sparsity)
        )
        for mode in ("refined", "multistep")
    ]
    return (
        f"The way to {sparsity:g} takes {times[0] / 60:.0f} minutes of processor time refined, "
        f"{times[1] / 60:.0f} without."
    )


def after_training(results: Committed) -> str:
    """Return how far the methods are apart on the digits, before and after fine-tuning."""
    sections = [results.section("digits", name) for name in (_ONE, _TUNED)]
    if not all(sections):
        return "The default experiment has no committed results."
    sparsity = max(at for line in sections[1].values() for at in line)
    ranges = []
    for lines in sections:
        means = [line[sparsity].mean for line in lines.values() if sparsity in line]
        ranges.append(f"{min(means):.1f} to {max(means):.1f} %")
    return (
        f"Curvature stops paying after training: on the digits at {sparsity:g} the methods have "
        f"{ranges[0]} after one step, and {ranges[1]} after fine-tuning."
    )


def ends(results: Committed) -> str:
    """Return the rows whose damping is an end of its sweep, so far."""
    found: dict[str, list[str]] = {}
    for name in ("estimators", "resnet20", "mlpnet"):
        for cell, document in results.documents(name).items():
            if ends_of(name, cell, document):
                label = "layer" if cell.startswith("layer") else name_of(document)
                found.setdefault(f"{label} ({name})", []).append(f"{target_of(document):g}")
    if not found:
        return "No row's damping is an end of its sweep."
    listed = "; ".join(f"{name} at {joined(sorted(at))}" for name, at in found.items())
    return (
        "The damping of these rows is an end of its sweep, so that a longer sweep may raise them: "
        f"{listed}."
    )


def chita(results: Committed) -> str:
    """Return the comparison with the abstract of CHITA at 0.98 on MLPNet."""
    theirs = results.section("mlpnet", _ONE)[f"CBS{PUBLISHED}"][0.98].mean
    ours = results.section("mlpnet", _REFINED)["eigen"][0.98].mean
    return (
        "CHITA's table has no row of its own at 0.98 on MLPNet. Its abstract (ICML 2023) claims an "
        "accuracy 63 % higher, in relative terms, than the state of the art at that sparsity; on "
        f"CBS's {theirs:.2f} that would be about {1.63 * theirs:.1f}, beside the {ours:.2f} of "
        "eigen, refined. Its exact figure is not known to us."
    )


def optimiser(results: Committed) -> str:
    """Return the last losses of the FishLeg optimiser and of Adam, and what learning changes."""
    parts = []
    documents = results.documents("optimiser")
    for problem in ("autoencoder", "resnet20"):
        ours, adam = (
            documents[f"{problem}/{method}"]["result"]["runs"][0]["validation"]
            for method in ("fishleg", "adam")
        )
        reached = next((seconds for _, seconds, loss in ours if loss <= adam[-1][2]), None)
        level = "never" if reached is None else f"after {reached:.0f} of Adam's {adam[-1][1]:.0f} s"
        parts.append(
            f"{problem}: {ours[-1][2]:.3g} against {adam[-1][2]:.3g} nats after {ours[-1][0]:,} "
            f"steps, level with Adam's last {level}"
        )
    learning = load_script(find_benchmark("optimiser").path).verdict(documents)
    return f"The FishLeg optimiser against Adam (one seed), {'; '.join(parts)}. {learning}"


def verdicts(results: Committed) -> str:
    """Return a list of the paper's claims with their verdicts."""
    parts = []
    for name in ("claim_structure", "claim_noise", "claim_assimilation"):
        module = load_script(find_benchmark(name).path)
        text = module.verdict(results.documents(name))
        bold = re.findall(r"\*\*(.+?)\*\*", text) or [text]
        parts.append(f"- {module.TITLE}. {' '.join(bold)}")
    return "\n".join(parts)


def joined(parts: Iterable[str]) -> str:
    """Return a list in words.

    >>> joined(["0.5"]), joined(["0.5", "0.7", "0.9"])
    ('0.5', '0.5, 0.7 and 0.9')
    """
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _counts(lines: Lines) -> str:
    counts = sorted(
        {
            len(point.accuracies)
            for name, line in lines.items()
            if not name.endswith(PUBLISHED)
            for point in line.values()
        }
    )
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
