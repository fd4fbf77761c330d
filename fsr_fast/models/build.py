"""Networks from a configuration or from a checkpoint."""

from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from fsr_fast.config import ModelConfig, build_config
from fsr_fast.dataloading.class_names import check_class_names
from fsr_fast.errors import UserError
from fsr_fast.models.backbone import create_vit
from fsr_fast.models.folder import is_network_folder, read_folder
from fsr_fast.models.initial import start_from
from fsr_fast.models.network import Network
from fsr_fast.models.official import class_names, fill_network, official_sizes, read_official
from fsr_fast.models.pretrained import load_pretrained
from fsr_fast.runtime.checkpoint import read_checkpoint


def build_network(config: ModelConfig, classes: tuple[str, ...], image_size: int) -> Network:
    """Build the network and load the weights that it starts from.

    Args:
        config: the model's section.
        classes: names of the C foreground classes.
        image_size: side of the training views, in pixels.

    Raises:
        UserError: an unknown backbone, weights that cannot be had, an image size that does not fit.
    """
    vit = create_vit(config)
    if config.initial is None:
        load_pretrained(vit, config)
    own = config.normalisation == "checkpoint"
    mean = tuple(vit.pretrained_cfg["mean"]) if own else IMAGENET_DEFAULT_MEAN
    std = tuple(vit.pretrained_cfg["std"]) if own else IMAGENET_DEFAULT_STD
    network = Network(config, vit, classes, image_size, mean, std)
    if config.initial is not None:
        start_from(network, load_network(config.initial), str(config.initial))
    return network


def without_start(config: ModelConfig) -> ModelConfig:
    """The same network from random weights, for those of a checkpoint that will take their place."""
    return config.model_copy(update={"pretrained": "none", "initial": None})


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
    if is_network_folder(Path(path)):
        return restore_folder(Path(path))
    weights = read_official(Path(path))
    if weights is not None:
        return restore_official(weights, str(path))
    return restore_network(read_checkpoint(Path(path)), str(path))


def restore_network(checkpoint: dict[str, Any], origin: str) -> Network:
    """Build the network that a checkpoint describes and fill it with its weights.

    Args:
        checkpoint: as `read_checkpoint` gives it.
        origin: the file, for messages.
    """
    values, classes, weights = (checkpoint.get(key) for key in ("config", "classes", "student"))
    if not (isinstance(values, dict) and isinstance(classes, list) and isinstance(weights, dict)):
        raise UserError(f"{origin}: does not describe a network; expected config, classes and student in it")
    config = build_config(values, origin)
    network = build_network(without_start(config.model), tuple(map(str, classes)), config.data.image_size)
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = " ".join(str(error).split()[:40])
        raise UserError(
            f"{origin}: the weights do not fit the network that the checkpoint describes: {first}"
        ) from None
    return _checked(network, origin)


def restore_official(weights: dict[str, Tensor], origin: str) -> Network:
    """Build the network of an official checkpoint; its sizes are read off the tensors, its classes off their number.

    Args:
        weights: as `read_official` gives them.
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
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split()[:40])
        raise UserError(f"{folder}: the weights do not fit the description: {first}; export it again") from None
    return _checked(network, str(folder))


def _checked(network: Network, origin: str) -> Network:
    """Refuse names that cannot be shown, and weights that find nothing."""
    check_class_names(network.classes, origin)
    for name, value in network.state_dict().items():
        if not bool(value.isfinite().all()):
            raise UserError(
                f"{origin}: the weights {name!r} are not finite, so the network finds nothing; give another"
            )
    return network.eval()
