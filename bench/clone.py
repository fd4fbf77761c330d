"""The parts of a clone of the official code that are compared, imported and made to run on a CPU."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fsr_fast.errors import UserError

BATCH, SIDE, PATCH, WIDTH, DEPTH, PROTOTYPES, CLASSES = 2, 128, 16, 64, 4, 64, 20
UNUSED = ("imageio", "sklearn", "sklearn.metrics", "texttable", "matplotlib.pyplot", "cv2", "joblib", "tqdm")


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Compute in float64 throughout, where a tolerance of 1e-9 separates rounding errors from mistakes.

    The fast path widens half precision by `.float()`, which would narrow float64, and divides integers, which produces
    the default dtype.
    """
    widen = Tensor.float
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(Tensor, "float", lambda one: one if one.dtype == torch.float64 else widen(one)):
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def official_code(path: Path) -> Iterator[tuple[SimpleNamespace, bool]]:
    """Import what is compared from a clone.

    Yields:
        Its modules, and whether its extension for the energy is built.

    Raises:
        UserError: the folder is not a clone of the official code.
    """
    if not (path / "train_voc.py").is_file() or not (path / "models/vit.py").is_file():
        raise UserError(f"--path: {path} has no train_voc.py and models/vit.py; give a clone of the official code")
    loaded = set(sys.modules)
    stay = lambda thing, *_, **__: thing  # noqa: E731 a tensor's and a module's cuda()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "path", [str(path.resolve()), *sys.path]))
        for owner in (Tensor, torch.nn.Module):
            stack.enter_context(mock.patch.object(owner, "cuda", stay))
        stack.enter_context(mock.patch("torch.cuda.get_device_name", return_value="none"))
        stack.enter_context(mock.patch("torch.hub.set_dir"))
        for name in UNUSED:
            try:
                importlib.import_module(name)
            except ImportError:
                stack.enter_context(mock.patch.dict(sys.modules, {name: mock.MagicMock()}))
        try:
            importlib.import_module("bilateralfilter")
            lattice = True
        except ImportError:
            stack.enter_context(mock.patch.dict(sys.modules, {"bilateralfilter": exact_filter()}))
            lattice = False
        names = ("models.vit", "models.decoder", "models.projector", "models.network", "models.losses", "models.PAR")
        try:
            train = importlib.import_module("train_voc")
            parts = {name.rpartition(".")[2]: importlib.import_module(name) for name in names}
        except ImportError as error:
            raise UserError(f"--path: {path}: the official code does not import: {error}") from None
        try:
            yield SimpleNamespace(train=train, **parts), lattice
        finally:
            for name in set(sys.modules) - loaded:
                if str(path.resolve()) in str(getattr(sys.modules[name], "__file__", None)):
                    del sys.modules[name]


def exact_filter() -> ModuleType:
    """Return a stand-in for the extension that filters by exact Gaussians instead of a lattice."""
    module: Any = ModuleType("bilateralfilter")

    def filter_batch(images: Any, maps: Any, out: Any, N: int, K: int, H: int, W: int, rgb: float, xy: float) -> None:
        colours = torch.from_numpy(images.reshape(N, 3, H * W)).double().transpose(1, 2) / rgb
        place = torch.cartesian_prod(torch.arange(H), torch.arange(W)).double() / xy
        for n in range(N):
            near = torch.exp(
                -0.5 * torch.cdist(torch.cat([colours[n], place], 1), torch.cat([colours[n], place], 1)) ** 2
            )
            out.reshape(N, K, -1)[n] = (torch.from_numpy(maps.reshape(N, K, -1)[n]).double() @ near).numpy()

    module.bilateralfilter = module.bilateralfilter_batch = filter_batch
    return module


def build_official(code: SimpleNamespace) -> Any:
    """Build a small official network from random weights, none of them constant, without stochastic depth."""
    encoder = code.vit.VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=1,
        qkv_bias=True,
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
    )
    decoder, projector = code.decoder.LargeFOV(WIDTH, CLASSES + 1), code.projector.DINOHead(WIDTH, PROTOTYPES)
    network = code.network.WSSSNetwork(encoder, decoder, projector, num_classes=CLASSES + 1).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.endswith("weight_g"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def image_labels() -> Tensor:
    """Return labels (B, C): one class, then two."""
    labels = torch.zeros(BATCH, CLASSES)
    labels[0, 3] = labels[1, 7] = labels[1, 11] = 1
    return labels


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    ours, theirs = ours.detach().double(), theirs.detach().double().view(ours.shape)
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()
