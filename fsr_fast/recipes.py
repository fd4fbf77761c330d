"""Recipes: YAML files of settings, each over another one that it may name as its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fsr_fast.errors import UserError

CONFIG_FOLDER = Path(__file__).parent / "configs"
MAX_ENTRIES = 10_000  # of a recipe; a few lines of YAML references can expand to billions


def read_yaml(path: Path, above: tuple[Path, ...] = (), *, whole: bool = False) -> dict[str, Any]:
    """Read a recipe. Its key `base` names another one, whose values it overrides: a file in the same folder, or a
    recipe of the package.

    Args:
        path: the file, or the name of a recipe of the package, e.g. `voc_vit_b`.
        above: recipes that override this one.
        whole: it must not name a base; a run's recorded configuration never does.

    Raises:
        UserError: the file is missing, is not a YAML mapping of sections, or is its own base.
    """
    if path in above:
        raise UserError(f"{path}: base: {' → '.join(map(str, (*above, path)))} has no end; remove one base")
    named = CONFIG_FOLDER / f"{path}.yaml"
    if not path.is_file() and len(path.parts) == 1 and named.is_file():
        path = named
    if not path.is_file():
        recipes = sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml"))
        raise UserError(f"{path}: no such configuration; give a file, or the name of a recipe: {', '.join(recipes)}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_OnceLoader) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if _count_entries(values, {}) > MAX_ENTRIES:
        raise UserError(f"{path}: more than {MAX_ENTRIES} entries, references expanded; expected a recipe")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: expected a mapping of sections (run:, data:, model:, …)")
    base = values.pop("base", None)
    if base is None:
        return values
    if whole:
        raise UserError(
            f"{path}: base: {str(base)[:80]!r}; the configuration of a run must not name another file; remove it"
        )
    beside = path.parent / str(base)
    found = beside if beside.is_file() or Path(str(base)).suffix else Path(str(base))
    return merge(read_yaml(found, (*above, path)), values)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Override values by others, key by key."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _count_entries(values: Any, known: dict[int, int]) -> int:
    """Count the entries of nested values with every reference (`*name`) expanded; each is visited once."""
    if not isinstance(values, (dict, list)):
        return 1
    if id(values) not in known:
        known[id(values)] = MAX_ENTRIES + 1  # a value that contains itself would be endless
        inner = values.values() if isinstance(values, dict) else values
        known[id(values)] = 1 + sum(_count_entries(value, known) for value in inner)
    return known[id(values)]


class _OnceLoader(yaml.SafeLoader):
    """Refuses a duplicate key in a mapping, of which YAML would silently keep the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
