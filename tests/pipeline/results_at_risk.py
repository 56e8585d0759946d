"""A result that is made, and what there is of it after its disk has lost something."""

from pipeline.stage import Context
from pipeline.store.store import Store

KEY = "k" * 64


def publish(store: Store, text: str, checkpoints: int = 0) -> None:
    """Make an attempt with checkpoints that tell how far they go, and publish two outputs."""
    with store.begin_attempt(KEY) as attempt:
        context = Context(params=None, folder=attempt.folder)
        for step in range(checkpoints):
            with context.checkpoint() as folder:
                (folder / "state.txt").write_text(f"step {step}" * 100)
            attempt.append_events([{"type": "checkpoint", "number": step + 1}])
        for name in ("number", "other"):
            (context.output(name) / "number.txt").write_text(text * 100)
        (context.output("number") / "deep/er").mkdir(parents=True)
        (context.output("number") / "deep/er/file.txt").write_text(text)
        assert attempt.publish({}, ["number", "other"], {})


def check_left(store: Store) -> tuple[bool, str]:
    """Check that what a cut has left is whole or not there; return what there is."""
    manifest = store.manifest(KEY)
    if manifest is not None:
        for output in manifest.outputs:
            store.fetch(KEY, output)
    step = ""
    if manifest is None:
        last = Context(params=None, folder=store.begin_attempt(KEY).folder).last_checkpoint()
        if last is not None:
            step = (last / "state.txt").read_text()[:6]
            assert (last / "state.txt").read_text() == step * 100
        publish(store, "7")
        store.fetch(KEY, "number")
    return manifest is not None, step
