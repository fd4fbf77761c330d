"""Decoder: DeepLab-LargeFOV."""

import torch.nn.functional as F
from torch import Tensor, nn


class Decoder(nn.Module):
    """Two 3×3 convolutions of dilation 5 with ReLU, then 1×1 to the classes; no biases.

    Args:
        width: D, channels of the feature map.
        hidden: channels of the dilated convolutions.
        classes: C + 1, background first.
    """

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.conv6 = nn.Conv2d(width, hidden, 3, padding=5, dilation=5, bias=False)
        self.conv7 = nn.Conv2d(hidden, hidden, 3, padding=5, dilation=5, bias=False)
        self.conv8 = nn.Conv2d(hidden, classes, 1, bias=False)
        for layer in (self.conv6, self.conv7, self.conv8):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, C+1, h, w) of a feature map (B, D, h, w)."""
        return self.conv8(F.relu(self.conv7(F.relu(self.conv6(features)))))
