"""The step of a run: the fast one or the literal reference, set up for its device."""

import torch
from torch import nn

from fsr_fast.config import Config
from fsr_fast.errors import UserError
from fsr_fast.method.reference_step import ReferenceStep
from fsr_fast.method.step import FSRStep
from fsr_fast.models import Network
from fsr_fast.models.attention import choose_backend
from fsr_fast.models.encoder import Encoder
from fsr_fast.models.float8 import has_float8
from fsr_fast.runtime.precision import uses_half


def build_step(student: Network, config: Config, max_classes: int) -> FSRStep:
    """Build the step that `run.engine` names, and set the student up for its device as the `run` section says.

    Raises:
        UserError: the device cannot do what the section asks for.
    """
    run, encoder, device = config.run, student.encoder, student.top_classifier.weight.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.tf32
    _check_scales(config, encoder.patch_size)
    encoder.attention = choose_backend(run.attention, device, half=uses_half(device, run.amp))
    encoder.checkpointing = run.checkpointing
    if run.compile is True or (run.compile == "auto" and device.type == "cuda" and not run.shard):
        encoder.compile_blocks()
    if device.type == "cuda" and not run.shard:  # only contiguous weights can be shared out
        student.decoder.to(memory_format=torch.channels_last)
    if config.cam.fp8:
        _check_float8(encoder, device)
    return (ReferenceStep if run.engine == "reference" else FSRStep)(student, config, max_classes)


def _check_scales(config: Config, patch: int) -> None:
    side = config.data.image_size
    for scale in config.cam.scales:
        if round(side * scale / patch) < 1:
            raise UserError(
                f"cam.scales: {scale} leaves no patch of {patch} pixels of an image of {side}; give at least "
                f"{patch / side:.2g}"
            )


def _check_float8(encoder: Encoder, device: torch.device) -> None:
    if not has_float8(device):
        raise UserError("cam.fp8: this GPU has no float8; it takes compute capability 8.9 or later; --cam.fp8 false")
    layers = [layer for layer in encoder.blocks.modules() if isinstance(layer, nn.Linear)]
    if any(side % 16 for layer in layers for side in layer.weight.shape):
        raise UserError("cam.fp8: the backbone needs widths that are multiples of 16; --cam.fp8 false")
