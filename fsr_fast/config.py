"""The typed configuration: one YAML file over the defaults, then `--section.key value` on the command line.

`fsr-fast train --help` prints all fields with their descriptions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from fsr_fast.config_fields import Section
from fsr_fast.config_method import (
    CamConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PseudoLabelConfig,
    TeacherConfig,
)
from fsr_fast.config_sections import AugmentConfig, DataConfig, EvaluateConfig, RunConfig
from fsr_fast.errors import UserError, nearest
from fsr_fast.options import Given, Parser, expectation, given
from fsr_fast.plugins import DATASETS, LOSSES, load_plugins
from fsr_fast.recipes import CONFIG_FOLDER, merge, read_yaml

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
    "check_options",
    "dump_config",
    "load_config",
    "merge",
    "read_yaml",
    "untrained_decoder",
    "user_config",
]


class Config(Section):
    """Everything that defines a run."""

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

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.data.dataset != "synthetic" and self.data.root is None:
            raise ValueError(
                f"data.root: missing; the data set {self.data.dataset!r} needs a folder: --data.root FOLDER"
            )
        if self.run.shard and self.cam.fp8:
            raise ValueError(
                "cam.fp8: needs whole weights, but run.shard shards them; give --cam.fp8 false or --run.shard false"
            )
        self._check_channels()
        named = re.search(r"patch(\d+)", self.model.backbone)
        patch = self.model.backbone_options.get("patch_size", int(named[1]) if named else 1)
        if isinstance(patch, int) and patch > 0 and self.data.image_size % patch:
            near = max(patch, round(self.data.image_size / patch) * patch)
            raise ValueError(
                f"data.image_size: {self.data.image_size} is not a multiple of the patch size {patch} of "
                f"model.backbone {self.model.backbone}; the nearest that fits: --data.image_size {near}"
            )
        return self

    def _check_channels(self) -> None:
        channels, data = self.model.in_chans, self.data
        pairs = 1 if data.window == "auto" or data.window[0] == "percentile" else len(data.window) // 2
        if pairs not in (1, channels):
            raise ValueError(
                f"data.window: {pairs} pairs for {channels} channels (model.in_chans); give one pair, or one for each"
            )
        if max(data.preview_channels or (1,)) > channels:
            raise ValueError(
                f"data.preview_channels: {max(data.preview_channels or ())} of {channels} channels (model.in_chans)"
            )
        if channels != 3 and self.augment.policy != "none":
            raise ValueError(
                f"augment.policy: {self.augment.policy} is for three colours, model.in_chans is {channels}; give "
                "--augment.policy none"
            )
        if channels != 3 and self.run.engine == "reference":
            raise ValueError(
                f"run.engine: the reference is for three colours, model.in_chans is {channels}; give --run.engine fast"
            )


SECTIONS: dict[str, type[BaseModel]] = {name: type(field.default) for name, field in Config.model_fields.items()}
DEFAULT_RECIPE = "synthetic"
CHANGED_FIRST = (
    *("run.output", "run.seed", "run.device", "data.dataset", "data.root", "data.train_list", "data.val_list"),
    *("data.image_size", "optim.iterations", "optim.batch_size", "optim.learning_rate", "mask.ratio"),
)
"""Keys that `fsr-fast train --help` describes."""


class RecipeParser(Parser):
    """Parser of a recipe and of all keys of the configuration.

    Args:
        verb: what the user calls.
        shown: keys that the help describes.
        **settings: of argparse.
    """

    def __init__(self, verb: str, shown: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(verb, **settings)
        self.add_argument(
            "--config", default=DEFAULT_RECIPE, help="recipe: its name, or a YAML file (default: %(default)s)"
        )
        self.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
        self.add_sections(SECTIONS, shown=shown)

    def defaults(self) -> Mapping[str, Any]:
        """Return the values of the recipe named on the command line."""
        words = [part for argument in self.arguments for part in argument.split("=", 1)]
        recipe = words[words.index("--config") + 1] if "--config" in words[:-1] else DEFAULT_RECIPE
        return build_config(read_yaml(Path(recipe)), recipe).model_dump(mode="json")


def build_parser() -> Parser:
    """Build the parser of `fsr-fast train`: an option for every field."""
    return RecipeParser(
        "train",
        CHANGED_FIRST,
        usage="fsr-fast train [--config RECIPE] [--section.key value …] [--print-config]",
        description="Train from image-level labels; the same command resumes the run.",
        epilog="The recipe's value is in brackets.",
    )


def load_config(arguments: Sequence[str]) -> tuple[Config, bool]:
    """Read the configuration of a run.

    Args:
        arguments: the command line, e.g. `["--config", "configs/voc_vit_b.yaml", "--optim.iterations", "100"]`.
            Without `--config`, the recipe of the embedded data set is read.

    Returns:
        The configuration, and whether `--print-config` was asked for.

    Raises:
        UserError: an unknown key, a value out of range, a file that cannot be read.
    """
    options = build_parser().parse_args(arguments)
    return user_config(options.config, given(options)), options.print_config


def user_config(recipe: str, options: Mapping[str, Given]) -> Config:
    """Import the plug-ins that a command line names, and return the configuration that it describes.

    Args:
        recipe: name or file.
        options: from the command line; they override the recipe.

    Raises:
        UserError: as `load_config`; a plug-in that cannot be imported, an unknown loss or data set.
    """
    config = build_config(read_yaml(Path(recipe)), recipe, options)
    load_plugins(config.run.plugins)
    LOSSES.check(config.loss.extra)
    DATASETS.check([config.data.dataset])
    return config


def build_config(values: dict[str, Any], origin: str, options: Mapping[str, Given] | None = None) -> Config:
    """Check values and return the configuration.

    Args:
        values: sections by name.
        origin: where the values come from, for messages.
        options: from the command line; they override the values.

    Raises:
        UserError: an unknown key or a value out of range; names key, value and expectation.
    """
    merged = dict(values)
    for key, item in (options or {}).items():
        section, _, name = key.partition(".")
        if isinstance(merged.setdefault(section, {}), dict):  # anything else is refused below
            merged[section] = merge(merged[section], {name: item.value})
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(error, origin, options or {})) from None


def check_options(options: Mapping[str, Given]) -> None:
    """Check the configuration keys given on the command line, before the rest is known.

    Raises:
        UserError: a value out of range.
    """
    for key, item in options.items():
        section, _, name = key.partition(".")
        try:
            SECTIONS[section].model_validate({name: item.value})
        except ValidationError as error:
            raise UserError(_explain(error, "command line", options, section)) from None


def untrained_decoder(config: Config, iterations: int) -> str | None:
    """Explain why the decoder of a training has learned nothing, if that is the case.

    Args:
        config: of the training.
        iterations: its length so far.
    """
    start, length = config.loss.segmentation_start, config.optim.iterations
    if config.loss.segmentation == 0:
        return "loss.segmentation is 0, so the decoder learns nothing and its masks are noise"
    if start < iterations:
        return None
    if start < length:
        learns, remedy = "has learned nothing yet", "let the training go on"
    else:
        learns, remedy = "learns nothing", f"--loss.segmentation_start {length // 3}"
    return (
        f"loss.segmentation_start is {start}, of {iterations} iterations, so the decoder {learns} and its masks are "
        f"noise; class activation maps and pseudo labels are not. To train it: {remedy}"
    )


def dump_config(config: Config) -> str:
    """Write a configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explain(error: ValidationError, origin: str, options: Mapping[str, Given], *above: str) -> str:
    """Describe what is wrong, one line per fault; where a value may have several forms, only their names."""
    found = [((*above, *item["loc"]), item) for item in error.errors()]
    short = [keys for keys, item in found if item["type"] == "too_short"]
    lines = [
        _explain_one(item, keys, origin, options)
        for keys, item in found
        if not (keys in short and any(other != keys and other[: len(keys)] == keys for other, _ in found))
    ]
    return "\n".join(dict.fromkeys(lines))


def _explain_one(item: Any, path: Sequence[str | int], origin: str, options: Mapping[str, Given]) -> str:
    keys = [str(key) for key in path]
    forms = _forms(keys)
    keys = keys[:2] if forms else keys
    name, wrong = ".".join(keys), repr(item["input"])
    if option := options.get(".".join(keys[:2])):
        origin, name, wrong = "command line", ".".join([option.option, *keys[2:]]), str(item["input"])
    if item["type"] == "extra_forbidden":
        return f"{origin}: unknown key {name!r}{nearest(keys[-1], _fields(keys[:-1]))}"
    if item["type"] == "value_error":
        return f"{origin}: {name}{'.' if name else ''}{item['msg'].removeprefix('Value error, ')}"
    message = f"expected {forms}" if forms else f"{item['msg'][0].lower()}{item['msg'][1:]}"
    return f"{origin}: {name}: {message}, not {wrong}"


def _forms(keys: Sequence[str]) -> str | None:
    """Return the allowed forms of a value that may have several, where an error is about one of them."""
    field = SECTIONS[keys[0]].model_fields.get(keys[1]) if len(keys) > 2 and keys[0] in SECTIONS else None
    parts = [part for part in get_args(field.annotation) if part is not NoneType] if field else []
    several = len(parts) > 1 and get_origin(field.annotation if field else None) in (Union, UnionType)
    return expectation(field.annotation).replace("|", ", ") if several and field else None


def _fields(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Config
    for key in path:
        annotation = model.model_fields[key].annotation
        options = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next(kind for kind in options if issubclass(kind, BaseModel))
    return list(model.model_fields)
