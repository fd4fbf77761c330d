"""Networks from a configuration or from a checkpoint."""

from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from fsr_fast.config import ModelConfig, build_config
from fsr_fast.errors import UserError
from fsr_fast.models.encoder import create_vit
from fsr_fast.models.network import Network
from fsr_fast.models.pretrained import load_pretrained
from fsr_fast.runtime.checkpoint import read_checkpoint


def build_network(config: ModelConfig, classes: tuple[str, ...], image_size: int) -> Network:
    """Build the network and load its pretrained encoder.

    Args:
        config: the model's section.
        classes: names of the C foreground classes.
        image_size: side of the training views, in pixels.

    Raises:
        UserError: an unknown backbone, weights that cannot be had, an image size that does not fit.
    """
    vit = create_vit(config)
    load_pretrained(vit, config)
    own = config.normalisation == "checkpoint"
    mean = tuple(vit.pretrained_cfg["mean"]) if own else IMAGENET_DEFAULT_MEAN
    deviation = tuple(vit.pretrained_cfg["std"]) if own else IMAGENET_DEFAULT_STD
    return Network(config, vit, classes, image_size, mean, deviation)


def load_network(path: str | Path) -> Network:
    """Load a trained network.

    Args:
        path: a run folder (its newest checkpoint is taken) or a checkpoint file.

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        UserError: there is no checkpoint, or it is damaged or of another kind.
    """
    checkpoint = read_checkpoint(Path(path))
    return restore_network(checkpoint, str(path))


def restore_network(checkpoint: dict[str, Any], origin: str) -> Network:
    """Build the network that a checkpoint describes and fill it with its weights.

    Args:
        checkpoint: as `read_checkpoint` gives it.
        origin: the file, for messages.
    """
    config = build_config(checkpoint["config"], origin)
    without_weights = config.model.model_copy(update={"pretrained": "none"})
    network = build_network(without_weights, tuple(checkpoint["classes"]), config.data.image_size)
    try:
        network.load_state_dict(checkpoint["student"])
    except RuntimeError as error:
        first = " ".join(str(error).split()[:40])
        raise UserError(
            f"{origin}: the weights do not fit the network that the checkpoint describes: {first}"
        ) from None
    return network.eval()
