"""A trained network as one function of pictures, for ONNX and torch.export: any number, any size, no Python."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsr_fast.dataloading.reading import format_window
from fsr_fast.errors import UserError
from fsr_fast.method.cam import normalise_cam
from fsr_fast.models import Network
from fsr_fast.models.network import activate, classify, to_map

OUTPUTS = ("segmentation", "scores", "cams")
AGREEMENT = 0.999
"""Share of the pixels on which an exported file must agree with the network."""


class PortableNetwork(nn.Module):
    """Encoder, classifier and decoder in one pass at scale 1.0, normalisation and resizing included.

    `fsr-fast predict` adds up several scales and mirror images; this does not.

    Args:
        network: in eval mode, on the CPU.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Segment pictures of one size.

        Args:
            images: (B, channels, H, W), float32, RGB or other channels in 0…1; H and W at least one patch.

        Returns:
            `segmentation` (B, C+1, H, W), float32, logits, background first; `scores` (B, C), float32, probabilities
            that the picture shows the class; `cams` (B, C, H, W), float32 in 0…1, class activation maps.
        """
        network, patch = self.network, self.network.encoder.patch_size
        height, width = images.shape[-2:]
        whole = ((height + patch // 2) // patch * patch, (width + patch // 2) // patch * patch)
        fitted = F.interpolate(network.normalise(255 * images), size=whole, mode="bilinear", align_corners=False)
        tokens, _, grid, _ = network.encoder(fitted)
        top = network.encoder.norm(tokens)
        segmentation = network.decoder(to_map(top, grid))
        activations = activate(top, network.top_classifier, grid)
        return (
            F.interpolate(segmentation, size=(height, width), mode="bilinear", align_corners=False),
            classify(top, network.top_classifier).sigmoid(),
            normalise_cam(F.interpolate(activations, size=(height, width), mode="bilinear", align_corners=False)),
        )


def export_program(network: Network) -> torch.export.ExportedProgram:
    """Trace the network for pictures of any number and size.

    Args:
        network: in eval mode, on the CPU.
    """
    side = 3 * network.encoder.patch_size + 1  # not a special size, so that nothing becomes a constant
    example = torch.zeros(2, network.config.in_chans, side, side + network.encoder.patch_size + 1)
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    return torch.export.export(PortableNetwork(network).eval(), (example,), dynamic_shapes=(sizes,), strict=False)


def write_onnx(network: Network, path: Path) -> None:
    """Write an ONNX file and compare it with the network.

    Args:
        network: in eval mode, on the CPU.
        path: the file.

    Raises:
        UserError: ONNX's packages are missing, or the file disagrees with the network.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 torch.onnx needs it
    except ImportError as error:
        raise UserError(
            f"export to ONNX needs the package {error.name}: `pip install onnx onnxscript onnxruntime`"
        ) from None
    program = torch.onnx.export(
        export_program(network), dynamo=True, input_names=["images"], output_names=list(OUTPUTS), verbose=False
    )
    assert program is not None
    model = program.model_proto
    for key, value in describe(network).items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    check(network, lambda images: torch.from_numpy(session.run(["segmentation"], {"images": images.numpy()})[0]))


def write_program(network: Network, path: Path) -> None:
    """Write a torch.export program (`torch.export.load` reads it) and compare it with the network.

    Args:
        network: in eval mode, on the CPU.
        path: the file.

    Raises:
        UserError: the program disagrees with the network.
    """
    with path.open("x+b") as file:  # given a name, torch would require .pt2
        torch.export.save(export_program(network), file, extra_files=describe(network))
        file.seek(0)
        module: Any = torch.export.load(file).module()
    check(network, lambda images: module(images)[0])


def describe(network: Network) -> dict[str, str]:
    """Return what a reader of an exported file must know."""
    channels, window = network.config.in_chans, network.reading.window
    kind = "RGB" if channels == 3 else "channels"
    known = {"classes": ",".join(network.classes), "background": "0", "input": f"{kind} in 0…1, (B, {channels}, H, W)"}
    return known if window is None else {**known, "window": f"{format_window(window)} became 0 and 1"}


@torch.no_grad()
def check(network: Network, segment: Any) -> None:
    """Compare classes pixel by pixel on noise of three sizes, the network's own and two odd ones.

    Raises:
        UserError: they agree on fewer than `AGREEMENT` of the pixels.
    """
    own, generator = PortableNetwork(network), torch.Generator().manual_seed(0)
    side = network.image_size
    for batch, height, width in ((1, side, side), (2, side + 5, side // 2 + 3), (1, side // 2, 2 * side - 1)):
        coarse = torch.rand(batch, network.config.in_chans, 6, 6, generator=generator)
        images = F.interpolate(coarse, size=(height, width), mode="bilinear")
        same = (own(images)[0].argmax(1) == segment(images).argmax(1)).double().mean().item()
        if same < AGREEMENT:
            raise UserError(
                f"the exported file and the network agree on {same:.2%} of the pixels at {height} by {width}; "
                f"expected {AGREEMENT:.1%}: this network cannot be exported with these versions of torch and onnx"
            )
