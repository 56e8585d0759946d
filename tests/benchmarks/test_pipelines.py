"""Benchmarks that are pipelines: what is evaluated is kept, with what it cost to make."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.harness.documents import read_cells, write_document
from benchmarks.harness.extension import with_grids
from benchmarks.harness.lineage import cost_of, path_to
from benchmarks.harness.pipelines import keep_results, run_pipeline
from benchmarks.harness.report import write_report
from benchmarks.harness.suite import Benchmark
from benchmarks.harness.sweeps import next_value
from pipeline.planning.planner import make_plan
from pipeline.spec.load import load_spec
from pipeline.store.checksum import verified, with_checksum
from pipeline.store.store import Store

SPEC = """
name: small
plugins: [stages]
storage: store
stages:
  dense:
    uses: pretrain
    params: {dataset: digits, model: digits_resnet, model_args: {width: 4, hidden: 16}, epochs: 2}
  curvature:
    uses: curvature
    matrix: {method: [diagonal], damping: [1.0e-4, 1.0e+3]}
    inputs: {model: dense}
    params: {samples: 50, certificate_samples: 20}
  oneshot:
    uses: prune_oneshot
    matrix: {method: [diagonal], damping: [1.0e-4, 1.0e+3]}
    inputs: {model: dense, curvature: curvature}
    params: {sparsity: 0.5, certificate_samples: 0}
  best:
    uses: select
    matrix: {method: [diagonal]}
    inputs: {candidates: oneshot}
  multistep:
    uses: prune_multistep
    inputs: {model: dense}
    params:
      method: diagonal
      sparsity: 0.8
      stops: [0.5]
      steps: 2
      samples: 50
      refine: none
  picked:
    uses: pick
    matrix: {sparsity: [0.5, 0.8]}
    inputs: {steps: multistep}
  evaluate:
    uses: evaluate
    inputs: {models: [dense, best, picked]}
  compare:
    uses: compare
    inputs: {results: evaluate}
    params:
      title: Digits
      published: [{method: other, sparsity: [0.5], accuracy: [12.34]}]
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "small.yaml").write_text(SPEC)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        benchmark = Benchmark("small", folder / "small.yaml")
        assert run_pipeline(benchmark, folder / "results", (), Console(quiet=True)) == 0
    return folder


@pytest.fixture
def facts(ran: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """Cell -> facts of its manifest."""
    monkeypatch.chdir(ran)
    spec = load_spec(ran / "small.yaml")
    cells = make_plan(spec, Store(spec.storage)).cells
    return {one.cell.name: dict(one.manifest.making) for one in cells if one.manifest is not None}


def test_the_dense_model_costs_nothing(ran: Path) -> None:
    dense = read_cells(ran / "results", "small")["dense"]
    assert (dense["seconds"], dense["cpu_seconds"], dense["peak_bytes"]) == (0, 0, 0)


def test_a_selected_model_costs_what_the_chosen_candidate_did(
    ran: Path, facts: dict[str, dict]
) -> None:
    found = read_cells(ran / "results", "small")["best[method=diagonal]"]
    at = f"[damping={json.dumps(found['damping'])},method=diagonal]"
    path = [facts[f"curvature{at}"], facts[f"oneshot{at}"]]
    assert found["seconds"] == pytest.approx(sum(one["seconds"] for one in path), abs=2e-3)
    assert found["cpu_seconds"] == pytest.approx(sum(one["cpu_seconds"] for one in path), abs=2e-3)
    assert found["peak_bytes"] == max(one["peak_bytes"] for one in path)


def test_a_grid_whose_best_value_is_an_end_is_extended_until_it_is_inside(ran: Path) -> None:
    found = read_cells(ran / "results", "small")["best[method=diagonal]"]
    choice = found["choices"]["curvature.damping"]
    assert choice["chosen"] == found["damping"]
    assert {1e-4, 1e3} < {*choice["among"]}
    assert next_value(choice["chosen"], choice["among"]) is None
    extended = sorted({*choice["among"]} - {1e-4, 1e3})
    steps = [value * 10**power for value in (1e-4, 1e3) for power in range(-4, 3)]
    assert all(any(one == pytest.approx(step) for step in steps) for one in extended)


def test_a_result_of_a_grid_that_is_to_be_extended_is_not_kept(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ran)
    spec = load_spec(ran / "small.yaml")
    grids, until = keep_results(spec, "small", tmp_path)
    assert until == ["evaluate"]
    assert set(grids) == {"curvature.damping", "oneshot.damping"}
    assert all(len(values) == 3 for values in grids.values())
    assert "best[method=diagonal]" not in read_cells(tmp_path, "small")
    assert len(read_cells(tmp_path, "small")) == 3


def test_extended_grids_replace_the_options_of_their_axes_alone() -> None:
    before = ("curvature.damping=[1.0, 2.0]", "vars.seeds=[0]")
    found = with_grids(before, {"curvature.damping": [1e-5, 1.0, 2.0]})
    assert found == (
        "vars.seeds=[0]",
        "curvature.damping=[1.000000000000e-05, 1.000000000000e+00, 2.000000000000e+00]",
    )


def test_a_model_has_the_certificate_of_its_estimate(ran: Path) -> None:
    documents = read_cells(ran / "results", "small")
    certificate = documents["best[method=diagonal]"]["certificate"]
    assert certificate["objective"] < 0
    assert not any("certificate" in documents[f"picked[sparsity={s}]"] for s in (0.5, 0.8))


def test_a_picked_model_costs_the_time_up_to_its_step(ran: Path, facts: dict[str, dict]) -> None:
    documents = read_cells(ran / "results", "small")
    first, last = (documents[f"picked[sparsity={sparsity}]"] for sparsity in (0.5, 0.8))
    assert 0 < first["seconds"] < last["seconds"] <= facts["multistep"]["seconds"]
    assert 0 < first["cpu_seconds"] < last["cpu_seconds"] <= facts["multistep"]["cpu_seconds"]
    assert first["peak_bytes"] == last["peak_bytes"] == facts["multistep"]["peak_bytes"]


def test_documents_stay_as_they_are_when_nothing_is_new(ran: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (ran / "results").rglob("*.json")}
    assert len(before) == 4 + 1
    for path in (ran / "results").glob("small/*.json"):
        path.write_text(path.read_text().replace('"environment": "', '"environment": "of old '))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ran)
        benchmark = Benchmark("small", ran / "small.yaml")
        run_pipeline(benchmark, ran / "results", (), Console(quiet=True))
    kept = [path.read_text() for path in (ran / "results").glob("small/*.json")]
    assert all('"environment": "of old ' in text for text in kept)
    for path, content in before.items():
        path.write_bytes(content)


def test_the_report_has_accuracies_costs_and_published_rows(ran: Path, tmp_path: Path) -> None:
    write_report(tmp_path / "results.md", ran / "results", ran)
    text = (tmp_path / "results.md").read_text()
    assert "## Digits" in text
    assert "| *other (published)* |  | 12.34 |" in text
    found = read_cells(ran / "results", "small")["picked[sparsity=0.8]"]
    cost = f"({found['cpu_seconds']:.0f} s, {found['peak_bytes'] / 1e6:.0f} MB)"
    assert f"{found['accuracy']:.2f}" in text
    assert cost in text
    certificate = read_cells(ran / "results", "small")["best[method=diagonal]"]["certificate"]
    assert f"| {certificate['best_scale']:.4g} | {certificate['residual']:.4g} |" in text
    assert (tmp_path / "results" / "small.png").exists()
    write_report(tmp_path / "again" / "results.md", ran / "results", ran)
    assert (tmp_path / "again" / "results.md").read_text() == text


def test_structures_of_one_method_are_rows_of_their_own(ran: Path, tmp_path: Path) -> None:
    found = read_cells(ran / "results", "small")["picked[sparsity=0.8]"]
    for structure in ("eigen", "kronecker"):
        settings = {**found["settings"], "prune_multistep.fishleg.structure": structure}
        about = {"cell": structure, "key": structure, "method": "fishleg", "structure": structure}
        document = {**found, **about, "settings": settings}
        write_document(tmp_path / "results" / "small" / f"{structure}.json", document)
    write_report(tmp_path / "results.md", tmp_path / "results", ran)
    text = (tmp_path / "results.md").read_text()
    assert "| eigen |" in text
    assert "| fishleg (kronecker) |" in text


def test_the_work_behind_a_checkpoint_counts_and_what_was_lost_does_not(tmp_path: Path) -> None:
    store, key = Store(str(tmp_path)), "a" * 64
    cut_off, last = store.begin_attempt(key), store.begin_attempt(key)
    early = {
        "type": "checkpoint",
        "time": 0.0,
        "seconds": 1.0,
        "cpu_seconds": 2.0,
        "peak_bytes": 900,
    }
    late = {**early, "seconds": 10.0, "cpu_seconds": 15.0}
    lost = {"type": "metrics", "time": 0.0, "values": {}, "step": None}
    (cut_off.folder / "checkpoints").mkdir()
    cut_off.append_events([early])
    cut_off.append_events([late, lost])
    facts = {"seconds": 4.0, "cpu_seconds": 5.0, "peak_bytes": 700}
    ingredients = {"stage": "finetune", "params": {}, "inputs": {}}
    assert last.publish(ingredients, [], facts)
    assert cost_of(path_to(store, key)) == {
        "seconds": 14.0,
        "cpu_seconds": 20.0,
        "peak_bytes": 900,
    }


def test_the_environment_is_that_of_the_work_not_of_the_copy(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ran, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    spec = load_spec(Path("small.yaml"))
    for one in make_plan(spec, Store(spec.storage)).cells:
        path = Path("store/stages", one.key, "manifest.json")
        if one.cell.name.startswith(("picked", "best")):
            plain = json.dumps(verified(path.read_bytes())).replace('"torch"', '"not_loaded"')
            path.write_bytes(with_checksum(json.loads(plain)))
    keep_results(spec, "small", tmp_path / "results")
    documents = read_cells(tmp_path / "results", "small").values()
    names = {document["environment"] for document in documents}
    texts = [(tmp_path / "results/environments" / f"{name}.json").read_text() for name in names]
    assert [json.loads(text)["torch"] for text in texts] == [torch.__version__] * len(names)
