"""The columns of the results, declared once for measuring, tables, tracking and documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""One evaluated model: column -> value."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: in rows and tables, and of the parameter or metric of a model's tracked run.
        kind: type of its values.
        meaning: for people.
        unit: of its values.
        optional: whether a value may be None.
        param: whether a model's tracked run has it as a parameter.
        metric: whether a model's tracked run has it as a metric, which sorts by number.
        in_tables: whether tables show it; JSON shows all columns.
        by_runner: whether the runner fills it in.
    """

    name: str
    kind: type
    meaning: str
    unit: str = ""
    optional: bool = False
    param: bool = False
    metric: bool = False
    in_tables: bool = True
    by_runner: bool = False


COLUMNS = (
    Column("cell", str, "cell that measured the model", by_runner=True),
    Column("model_cell", str, "cell that made the model"),
    Column("key", str, "key of the cell that made the model"),
    Column("method", str, "curvature method; or dense, or imported", param=True),
    Column("structure", str, "structure of the curvature", optional=True, param=True),
    Column("mode", str, "dense, imported, oneshot, multistep, refined or gradual", param=True),
    Column("finetuned", bool, "whether trained after the last pruning", param=True),
    Column("target", float, "sparsity that was asked for", "fraction", param=True, metric=True),
    Column("sparsity", float, "prunable weights that are 0", "fraction", param=True, metric=True),
    Column("seed", int, "seed of the model", param=True, metric=True),
    Column("accuracy", float, "samples whose class is right", "%", metric=True),
    Column("nll", float, "mean negative log-likelihood", "nats", metric=True),
    Column("ece", float, "expected calibration error", "%", metric=True),
    Column("nonzero", int, "prunable weights that are not 0", "weights", metric=True),
    Column("prunable", int, "prunable weights", "weights", metric=True),
    Column("parameters", int, "parameters of the network", "weights", metric=True),
    Column("damping", float, "damping of the curvature", optional=True, param=True, metric=True),
    Column("split", str, "split of the data that was measured", param=True),
    Column("run_id", str, "tracked run of the model", optional=True, by_runner=True),
    Column("images", int, "samples of the split that were measured", in_tables=False),
    Column("images_digest", str, "sha256 of these samples, its beginning", in_tables=False),
    Column("right", str, "samples whose class is right, a bit each, base64", in_tables=False),
    Column("settings", dict, "STAGE.PARAMETER -> setting, of all stages before", in_tables=False),
    Column("seeds", dict, "STAGE.PARAMETER -> seed, of all stages before", in_tables=False),
    Column("choices", dict, "STAGE.PARAMETER -> chosen, and among which", in_tables=False),
    Column("unprunable", dict, "weight -> why it is not prunable", in_tables=False),
    Column("emptied", list, "layers without a weight", in_tables=False),
    Column("warnings", list, "warnings about the model, a sentence each", in_tables=False),
    Column("dense_accuracy", float, "of the dense network", "%", optional=True, in_tables=False),
)
TABLE = tuple(column.name for column in COLUMNS if column.in_tables)
"""Names of the columns of tables, in order."""
BEFORE = {"target": "sparsity"}
"""Column -> the column that held its values in the rows of earlier versions."""


def target_of(row: Row) -> float:
    """Return the target in a row, in a model's facts, or in the facts of a pruning step."""
    return row.get("target", row[BEFORE["target"]])
