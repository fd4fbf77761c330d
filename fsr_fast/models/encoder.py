"""Encoder F: the patch tokens of a plain vision transformer, with the aggregator's class token."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsr_fast.config import ModelConfig
from fsr_fast.errors import UserError, nearest
from fsr_fast.models.aggregator import AggregatorBlock, pool_unmasked
from fsr_fast.models.attention import Backend, Groups, attend, describe_packing
from fsr_fast.models.float8 import linear_float8
from fsr_fast.models.work import TrunkPass, TrunkShape


class Features(NamedTuple):
    """What one pass through the trunk gives."""

    tokens: Tensor
    """(B, N, D), output of the last block, before the final norm."""
    aux: Tensor
    """(B, N, D), output of the auxiliary block."""
    grid: tuple[int, int]
    """Rows h and columns w of patches, N = h·w."""
    source: TrunkPass
    """The pass that gave them, together with those of the images that it was packed with."""


class Encoder(nn.Module):
    """Plain vision transformer over patch tokens alone, followed by the aggregator (paper, Eq. 5-7).

    Names of parameters are timm's for the trunk; `cls_token` and `cls_blocks` belong to the aggregator.

    Args:
        vit: the transformer, as `create_vit` gives it.
        config: aggregation, mask mode, stochastic depth, auxiliary block.
        image_size: side of the training views in pixels; the position embedding is stored for its grid.

    Raises:
        UserError: the image size does not fit the patches, or there is no such auxiliary block.
    """

    def __init__(self, vit: Any, config: ModelConfig, image_size: int) -> None:
        super().__init__()
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.depth = len(vit.blocks)
        self.width: int = vit.embed_dim
        if image_size % self.patch_size:
            raise UserError(f"data.image_size: {image_size} is not a multiple of the patch size {self.patch_size}")
        if not -self.depth <= config.aux_block < self.depth:
            raise UserError(f"model.aux_block: {config.aux_block}; {config.backbone} has {self.depth} blocks")
        self.aux_block = config.aux_block % self.depth
        self.aggregation = config.aggregation
        self.mask_mode = config.mask_mode
        self.grid = (image_size // self.patch_size,) * 2

        self.patch_embed = nn.ModuleDict({"proj": vit.patch_embed.proj})
        self.pos_embed = nn.Parameter(
            resize_position_embedding(vit.pos_embed.detach(), vit.patch_embed.grid_size, self.grid)
        )
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.width), std=0.02))
        self.blocks = vit.blocks
        if config.aggregation == "mca":
            self.cls_token = nn.Parameter(vit.cls_token.detach().clone())
            heads, epsilon = vit.blocks[0].attn.num_heads, vit.norm.eps
            blocks = (
                AggregatorBlock(self.width, heads, config.mask_mode, epsilon) for _ in range(config.aggregator_blocks)
            )
            self.cls_blocks = nn.ModuleList(blocks)
        self.norm = vit.norm
        self.attention: Backend = "sdpa"
        self.checkpointing = False
        self._run_block: Callable[..., Tensor] = run_block
        self.drop_rates: list[float] = torch.linspace(0, config.stochastic_depth, self.depth).tolist()  # for the host

    def draw_drop_path(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draw stochastic depth for a batch.

        Args:
            batch: number of images B.
            generator: on the CPU.

        Returns:
            (depth, 2, B), float32: factor of each branch, 0 or 1/(1 - drop rate).
        """
        keep_probability = 1 - torch.tensor(self.drop_rates).view(-1, 1, 1)
        draw = torch.rand(self.depth, 2, batch, generator=generator)
        return ((draw < keep_probability) / keep_probability).float()

    @property
    def shape(self) -> TrunkShape:
        """Sizes that decide the arithmetic of a pass."""
        hidden, tokens = self.blocks[0].mlp.fc1.out_features, self.grid[0] * self.grid[1]
        return TrunkShape(self.width, hidden, 3 * self.patch_size**2, self.depth, tokens)

    def compile_blocks(self) -> None:
        """Compile the blocks for training, one program for all of them; names and weights stay as they are."""
        self._run_block = torch.compile(run_block, dynamic=False)
        # Dynamo would cut a block where a bucket of DDP ends, to overlap gradients; those of a block are few enough.
        torch._dynamo.config.optimize_ddp = False

    def forward(
        self, images: Tensor, mask: Tensor | None = None, drop_path: Tensor | None = None, *, aux_only: bool = False
    ) -> Features:
        """Pass images through the trunk.

        Args:
            images: (B, 3, H, W), normalised; H and W multiples of the patch size.
            mask: (B, N), bool; the mask token replaces the embeddings of these patches.
            drop_path: (depth, 2, B), factors of the branches (stochastic depth); none: every branch counts.
            aux_only: stop after the auxiliary block; `tokens` are then its output, too.

        Returns:
            Features of the last and of the auxiliary block.
        """
        (features,) = self._pass([self._embed(images, mask)], drop_path, aux_only)
        return features

    def forward_packed(
        self,
        images: Sequence[Tensor],
        drop_path: Tensor | None = None,
        *,
        aux_only: bool = False,
        float8: bool = False,
    ) -> list[Features]:
        """Pass images of several sizes through the trunk as one sequence.

        Args:
            images: one (B, 3, H, W) for each size, as `forward` takes them.
            drop_path: (depth, 2, ΣB), factors of the branches of all images.
            aux_only: stop after the auxiliary block.
            float8: round the factors of the blocks' linear layers to float8; no gradient then.

        Returns:
            Features of each entry of `images`.
        """
        if not images:
            return []
        return self._pass([self._embed(one, None) for one in images], drop_path, aux_only, float8)

    def _embed(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        embedded = self.patch_embed["proj"](images)
        grid = (embedded.shape[-2], embedded.shape[-1])
        tokens = embedded.flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        return tokens + resize_position_embedding(self.pos_embed, self.grid, grid)[:, 1:], grid

    def _pass(
        self,
        embedded: Sequence[tuple[Tensor, tuple[int, int]]],
        drop_path: Tensor | None,
        aux_only: bool,
        float8: bool = False,
    ) -> list[Features]:
        shapes = [(one.shape[0], one.shape[1]) for one, _ in embedded]
        alike = itertools.groupby(shapes, key=lambda shape: shape[1])
        groups = tuple((sum(images for images, _ in group), tokens) for tokens, group in alike)
        depth = self.aux_block + 1 if aux_only else self.depth
        source = TrunkPass(groups, depth, torch.is_grad_enabled())
        tokens = torch.cat([one.flatten(0, 1) for one, _ in embedded])
        factors = None if drop_path is None else _spread(drop_path.to(tokens.dtype), groups)
        packing = describe_packing(groups, self.attention, tokens.device)
        # an evaluation meets a new size with nearly every image: each would be compiled, until none is any more
        run = self._run_block if self.training else run_block
        aux = tokens
        for index, block in enumerate(self.blocks[:depth]):
            keep_here = None if factors is None else factors[index]
            arguments = block, tokens, keep_here, groups, self.attention, float8, packing
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = run(*arguments)
            if index == self.aux_block:
                aux = tokens
        sizes = [images * count for images, count in shapes]
        return [
            Features(top.unflatten(0, (images, -1)), low.unflatten(0, (images, -1)), grid, source)
            for top, low, (images, _), (_, grid) in zip(
                tokens.split(sizes), aux.split(sizes), shapes, embedded, strict=True
            )
        ]

    def aggregate(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Gather the class token of each image from its patches.

        Args:
            tokens: (B, N, D), output of the last block.
            mask: (B, N), bool, masked patches; none: no patch is masked.

        Returns:
            (B, D), after the final norm. Source: paper, Eq. 5-7; Table 4 for GAP and GMP.
        """
        if self.aggregation != "mca":
            return pool_unmasked(self.norm(tokens), mask, self.aggregation)
        class_token = self.cls_token[:, 0].expand(len(tokens), -1)
        for block in self.cls_blocks:
            class_token = block(class_token, tokens, mask)
        return self.norm(class_token)


def create_vit(config: ModelConfig) -> Any:
    """Build timm's transformer by name, without pretrained weights.

    Returns:
        A timm VisionTransformer; its parts are typed loosely by timm.

    Raises:
        UserError: unknown name, or a transformer that is not plain.
    """
    names = timm.list_models(module="vision_transformer")
    if config.backbone not in names:
        raise UserError(
            f"model.backbone: {config.backbone!r} is no vision transformer of timm{nearest(config.backbone, names)}"
        )
    options: dict[str, Any] = dict(config.backbone_options)
    known = inspect.signature(VisionTransformer).parameters
    for name in options:
        if name not in known:  # create_model takes more than sizes, `pretrained` among them
            raise UserError(
                f"model.backbone_options: {name!r} is no argument of VisionTransformer{nearest(name, known)}"
            )
    try:
        vit: Any = timm.create_model(config.backbone, num_classes=0, global_pool="token", **options)
    except Exception as error:  # timm and torch raise many kinds
        raise UserError(
            f"model.backbone_options: {config.backbone} does not take {config.backbone_options}: {error}"
        ) from None
    if not len(vit.blocks):
        raise UserError(
            f"model.backbone_options: {config.backbone_options} leaves no block; expected a depth of 1 or more"
        )
    obstacle = _not_plain(vit)
    if obstacle:
        raise UserError(f"model.backbone: {config.backbone} is not a plain vision transformer: {obstacle}")
    return vit


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize the patch part of a position embedding bicubically.

    Args:
        embedding: (1, 1 + grid rows · columns, D); the first entry belongs to the class token and is kept.
        grid: rows and columns that it was made for.
        size: rows and columns that are wanted.

    Returns:
        (1, 1 + size rows · columns, D).
    """
    if not torch.compiler.is_exporting() and tuple(grid) == tuple(size):  # an exported graph takes any size
        return embedding
    patches = embedding[:, 1:].transpose(1, 2).unflatten(2, grid)
    patches = F.interpolate(patches.float(), size=tuple(size), mode="bicubic", align_corners=False)
    return torch.cat([embedding[:, :1], patches.flatten(2).transpose(1, 2).to(embedding.dtype)], dim=1)


def run_block(
    block: Any,
    tokens: Tensor,
    drop_path: Tensor | None,
    groups: Groups,
    backend: Backend,
    float8: bool = False,
    packing: Any = None,
) -> Tensor:
    """Run one block on packed images.

    Args:
        block: of timm's transformer.
        tokens: (T, D).
        drop_path: (2, T, 1), factors of the attention's and the MLP's branch; none: both count.
        groups: sizes of the images in T.
        backend: how attention is computed.
        float8: round the factors of the linear layers to float8.
        packing: as in `attend`.

    Returns:
        (T, D).
    """
    attention, mlp = block.attn, block.mlp
    linear = linear_float8 if float8 else nn.Linear.__call__
    query, key, value = linear(attention.qkv, block.norm1(tokens)).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    mixed = attend(attention.q_norm(query), attention.k_norm(key), value, groups, backend, packing)
    tokens = _add(tokens, block.ls1(linear(attention.proj, mixed)), None if drop_path is None else drop_path[0])
    normed = block.norm2(tokens)
    fed = linear_float8(mlp.fc2, mlp.norm(mlp.act(linear_float8(mlp.fc1, normed)))) if float8 else mlp(normed)
    return _add(tokens, block.ls2(fed), None if drop_path is None else drop_path[1])


def _add(tokens: Tensor, branch: Tensor, drop_path: Tensor | None) -> Tensor:
    return tokens + branch if drop_path is None else torch.addcmul(tokens, branch, drop_path.to(branch.dtype))


def _spread(drop_path: Tensor, groups: Groups) -> Tensor:
    """Spread each image's factors (…, ΣB) to all of its tokens: (…, T, 1)."""
    parts = drop_path.split([images for images, _ in groups], dim=-1)
    spread = [part.unsqueeze(-1).expand(*part.shape, tokens) for part, (_, tokens) in zip(parts, groups, strict=True)]
    return torch.cat([part.flatten(-2) for part in spread], dim=-1).unsqueeze(-1)


def _not_plain(vit: Any) -> str | None:
    if not isinstance(vit, VisionTransformer) or not all(type(block) is Block for block in vit.blocks):
        return "its blocks are of another kind"
    if vit.cls_token is None or vit.num_prefix_tokens != 1 or vit.pos_embed is None or vit.no_embed_class:
        return "it needs one class token with a position embedding, and no register tokens"
    if not isinstance(vit.norm_pre, nn.Identity) or not isinstance(vit.norm, nn.LayerNorm):
        return "it needs a final LayerNorm and no norm before the blocks"
    if getattr(vit.blocks[0].attn, "gate", None) is not None or not isinstance(vit.blocks[0].attn.norm, nn.Identity):
        return "its attention is gated or scaled"
    if any(getattr(part, "p", getattr(part, "drop_prob", 0)) for part in vit.modules()):
        return "it drops activations or blocks on its own; model.stochastic_depth is what there is"
    return None
