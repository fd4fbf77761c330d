"""Starting a training from a trained network."""

import logging

from torch import Tensor

from fsr_fast.errors import UserError
from fsr_fast.models.network import Network
from fsr_fast.models.official import Normalisation, count_heads, renormalise_patches
from fsr_fast.models.positions import resize_position_embedding

CLASS_LAYERS = ("top_classifier.weight", "aux_classifier.weight", "decoder.conv8.weight")
"""Layers whose channels are classes: they are only taken over for the same classes."""
OWN_PARTS = ("encoder.cls_token", "encoder.cls_blocks.", "encoder.mask_token")
"""Parts of the encoder besides the trunk."""

logger = logging.getLogger(__name__)


def start_from(network: Network, source: Network, origin: str) -> list[str]:
    """Take over the weights of a trained network wherever they fit; the encoder's trunk must.

    The position embedding is resized to the grid, and the patch embedding rewritten for the normalisation.

    Args:
        network: changed in place.
        source: the trained network; classes and sizes of decoder, projector and aggregator may differ.
        origin: its source, for messages.

    Returns:
        Names of the weights that keep their random values; they are logged as a warning.

    Raises:
        UserError: the trunk differs.
    """
    weights = _adapted(source, network, origin)
    expected = network.state_dict()
    same_classes = source.classes == network.classes
    taken = {
        name: value
        for name, value in weights.items()
        if name in expected and value.shape == expected[name].shape and (same_classes or name not in CLASS_LAYERS)
    }
    left = [name for name in expected if name not in taken]
    heads = count_heads(source)
    trunk = [name for name in left if name.startswith("encoder.") and not name.startswith(OWN_PARTS)]
    if trunk or heads != count_heads(network) or source.encoder.depth != network.encoder.depth:
        difference = f"{trunk[0]!r} does not fit" if trunk else f"{source.encoder.depth} blocks of {heads} heads"
        raise UserError(
            f"model.initial: {origin} has a different encoder from model.backbone: {difference}; "
            "name the backbone (model.backbone, backbone_options, prefix_tokens) that it was trained with"
        )
    network.load_state_dict(taken, strict=False)
    if left:
        logger.warning("%s: not taken, for other classes or sizes: %s", origin, ", ".join(left))
    return left


def _adapted(source: Network, network: Network, origin: str) -> dict[str, Tensor]:
    weights = source.state_dict()
    name = "encoder.pos_embed"
    if name in weights:
        weights[name] = resize_position_embedding(weights[name], source.encoder.grid, network.encoder.grid)
    if source.config.in_chans != network.config.in_chans:
        raise UserError(
            f"model.initial: {origin} takes {source.config.in_chans} channels, model.in_chans is "
            f"{network.config.in_chans}; give the same number"
        )
    renormalise_patches(
        weights, Normalisation(source.mean, source.std), Normalisation(network.mean, network.std), origin
    )
    return weights
