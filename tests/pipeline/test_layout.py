"""A path of a store is parsed as it was made; a name that a store does not give has no place."""

import pytest

from pipeline.store import layout
from pipeline.store.layout import Place, find_temporary, is_document, parse

KEY = "ab" * 32


@pytest.mark.parametrize(
    ("path", "attempt", "part"),
    [
        (layout.manifest_path(KEY), None, ""),
        (layout.collected_path(KEY), None, ""),
        (layout.failure_path(KEY, 3), 3, "failure.json"),
        (layout.event_segment(KEY, 3, 7), 3, "events"),
        (f"{layout.output_folder(KEY, 12345, 'model')}/weights", 12345, layout.OUTPUTS),
        (f"{layout.checkpoint_folder(KEY, 3, 7)}/training.json", 3, layout.CHECKPOINTS),
    ],
)
def test_a_path_of_a_key_is_parsed_as_it_was_made(
    path: str, attempt: int | None, part: str
) -> None:
    place = parse(path)
    assert place is not None
    assert (place.key, place.aside, place.attempt, place.part) == (KEY, None, attempt, part)
    assert path.startswith(place.part_path)
    aside = parse(path.replace(KEY, f"{KEY}.damaged-2"))
    assert aside is not None
    assert (aside.key, aside.aside, aside.attempt, aside.part) == (KEY, 2, attempt, part)


def test_the_folder_of_a_checkpoint_is_the_entry_of_its_files() -> None:
    place = parse(f"{layout.checkpoint_folder(KEY, 3, 7)}/inner/training.json")
    assert place is not None
    assert place.entry == layout.checkpoint_folder(KEY, 3, 7)
    assert place.part_path == layout.checkpoints_folder(KEY, 3)


def test_generations_marks_and_results_set_aside_are_parsed_as_they_were_made() -> None:
    name = layout.generation_path(KEY, 4).rpartition("/")[2]
    assert layout.parse_generation(name) == (KEY, 4)
    assert layout.parse_life(layout.run_mark("run", layout.life_mark(5))) == 5
    assert layout.parse_life(layout.stop_mark(5)) is None
    names = [layout.aside_name(KEY, n) for n in (10, 2)]
    assert layout.asides(KEY, [*names, KEY, "cd.damaged-3", f"{KEY}.damaged-x"]) == [2, 10]


@pytest.mark.parametrize(
    "path",
    [
        f"stages/{KEY}.bak/manifest.json",
        f"stages/{KEY}/attempts/copy of 0001/attempt.json",
        f"stages/{KEY}/attempts/{'9' * 5000}/attempt.json",
        "runs/-x/state.json",
        "runs/notes.txt",
        "generations/ab",
        "generations/ab.12345678901",
    ],
)
def test_a_name_that_a_store_does_not_give_has_no_place(path: str) -> None:
    assert parse(path) is None


def test_files_at_the_top_have_a_place() -> None:
    assert parse("storage.json") == Place("storage.json")
    assert parse("tracking/run.jsonl") == Place("tracking", "run.jsonl")
    probe = parse(f"probe-{'0' * 32}/file")
    assert probe is not None
    assert probe.is_probe


def test_a_temporary_name_counts_unless_a_stage_may_have_chosen_it() -> None:
    name = f".{'0' * 32}"
    assert find_temporary(f"runs/a/{name}/state.json") == f"runs/a/{name}"
    assert find_temporary(f"{layout.output_folder(KEY, 1, 'model')}/{name}") is None


def test_documents_are_the_runners_own_sealed_files() -> None:
    yes = ("storage.json", "runs/a/state.json", layout.event_segment(KEY, 1, 1))
    no = (
        layout.manifest_path(KEY),
        layout.manifest_path(f"{KEY}.damaged-1"),
        "tracking/run.jsonl",
        f"{layout.output_folder(KEY, 1, 'model')}/rows.json",
        f"{layout.checkpoint_folder(KEY, 1, 1)}/{layout.DIGESTS}",
        "runs/a/marks/alive",
    )
    assert [path for path in yes if not is_document(path)] == []
    assert [path for path in no if is_document(path)] == []


@pytest.mark.parametrize("parts", [(), (KEY, 3)])
def test_a_path_of_too_few_or_too_many_parts_is_refused(parts: tuple[object, ...]) -> None:
    with pytest.raises(TypeError, match="expected 1 parts, got"):
        layout.manifest_path(*parts)
