"""The step of a run: the fast one or the literal reference, set up for its device."""

import logging
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from fsr_fast.config import Config, RunConfig
from fsr_fast.errors import UserError
from fsr_fast.method.cam import scaled_size
from fsr_fast.method.reference_step import ReferenceStep
from fsr_fast.method.step import FSRStep
from fsr_fast.models import Network
from fsr_fast.models.attention import Backend, Backends, Groups, choose_backend, fastest_backend
from fsr_fast.models.encoder import Encoder
from fsr_fast.models.float8 import has_float8
from fsr_fast.runtime.distributed import from_first, world_size
from fsr_fast.runtime.precision import uses_half
from fsr_fast.runtime.terminal import on_main_process

logger = logging.getLogger(__name__)


def build_step(student: Network, config: Config, max_classes: int) -> FSRStep:
    """Build the step of `run.engine`, and set the student up for its device as the `run` section says.

    Raises:
        UserError: the device cannot do what the section asks for.
    """
    run, encoder, device = config.run, student.encoder, student.top_classifier.weight.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.tf32
    _check_scales(config, encoder.patch_size)
    if run.graphs is True and device.type != "cuda":
        raise UserError(f"run.graphs: CUDA graphs need a GPU, and this run is on {device.type}; --run.graphs false")
    encoder.checkpointing = run.checkpointing
    if run.compile is True or (run.compile == "auto" and device.type == "cuda" and not run.shard):
        encoder.compile_blocks(graphs=uses_graphs(run, device, world_size()))
    if device.type == "cuda" and not run.shard:  # only contiguous weights can be sharded
        student.decoder.to(memory_format=torch.channels_last)
    if config.cam.fp8:
        _check_float8(encoder, device)
    usual = choose_backend(run.attention, device, half=uses_half(device, run.amp))
    _set_attention(student, Backends(usual, usual, usual))
    if run.engine == "reference":
        return ReferenceStep(student, config, max_classes)
    step = FSRStep(student, config, max_classes)
    if run.attention == "auto" and device.type == "cuda" and uses_half(device, run.amp):
        _set_attention(step, _measure_backends(step, usual))
    return step


def uses_graphs(run: RunConfig, device: torch.device, processes: int) -> bool:
    """Return whether compiled blocks are replayed as CUDA graphs; `auto` does not where that has not been tried.

    Args:
        run: the section.
        device: of the step.
        processes: number of processes that train.
    """
    if run.graphs == "auto":
        return device.type == "cuda" and processes == 1 and not run.checkpointing
    return run.graphs


def _measure_backends(step: FSRStep, evaluation: Backend) -> Backends:
    """Measure in the first process the fastest attention of each kind of pass."""
    encoder = step.student.encoder
    heads: int = encoder.blocks[0].attn.num_heads
    alike, several = training_groups(step, world_size())
    fastest = partial(fastest_backend, heads=heads, width=encoder.width // heads, device=step.device)
    single, packed = from_first(
        (fastest(alike, gradient=True), fastest(several, gradient=False)) if on_main_process() else None
    )
    return Backends(single, packed, evaluation)


def _set_attention(module: nn.Module, backends: Backends) -> None:
    for part in module.modules():
        if isinstance(part, Encoder):
            part.attention = backends


def keep_backends(step: nn.Module, config: Config, recorded: Sequence[str], device: torch.device) -> None:
    """Keep the backends that a run measured when it began, if they can run here.

    Args:
        step: of the resumed run.
        config: its configuration.
        recorded: `Backends`, as a checkpoint holds them.
        device: of the step.
    """
    if config.run.attention != "auto" or device.type != "cuda" or len(recorded) != len(Backends._fields):
        return
    try:
        kept = [choose_backend(name, device, half=uses_half(device, config.run.amp)) for name in recorded]
    except UserError as error:
        logger.info("attention is measured again: %s", error)
        return
    _set_attention(step, Backends(*kept))


def training_groups(step: FSRStep, processes: int) -> tuple[Groups, Groups]:
    """Return the packed images of a training's two kinds of passes: the student's of one size, and those of the CAMs.

    Args:
        step: of a recipe with all losses.
        processes: number of processes that share the batch.
    """
    config, encoder = step.config, step.student.encoder
    batch, side = config.optim.batch_size // processes, config.data.image_size
    grids = (scaled_size((side, side), scale, encoder.patch_size) for scale in config.cam.scales)
    tokens = [math.prod(grid) // encoder.patch_size**2 + encoder.prefix for grid in grids]
    alone = step.shares_passes and not step.reuses_student  # view 1's pass without stochastic depth
    images = [(3 if alone else 2) * batch, *[2 * batch] * (len(tokens) - 1)]
    return ((2 * batch, tokens[0]),), tuple(zip(images, tokens, strict=True))


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
        raise UserError("cam.fp8: this GPU has no float8; compute capability 8.9 or later is needed; --cam.fp8 false")
    layers = [layer for layer in encoder.blocks.modules() if isinstance(layer, nn.Linear)]
    if any(side % 16 for layer in layers for side in layer.weight.shape):
        raise UserError("cam.fp8: the backbone needs widths that are multiples of 16; --cam.fp8 false")
