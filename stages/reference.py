"""References to networks, data sets and methods, as stages store them for later stages.

A stage never imports the catalogue, whose code would enter every key. The annotation of a parameter
holds its registry; `refer` reads it from there.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.stage import Params, Registry, StageError, require_call

# Earlier targets, which stored files and pipeline files may name -> present ones.
RENAMED = {
    "fishleg.estimators:BlockWoodbury": "fishleg.estimators:OBS",
    "fishleg.estimators:Identity": "fishleg.estimators:Magnitude",
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A registry name with its target.

    Attributes:
        name: the name as the user wrote it, such as `resnet20` or `torchvision/resnet50`.
        target: `module:attribute`.
        argument: for a name of a family (`torchvision/resnet50`), the part after the prefix, which
            is the target's first argument. None otherwise.
        digest: declared sha256 of the entry's data, or None.
    """

    name: str
    target: str
    argument: str | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", RENAMED.get(self.target, self.target))

    def load(self, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
        """Import the target and return it, with the family's argument bound.

        Args:
            options: the user's, of a network or data set, for the later call.

        Raises:
            StageError: the module or the attribute does not exist.

        A target that a stored file names, and no parameter does, is a StageError as well.
        """
        require_call(self.target, self.argument, options)
        module, _, attribute = self.target.partition(":")
        try:
            loaded = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise StageError(
                f"{self.name!r} is {self.target}, which cannot be imported: {error}. Make it "
                "importable in the worker: `pip install` it, or put its folder on PYTHONPATH."
            ) from error
        return loaded if self.argument is None else partial(loaded, self.argument)


def require_options(
    function: Callable[..., Any],
    reference: Reference,
    field: str,
    given: Sequence[Any],
    options: Mapping[str, Any],
) -> None:
    """Check options against the signature of a function, before it is called with them.

    Args:
        function: the target of `reference`.
        reference: gives the name in the message.
        field: the parameter that holds the user's options.
        given: positional arguments of the call.
        options: keyword arguments of the call.

    Raises:
        StageError: the function has no such option, or requires another one.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(*given, **options)
    except TypeError as error:
        taken = ("num_classes", "download")
        known = [name for name in [*signature.parameters][len(given) :] if name not in taken]
        raise StageError(
            f"{field}: {error}. The options of {reference.name!r} are: "
            f"{', '.join(known) or 'none'}."
        ) from None


def refer(params: Params, field: str) -> Reference:
    """Return the reference behind the value of a field annotated with a registry.

    Raises:
        StageError: the name is in no registry of the field.
    """
    name = getattr(params, field)
    for registry in type(params).model_fields[field].metadata:
        if not isinstance(registry, Registry):
            continue
        entry = registry.find(name)
        if entry is None:
            known = sorted([*registry.entries, *(f"{prefix}..." for prefix in registry.prefixes)])
            raise StageError(f"unknown {registry.kind} {name!r}; known: {', '.join(known)}.")
        return Reference(
            name=name, target=entry.target, argument=registry.argument(name), digest=entry.digest
        )
    raise StageError(f"parameter {field!r} has no registry.")
