"""The whole network: encoder with aggregator, classifiers, decoder, projector."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsr_fast.config import ModelConfig
from fsr_fast.dataloading.pixels import normalise
from fsr_fast.dataloading.reading import Reading
from fsr_fast.models.decoder import Decoder
from fsr_fast.models.encoder import Encoder
from fsr_fast.models.projector import Projector


class NetworkOutput(NamedTuple):
    """All outputs of the network for a batch of images."""

    class_logits: Tensor
    """(B, C), image-level logits of the classifier on the top feature map."""
    aux_class_logits: Tensor
    """(B, C), the same on the auxiliary feature map."""
    seg_logits: Tensor
    """(B, C+1, h, w), decoder, background first."""
    patch_features: Tensor
    """(B, D, h, w), top feature map."""
    aux_features: Tensor
    """(B, D, h, w), auxiliary feature map."""
    class_token: Tensor
    """(B, D), from the aggregator, no patch masked."""
    cam: Tensor
    """(B, C, h, w), ≥ 0, class activation map of the classifier, not normalised."""
    aux_cam: Tensor
    """(B, C, h, w), the same of the auxiliary classifier."""


class Network(nn.Module):
    """Student of the method; its parameters carry the names of the official checkpoints.

    Args:
        config: sizes and switches.
        vit: the transformer whose blocks and weights the encoder takes over.
        classes: names of the C foreground classes.
        image_size: side of the training views, in pixels.
        mean: of each input channel, for images in 0…1.
        std: standard deviation, likewise.
    """

    def __init__(
        self,
        config: ModelConfig,
        vit: Any,
        classes: tuple[str, ...],
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.config = config
        self.classes = classes
        self.image_size = image_size
        self.reading = Reading(channels=config.in_chans)
        self.set_normalisation(mean, std)
        self.encoder = Encoder(vit, config, image_size)
        width = self.encoder.width
        self.decoder = Decoder(width, config.decoder_width, len(classes) + 1)
        self.projector = Projector(width, config.projector_hidden, config.bottleneck, config.prototypes)
        self.top_classifier = nn.Conv2d(width, len(classes), 1, bias=False)
        self.aux_classifier = nn.Conv2d(width, len(classes), 1, bias=False)

    def set_normalisation(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Set mean and standard deviation of the input's channels, for images in 0…1."""
        self.mean, self.std = mean, std
        for name, values in (("exact_mean", mean), ("exact_std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64).view(-1, 1, 1), persistent=False)
        self.exact_mean: Tensor
        self.exact_std: Tensor

    def normalise(self, pixels: Tensor) -> Tensor:
        """Bring grey levels (…, channels, H, W) of 0…255, of any dtype, to the network's device and range: float32."""
        return normalise(pixels.to(self.exact_mean.device), self.exact_mean.float(), self.exact_std.float())

    def grey_levels(self, images: Tensor) -> Tensor:
        """Undo the normalisation.

        Args:
            images: (B, channels, H, W), normalised.

        Returns:
            (B, 3, H, W), float32, grey levels of 0…255, not rounded; with other than three channels, of
            the preview. Source: official code, dense energy.
        """
        # The last bit of factor and shift decides how a grey level is rounded: use the nearest float32.
        factor, shift = ((255 * value.double()).float() for value in (self.exact_std, self.exact_mean))
        levels = images.to(factor.device) * factor + shift
        shown = list(self.reading.shown)
        return levels if levels.shape[1] == 3 and shown == [0, 1, 2] else levels[:, shown]

    def denormalise(self, images: Tensor) -> Tensor:
        """Undo the normalisation: as `grey_levels`, rounded down to whole numbers in 0…255."""
        return self.grey_levels(images).clamp(0, 255).floor()

    def forward(self, images: Tensor) -> NetworkOutput:
        """Run every part once, without masks.

        Args:
            images: (B, channels, H, W), normalised; H and W multiples of the patch size.
        """
        tokens, aux, grid, _ = self.encoder(images)
        top = self.encoder.norm(tokens)
        return NetworkOutput(
            class_logits=classify(top, self.top_classifier),
            aux_class_logits=classify(aux, self.aux_classifier),
            seg_logits=self.decoder(to_map(top, grid)),
            patch_features=to_map(top, grid),
            aux_features=to_map(aux, grid),
            class_token=self.encoder.aggregate(tokens),
            cam=F.relu(activate(top, self.top_classifier, grid)),
            aux_cam=F.relu(activate(aux, self.aux_classifier, grid)),
        )


def classify(tokens: Tensor, classifier: nn.Conv2d) -> Tensor:
    """Image-level logits: the classifier on the maximum of each feature over the patches.

    Args:
        tokens: (B, N, D).
        classifier: 1×1 projection D → C.

    Returns:
        (B, C).
    """
    return F.linear(tokens.amax(1).to(classifier.weight.dtype), classifier.weight.flatten(1))


def activate(tokens: Tensor, classifier: nn.Conv2d, grid: tuple[int, int]) -> Tensor:
    """Class activations before ReLU.

    Args:
        tokens: (B, N, D).
        classifier: 1×1 projection D → C.
        grid: h and w.

    Returns:
        (B, C, h, w).
    """
    return F.linear(tokens, classifier.weight.flatten(1)).transpose(1, 2).unflatten(2, grid)


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Arrange tokens (B, N, D) as a feature map (B, D, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid)
