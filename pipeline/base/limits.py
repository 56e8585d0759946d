"""How large a pipeline file, and what it describes, may be; each error names the limit it meets.

A file that a person wrote is far below all of them. They keep what a mistake or an attacker wrote
(aliases that expand to billions of values, a matrix of a million cells) from costing more than a
second or a few hundred megabytes before it is refused.
"""

SPEC_BYTES = 256 * 1024  # of the file
SPEC_VALUES = 20_000  # keys and values, with those that aliases, `<<` and `${vars...}` bring
SPEC_DEPTH = 32  # of mappings, lists and `${vars...}` inside each other
SPEC_CHARACTERS = SPEC_BYTES  # of all texts that hold `${...}`, after it is replaced
NAME_CHARACTERS = 100  # of a stage's name, and of an axis value
CELL_NAME_CHARACTERS = 250  # what MLflow keeps of a run's name
EXPERIMENT_CHARACTERS = 250  # what MLflow's databases keep of an experiment's name
CELLS = 5_000  # of a pipeline
LINKS = 100_000  # between cells
PROBLEMS = 50  # reported at once
MESSAGE_CHARACTERS = 1_000  # of one problem
CHOICES = 300  # among which the nearest name is looked for
