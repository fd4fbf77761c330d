"""Networks from a configuration or from a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from fsr_fast.config import (
    Config,
    ModelConfig,
    RunConfig,
    build_config,
    check_options,
    merge,
    read_yaml,
    untrained_decoder,
)
from fsr_fast.dataloading.class_names import check_class_names
from fsr_fast.dataloading.measured import Measured, read_measured
from fsr_fast.dataloading.reading import Reading, Window, given_window
from fsr_fast.errors import UserError
from fsr_fast.models.backbone import create_vit
from fsr_fast.models.folder import is_network_folder, read_folder
from fsr_fast.models.initial import start_from
from fsr_fast.models.network import Network
from fsr_fast.models.official import class_names, fill_network, official_sizes, read_official
from fsr_fast.models.pretrained import load_pretrained
from fsr_fast.options import Given
from fsr_fast.plugins import load_plugins
from fsr_fast.runtime.checkpoint import has_checksum, read_checkpoint
from fsr_fast.runtime.log import LOGGER


def build_network(
    config: ModelConfig, classes: tuple[str, ...], image_size: int, measured: Measured | None = None
) -> Network:
    """Build the network and load the weights that it starts from.

    Args:
        config: the model's section.
        classes: names of the C foreground classes.
        image_size: side of the training views, in pixels.
        measured: window, mean and std measured over the training pictures; None: pictures of 8 bits.

    Raises:
        UserError: an unknown backbone, unavailable weights, an image size that does not fit.
    """
    vit = create_vit(config)
    if config.initial is None:
        load_pretrained(vit, config)
    network = Network(config, vit, classes, image_size, *_normalisation(config, vit, measured))
    if measured is not None:
        network.reading = replace(network.reading, window=measured.window)
    if config.initial is not None:
        start_from(network, load_network(config.initial), str(config.initial))
    return network


def _normalisation(
    config: ModelConfig, vit: Any, measured: Measured | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the input."""
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    if takes_measured(config):
        found = measured or Measured(None, (0.5,) * config.in_chans, (0.5,) * config.in_chans)
        return found.mean, found.std
    if config.normalisation == "imagenet":
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return tuple(vit.pretrained_cfg["mean"]), tuple(vit.pretrained_cfg["std"])


def takes_measured(config: ModelConfig) -> bool:
    """Return whether mean and standard deviation of the input are those of the training pictures."""
    return config.mean is None and (config.in_chans != 3 or config.normalisation == "data")


def without_start(config: ModelConfig) -> ModelConfig:
    """Configuration of the same network with random weights, which a checkpoint's will replace."""
    return config.model_copy(update={"pretrained": "none", "initial": None})


class Trained(NamedTuple):
    """A trained network, and what is known of its training."""

    network: Network
    """In eval mode, on the CPU."""
    config: Config
    """Its run's, if the checkpoint holds it, overridden by a recipe and the command line."""
    iteration: int | None
    """Iteration at which it was saved; None if the file does not say."""
    named: bool
    """Whether the classes have the names that they were trained with: official checkpoints hold none."""

    def match_classes(self, classes: tuple[str, ...]) -> None:
        """Check that the classes of a data set are the network's; a network without names takes the data set's.

        Args:
            classes: names of the data set's foreground classes, in its order.

        Raises:
            UserError: other classes, or another order.
        """
        if not self.named and len(classes) == len(self.network.classes):
            self.network.classes = classes
        if classes != self.network.classes:
            raise UserError(f"data: its classes {classes} are not those of the checkpoint, {self.network.classes}")


def reading_of(config: Config, window: Window | None) -> Reading:
    """Return how pictures are read.

    Args:
        config: number of channels, preview, largest picture.
        window: of pictures deeper than 8 bits, as given or measured in training.
    """
    preview = config.data.preview_channels
    shown = None if preview is None else tuple(channel - 1 for channel in preview)
    return Reading(config.model.in_chans, window, shown, config.data.max_pixels)


APPLIED = ("run", "data", "cam", "evaluate")
"""Sections that apply when a trained network is used."""


def open_trained(
    path: Path,
    options: Mapping[str, Given] | None = None,
    recipe: Path | None = None,
    *,
    with_data: bool = False,
    teacher: bool = False,
) -> Trained:
    """Open a trained network with the configuration to use it with; the checkpoint is read once.

    Args:
        path: a run folder (its newest checkpoint is taken), a checkpoint file, a folder that `fsr-fast export` wrote,
            or an official `student.pth` or `teacher.pth`.
        options: configuration keys from the command line.
        recipe: overrides the configuration of the checkpoint.
        with_data: the data set will be opened, so the configuration must name it.
        teacher: open the averaged network of a run. Where only the projector is averaged, the rest is the student's.

    Raises:
        UserError: no checkpoint, one that is damaged or of another kind, no such recipe, a value out of range.
    """
    options = options or {}
    check_options(options)
    laid, origin = ({}, str(path)) if recipe is None else (read_yaml(recipe), str(recipe))
    load_plugins(_named_plugins(options, laid))
    network, recorded, iteration, named = _open(path, teacher)
    found = network.reading.window
    if with_data and recorded is None and recipe is None and "data.dataset" not in options:
        raise UserError(
            f"{path}: does not name its data set; add the recipe and the folder, e.g. --config voc_official "
            "--root VOCdevkit/VOC2012"
        )
    if recorded is not None:
        values = merge(recorded, {name: laid[name] for name in APPLIED if name in laid})
    else:
        values = laid or {"data": {"dataset": "synthetic"}}  # the only one that needs no folder
        if network.config.in_chans != 3:
            values = merge(values, {"model": {"in_chans": network.config.in_chans}, "augment": {"policy": "none"}})
    config = build_config(values, origin, options)
    network.reading = reading_of(config, given_window(config.data) or found)
    asked_for = "data.root" in options or "root" in (laid.get("data") or {})
    if with_data and isinstance(config.data.root, str) and not asked_for:
        raise UserError(
            f"{path}: names the address {config.data.root!r} for its data; an address that only a checkpoint names is "
            "not opened: give it, or a folder, by --root"
        )
    if iteration is not None and (reason := untrained_decoder(config, iteration)):
        LOGGER.warning("%s: %s", path, reason)
    return Trained(network, config, iteration, named)


def _named_plugins(options: Mapping[str, Given], laid: dict[str, Any]) -> tuple[str, ...]:
    """Return the plug-ins that the user names; those that a checkpoint names are never imported."""
    section = laid.get("run")
    of_recipe = section.get("plugins", ()) if isinstance(section, dict) else ()
    named = options.get("run.plugins", Given("run.plugins", of_recipe))
    check_options({"run.plugins": named})
    return RunConfig(plugins=named.value).plugins


def _open(path: Path, teacher: bool) -> tuple[Network, dict[str, Any] | None, int | None, bool]:
    """Read the network, the recorded configuration, the iteration, and whether the classes have their names."""
    if is_network_folder(path) and not teacher:
        return restore_folder(path), None, None, True
    weights = None if teacher or path.is_dir() or has_checksum(path) else read_official(path)
    if weights is not None:
        return restore_official(weights, str(path)), None, None, False
    checkpoint = read_checkpoint(path)
    if teacher:
        checkpoint = {**checkpoint, "student": checkpoint["student"] | _averaged(checkpoint["teacher"])}
    return restore_network(checkpoint, str(path)), checkpoint["config"], checkpoint["iteration"], True


def load_network(path: str | Path) -> Network:
    """Load a trained network.

    Args:
        path: a run folder (its newest checkpoint is taken), a checkpoint file, a folder that `fsr-fast export` wrote,
            or an official `student.pth` or `teacher.pth`.

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        UserError: there is no checkpoint, or it is damaged or of another kind.
    """
    return open_trained(Path(path)).network


def _averaged(teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the teacher's weights to the network's names."""
    parts = ((name.partition("."), value) for name, value in teacher.items())
    return {rest if part == "network" else f"projector.{rest}": value for (part, _, rest), value in parts}


def restore_network(checkpoint: dict[str, Any], origin: str) -> Network:
    """Build the network that a checkpoint describes and fill it with its weights.

    Args:
        checkpoint: from `read_checkpoint`.
        origin: the file, for messages.
    """
    values, classes, weights = (checkpoint.get(key) for key in ("config", "classes", "student"))
    if not (isinstance(values, dict) and isinstance(classes, list) and isinstance(weights, dict)):
        raise UserError(f"{origin}: does not describe a network; expected config, classes and student in it")
    config = build_config(values, origin)
    measured = read_measured(checkpoint.get("input"), config.model.in_chans, origin)
    names = tuple(map(str, classes))
    try:
        network = build_network(without_start(config.model), names, config.data.image_size, measured)
    except UserError as error:
        used = f"; its training used {list(config.run.plugins)!r}" if config.run.plugins else ""
        raise UserError(f"{origin}: {error}{used}") from None
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = " ".join(str(error).split()[:40])
        raise UserError(
            f"{origin}: the weights do not fit the network that the checkpoint describes: {first}"
        ) from None
    return _checked(network, origin)


def restore_official(weights: dict[str, Tensor], origin: str) -> Network:
    """Build the network of an official checkpoint; its sizes come from the tensors, its class names from their number.

    Args:
        weights: from `read_official`.
        origin: the file, for messages.

    Raises:
        UserError: a tensor is missing, unknown or of a shape that does not fit the others.
    """
    sizes = official_sizes(weights, origin)
    network = build_network(sizes.model, class_names(sizes.classes), sizes.image_size)
    fill_network(network, weights, origin)
    return _checked(network, origin)


def restore_folder(folder: Path) -> Network:
    """Build the network that an exported folder describes and fill it with its weights.

    Args:
        folder: as `fsr-fast export` wrote it.

    Raises:
        UserError: a file is damaged, or the weights do not fit the description.
    """
    description, weights = read_folder(folder)
    network = build_network(without_start(description.model), description.classes, description.image_size)
    network.set_normalisation(description.mean, description.std)
    network.reading = replace(network.reading, window=description.window)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split()[:40])
        raise UserError(f"{folder}: the weights do not fit the description: {first}; export it again") from None
    return _checked(network, str(folder))


def _checked(network: Network, origin: str) -> Network:
    """Refuse names that cannot be shown, and weights that are not finite."""
    check_class_names(network.classes, origin)
    for name, value in network.state_dict().items():
        if not bool(value.isfinite().all()):
            raise UserError(f"{origin}: the weights {name!r} are not finite, so the network is useless; give another")
    return network.eval()
