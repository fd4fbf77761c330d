"""The typed configuration: one YAML file over the defaults, then `--section.key value` on the command line.

`fsr-fast train --help` prints all fields with their descriptions.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from fsr_fast.config_sections import (
    AugmentConfig,
    CamConfig,
    DataConfig,
    EvaluateConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PseudoLabelConfig,
    RunConfig,
    TeacherConfig,
)
from fsr_fast.errors import UserError, nearest
from fsr_fast.options import Parser

__all__ = [
    "CONFIG_FOLDER",
    "AugmentConfig",
    "CamConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "LossConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "PseudoLabelConfig",
    "RunConfig",
    "TeacherConfig",
    "build_config",
    "dump_config",
    "load_config",
    "read_yaml",
]

CONFIG_FOLDER = Path(__file__).parent / "configs"
MAX_ENTRIES = 10_000  # of a recipe; a few lines of references can stand for billions


class Config(BaseSettings):
    """Everything that defines a run."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        cli_exit_on_error=False,
        cli_prog_name="fsr-fast train",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        use_attribute_docstrings=True,
    )

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    cam: CamConfig = CamConfig()
    mask: MaskConfig = MaskConfig()
    pseudo_label: PseudoLabelConfig = PseudoLabelConfig()
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the command line and the file alone: no environment variable changes a run."""
        return (init_settings,)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.data.dataset != "synthetic" and self.data.root is None:
            raise ValueError(
                f"data.root: missing; the data set {self.data.dataset!r} needs a folder: --data.root FOLDER"
            )
        if self.run.shard and self.cam.fp8:
            raise ValueError("cam.fp8: works on whole weights, but run.shard shares them out; leave one of them out")
        return self


def build_parser() -> Parser:
    """Build the parser of `fsr-fast train`: an option for every field."""
    parser = _file_options()
    CliSettingsSource(Config, root_parser=parser)
    return parser


def load_config(arguments: Sequence[str]) -> tuple[Config, bool]:
    """Read the configuration of a run.

    Args:
        arguments: the command line, e.g. `["--config", "configs/voc_vit_b.yaml", "--optim.iterations", "100"]`.
            Without `--config` the embedded data set's recipe is read.

    Returns:
        The configuration, and whether `--print-config` was asked for.

    Raises:
        UserError: an unknown key, a value out of range, a file that cannot be read.
    """
    parser = _file_options()
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(Config, root_parser=parser, cli_parse_args=list(arguments))
    except SettingsError as error:  # a mapping or a list that does not parse
        raise UserError(f"command line: {error}") from None
    options = parser.parse_args(list(arguments))
    return build_config(read_yaml(options.config), str(options.config), source), options.print_config


def build_config(values: dict[str, Any], origin: str, source: CliSettingsSource[Any] | None = None) -> Config:
    """Check values and give the configuration.

    Args:
        values: sections by name.
        origin: where the values come from, for messages.
        source: parsed command line, which goes before the values.

    Raises:
        UserError: an unknown key or a value out of range; names key, value and expectation.
    """
    try:
        return Config(_cli_settings_source=source, **values)
    except ValidationError as error:
        given = source.env_vars if source else {}
        raise UserError("\n".join(_explain(item, origin, given) for item in error.errors())) from None
    except SettingsError as error:  # a section that is given as a whole, and is no mapping
        section = str(error).partition('"')[2].partition('"')[0]
        raise UserError(f"command line: --{section}: expected a mapping; give --{section}.key value") from None


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe. Its key `base` names another one, over whose values it is laid: a file in the same
    folder, or a recipe of the package.

    Args:
        path: the file, or the name of a recipe of the package, e.g. `voc_vit_b`.
        above: recipes that are laid over this one.

    Raises:
        UserError: the file is missing, is not a YAML mapping of sections, or is laid over itself.
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
        raise UserError(f"{path}: more than {MAX_ENTRIES} entries, its references counted out; expected a recipe")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: expected a mapping of sections (run:, data:, model:, …)")
    base = values.pop("base", None)
    if base is None:
        return values
    beside = path.parent / str(base)
    found = beside if beside.is_file() or Path(str(base)).suffix else Path(str(base))
    return _merge(read_yaml(found, (*above, path)), values)


def dump_config(config: Config) -> str:
    """Write a configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _file_options() -> Parser:
    parser = Parser("train", description="Train from image-level labels.", formatter_class=argparse.HelpFormatter)
    parser.add_argument(
        "--config", type=Path, default=CONFIG_FOLDER / "synthetic.yaml", help="recipe: its name, or a YAML file"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    return parser


def _count_entries(values: Any, known: dict[int, int]) -> int:
    """Count the entries of nested values as if every reference (`*name`) were written out; each is visited once."""
    if not isinstance(values, (dict, list)):
        return 1
    if id(values) not in known:
        known[id(values)] = MAX_ENTRIES + 1  # if it holds itself, it has no end
        inner = values.values() if isinstance(values, dict) else values
        known[id(values)] = 1 + sum(_count_entries(value, known) for value in inner)
    return known[id(values)]


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands in a mapping twice, of which YAML would keep the second in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(item: Any, origin: str, given: Mapping[str, Any]) -> str:
    keys = [str(key) for key in item["loc"]]
    name = ".".join(keys)
    if ".".join(keys[:2]) in given:
        origin = "command line"
    if item["type"] == "extra_forbidden":
        return f"{origin}: unknown key {name!r}{nearest(keys[-1], _fields(keys[:-1]))}"
    if item["type"] == "value_error":
        return f"{origin}: {name}{'.' if name else ''}{item['msg'].removeprefix('Value error, ')}"
    return f"{origin}: {name}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"


def _fields(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Config
    for key in path:
        annotation = model.model_fields[key].annotation
        options = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next(kind for kind in options if issubclass(kind, BaseModel))
    return list(model.model_fields)
