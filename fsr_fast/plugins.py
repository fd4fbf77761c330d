"""Losses, data sets and backbones from outside the package (docs/extending.md).

A plug-in is a module that registers what it offers when it is imported. Only the user imports one: by the key
`run.plugins` on the command line or in a recipe, or by an `import` in Python; a checkpoint never does.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

from fsr_fast.config_method import LossConfig
from fsr_fast.config_sections import BUILT_IN_DATASETS
from fsr_fast.errors import UserError, nearest

Made = TypeVar("Made", bound=Callable[..., Any])
HINT = "(a plug-in's is known once --run.plugins names its module)"


class Registry:
    """Functions that plug-ins have registered for one key, by its value.

    Args:
        kind: what is registered, for messages.
        key: of the configuration, whose values are the names.
        built_in: names in the package itself.
        takes_built_in: whether the key also accepts those.
    """

    def __init__(self, kind: str, key: str, built_in: Collection[str] = (), *, takes_built_in: bool = False) -> None:
        self.kind, self.key, self.built_in = kind, key, frozenset(built_in)
        self._taken = self.built_in if takes_built_in else frozenset[str]()
        self._found: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Made], Made]:
        """Return a decorator that registers a function under a name.

        Raises:
            UserError: the package or another plug-in has this name.
        """

        def add(made: Made) -> Made:
            if name in self.built_in:
                raise UserError(f"{_place(made)}: fsr_fast itself has a {self.kind} {name!r}; choose another name")
            if name in self._found:
                raise UserError(
                    f"{_place(made)}: the {self.kind} {name!r} is registered already, by {_place(self._found[name])}; "
                    "rename one of them"
                )
            self._found[name] = made
            return made

        return add

    def check(self, names: Iterable[str]) -> None:
        """Check that the key accepts each name.

        Raises:
            UserError: it does not.
        """
        for name in names:
            if name not in self._taken:
                self[name]

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """Return the function registered under a name.

        Raises:
            UserError: there is none.
        """
        if name in self._found:
            return self._found[name]
        known = {*self._found, *self._taken}
        raise UserError(f"{self.key}: unknown {self.kind} {name!r} {HINT}{nearest(name, known) if known else ''}")


LOSSES = Registry("loss", "loss.extra", LossConfig.model_fields)
DATASETS = Registry("data set", "data.dataset", BUILT_IN_DATASETS, takes_built_in=True)
BACKBONES = Registry("backbone", "model.backbone")

register_loss = LOSSES.register
"""Decorator, `@register_loss("name")`, for a function of `LossInputs` that returns a scalar tensor or None."""
register_dataset = DATASETS.register
"""Decorator for a function of the data set's root, the name of a list, its key (for messages) and the section `data`
that returns a `Split`."""
register_backbone = BACKBONES.register
"""Decorator for a function of `pretrained` and of `model.backbone_options` that returns a transformer of timm."""


def load_plugins(modules: Iterable[str]) -> None:
    """Import plug-ins.

    Args:
        modules: names that the user gave.

    Raises:
        UserError: one does not exist, or fails; names file and line.
    """
    for name in modules:
        if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
            raise UserError(
                f"run.plugins: {name!r} is not a module name; expected one such as my_package.losses, or my_losses "
                "for a file my_losses.py whose folder is in PYTHONPATH"
            )
        try:
            importlib.import_module(name)
        except UserError as error:
            raise UserError(f"run.plugins: {name}: {error}") from None
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
                raise UserError(
                    f"run.plugins: there is no module {name!r}; install its package, or put the folder of its file "
                    "into PYTHONPATH"
                ) from None
            inner = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"]
            place = f"{inner[-1].filename}, line {inner[-1].lineno}: " if inner else ""
            raise UserError(
                f"run.plugins: {name} cannot be imported: {place}{type(error).__name__}: {error}"
            ) from error


def _place(made: Callable[..., Any]) -> str:
    return f"{made.__module__}.{made.__qualname__}"
