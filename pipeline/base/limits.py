"""Limits on the size of a pipeline file and of its pipeline; each error names its limit.

Handwritten files are far below them. A mistake or an attack (aliases that expand to billions of
values, a matrix of a million cells) is refused within a second and a few hundred megabytes.
"""

SPEC_BYTES = 256 * 1024  # of the file
SPEC_VALUES = 20_000  # keys and values, with those of aliases, `<<` and `${vars...}`
SPEC_DEPTH = 32  # nested mappings, lists and `${vars...}`
SPEC_CHARACTERS = SPEC_BYTES  # of all texts with `${...}`, after its replacement
NAME_CHARACTERS = 100  # of a stage's name, and of an axis value
CELL_NAME_CHARACTERS = 250  # MLflow cuts a longer run name
EXPERIMENT_CHARACTERS = 250  # MLflow's databases cut a longer name
CELLS = 5_000  # of a pipeline
LINKS = 100_000  # between cells
PROBLEMS = 50  # reported at once
MESSAGE_CHARACTERS = 1_000  # of one problem
CHOICES = 300  # searched for the nearest name
