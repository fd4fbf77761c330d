"""Encoder F: the patch tokens of a vision transformer, with the aggregator's class token."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsr_fast.config import ModelConfig
from fsr_fast.errors import UserError
from fsr_fast.models.aggregator import AggregatorBlock, pool_unmasked
from fsr_fast.models.attention import Backend, Backends, Groups, describe_packing
from fsr_fast.models.backbone import keeps_prefix, patch_positions, prefix_tokens
from fsr_fast.models.block import run_block
from fsr_fast.models.gelu import CompiledGELU
from fsr_fast.models.positions import read_rotary, resize_position_embedding, turn_angles
from fsr_fast.models.work import TrunkPass, TrunkShape


class Features(NamedTuple):
    """Result of one pass through the trunk."""

    tokens: Tensor
    """(B, N, D), output of the last block, before the final norm."""
    aux: Tensor
    """(B, N, D), output of the auxiliary block."""
    grid: tuple[int, int]
    """Rows h and columns w of patches, N = h·w."""
    source: TrunkPass
    """The pass that computed them, shared with the images that were packed with theirs."""


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel, as the matrix product that it is.

    As a convolution in bfloat16, cuDNN computes it without matrix units, 25 times slower.

    Args:
        projection: timm's, whose parameters are taken over.
    """

    def __init__(self, projection: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = projection.weight, projection.bias

    def forward(self, images: Tensor) -> Tensor:
        """Project images (B, channels, H, W) to (B, D, h, w); a patch's channels lie side by side in memory.

        What is left of a patch at the bottom and on the right is cut off, as by the convolution.
        """
        side = self.weight.shape[-1]
        rows, columns = images.shape[2] // side, images.shape[3] // side
        images = images[:, :, : rows * side, : columns * side]
        patches = images.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Vision transformer over patch tokens, followed by the aggregator (paper, Eq. 5-7).

    Patch tokens pass alone (the paper), or after the transformer's own class and register tokens, which are removed
    afterwards. Parameter names are timm's for the trunk; `cls_token` and `cls_blocks` belong to the aggregator.
    Entry 0 of `pos_embed` is the class token's, unused, as in official checkpoints.

    Args:
        vit: the transformer, from `create_vit`.
        config: aggregation, mask mode, stochastic depth, auxiliary block.
        image_size: side of the training views in pixels; the position embedding is stored for its grid.

    Raises:
        UserError: the image size does not fit the patches, or there is no such auxiliary block.
    """

    pos_embed: nn.Parameter | None
    prefix_tokens: nn.Parameter | None

    def __init__(self, vit: Any, config: ModelConfig, image_size: int) -> None:
        super().__init__()
        self.in_chans = config.in_chans
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.depth = len(vit.blocks)
        self.width: int = vit.embed_dim
        if image_size % self.patch_size:
            near = image_size // self.patch_size * self.patch_size
            raise UserError(
                f"data.image_size: {image_size} is not a multiple of the patch size {self.patch_size} of "
                f"{config.backbone}; the nearest are {near} and {near + self.patch_size}"
            )
        if not -self.depth <= config.aux_block < self.depth:
            raise UserError(f"model.aux_block: {config.aux_block}; {config.backbone} has {self.depth} blocks")
        self.aux_block = config.aux_block % self.depth
        self.aggregation = config.aggregation
        self.mask_mode = config.mask_mode
        self.grid = (image_size // self.patch_size,) * 2

        self.patch_embed = nn.ModuleDict({"proj": PatchProjection(vit.patch_embed.proj)})
        positions = patch_positions(vit)
        if positions is not None:
            positions = nn.Parameter(resize_position_embedding(positions, vit.patch_embed.grid_size, self.grid))
        self.register_parameter("pos_embed", positions)
        self.rotary = None if getattr(vit, "rope", None) is None else read_rotary(vit.rope)
        kept = nn.Parameter(prefix_tokens(vit)) if keeps_prefix(vit, config) else None
        self.register_parameter("prefix_tokens", kept)
        self.prefix = 0 if kept is None else kept.shape[1]
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.width), std=0.02))
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks
        if config.aggregation == "mca":
            own = vit.cls_token
            start = nn.init.trunc_normal_(torch.empty(1, 1, self.width), std=0.02) if own is None else own.detach()
            self.cls_token = nn.Parameter(start.clone())
            heads, epsilon = vit.blocks[0].attn.num_heads, vit.norm.eps
            blocks = (
                AggregatorBlock(self.width, heads, config.mask_mode, epsilon) for _ in range(config.aggregator_blocks)
            )
            self.cls_blocks = nn.ModuleList(blocks)
        self.norm = vit.norm
        self.attention = Backends("sdpa", "sdpa", "sdpa")
        self.checkpointing = False
        self.graphs = False
        self._run_block: Callable[..., Tensor] = run_block
        self._run_blocks: Callable[..., tuple[Tensor, Tensor]] = run_blocks
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
        """Sizes that determine the arithmetic of a pass."""
        layers = [layer for layer in self.blocks[0].modules() if isinstance(layer, nn.Linear)]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        patches = self.grid[0] * self.grid[1]
        values = self.in_chans * self.patch_size**2
        return TrunkShape(self.width, weights, values, self.depth, patches, self.prefix)

    def compile_blocks(self, *, graphs: bool = False) -> None:
        """Compile the blocks for training; names and weights stay as they are.

        Args:
            graphs: make one program of all blocks of a pass, which is replayed as a CUDA graph; without, one program
                serves every block.
        """
        self.graphs = graphs
        for module in list(self.blocks.modules()):
            for name, layer in module.named_children():
                if isinstance(layer, nn.GELU) and layer.approximate == "none":
                    setattr(module, name, CompiledGELU())
        if graphs:  # where a program cannot become a graph, an error is better than a pass that is silently slower
            options: dict[str, Any] = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
            self._run_blocks = torch.compile(run_blocks, dynamic=False, options=options)
        else:
            self._run_block = torch.compile(run_block, dynamic=False)
        # Dynamo would split a block at DDP's bucket boundaries to overlap gradients; one block is too small to benefit.
        torch._dynamo.config.optimize_ddp = False

    def forward(
        self, images: Tensor, mask: Tensor | None = None, drop_path: Tensor | None = None, *, aux_only: bool = False
    ) -> Features:
        """Pass images through the trunk.

        Args:
            images: (B, channels, H, W), normalised; H and W multiples of the patch size.
            mask: (B, N), bool; the mask token replaces the embeddings of these patches.
            drop_path: (depth, 2, B), factors of the branches (stochastic depth); None: every branch counts.
            aux_only: stop after the auxiliary block; `tokens` are then also its output.

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
            images: one (B, channels, H, W) for each size, as `forward` takes them.
            drop_path: (depth, 2, ΣB), factors of the branches of all images.
            aux_only: stop after the auxiliary block.
            float8: round the factors of the blocks' linear layers to float8; no gradient then.

        Returns:
            Features of each entry of `images`.
        """
        if not images:
            return []
        embedded = []
        for _, group in itertools.groupby(images, key=lambda one: one.shape[2:]):  # of one size, embedded together
            alike = list(group)
            tokens, grid = self._embed(torch.cat(alike) if len(alike) > 1 else alike[0], None)
            embedded += [(part, grid) for part in tokens.split([len(one) for one in alike])]
        return self._pass(embedded, drop_path, aux_only, float8)

    def _embed(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        embedded = self.patch_embed["proj"](images)
        grid = (embedded.shape[-2], embedded.shape[-1])
        tokens = embedded.flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        # under autocast, training's passes without gradient keep the residual stream in bf16
        dtype = tokens.dtype if self.training and not torch.is_grad_enabled() else self.mask_token.dtype
        tokens = tokens.to(dtype)
        if self.pos_embed is not None:
            tokens = tokens + resize_position_embedding(self.pos_embed, self.grid, grid)[:, 1:].to(dtype)
        if self.prefix_tokens is not None:
            tokens = torch.cat([self.prefix_tokens.to(dtype).expand(tokens.shape[0], -1, -1), tokens], 1)
        return self.norm_pre(tokens).to(dtype), grid

    def turn_angles(self, packed: Sequence[tuple[int, tuple[int, int]]]) -> Tensor | None:
        """Sines and cosines of the rotary positions of packed images' tokens.

        Args:
            packed: number of images and grid of each size.

        Returns:
            (T, 1, 2d); None: the transformer has no rotary positions.
        """
        if self.rotary is None:
            return None
        like = self.mask_token
        angles = [
            turn_angles(self.rotary, grid, self.prefix, like.dtype, like.device).repeat(images, 1)
            for images, grid in packed
        ]
        return torch.cat(angles).unsqueeze(1)

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
        # in half precision 1 / (1 - rate) would be off by up to 1/256, the same for all images
        wide = torch.promote_types(tokens.dtype, torch.float32)
        factors = None if drop_path is None else _spread(drop_path.to(wide), groups)
        backend = self._backend(groups)
        packing = describe_packing(groups, backend, tokens.device)
        rotary = self.turn_angles([(one.shape[0], grid) for one, grid in embedded])
        # an evaluation meets a new size with nearly every image: each would be recompiled, up to Dynamo's limit
        run, run_all = (self._run_block, self._run_blocks) if self.training else (run_block, run_blocks)
        if self.checkpointing and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        arguments = groups, backend, float8, packing, rotary
        tokens, aux = run_all(run, tuple(self.blocks[:depth]), self.aux_block, tokens, factors, *arguments)
        sizes = [images * count for images, count in shapes]
        return [
            Features(self._patches(top, images), self._patches(low, images), grid, source)
            for top, low, (images, _), (_, grid) in zip(
                tokens.split(sizes), aux.split(sizes), shapes, embedded, strict=True
            )
        ]

    def _backend(self, groups: Groups) -> Backend:
        if not self.training:
            return self.attention.evaluation
        return self.attention.packed if len(groups) > 1 else self.attention.single

    def _patches(self, tokens: Tensor, images: int) -> Tensor:
        return tokens.unflatten(0, (images, -1))[:, self.prefix :]

    def aggregate(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Gather the class token of each image from its patches.

        Args:
            tokens: (B, N, D), output of the last block.
            mask: (B, N), bool, masked patches; None: no patch is masked.

        Returns:
            (B, D), after the final norm. Source: paper, Eq. 5-7; Table 4 for GAP and GMP.
        """
        if self.aggregation != "mca":
            return pool_unmasked(self.norm(tokens), mask, self.aggregation)
        class_token = self.cls_token[:, 0].expand(len(tokens), -1)
        for block in self.cls_blocks:
            class_token = block(class_token, tokens, mask)
        return self.norm(class_token)


def run_blocks(
    run: Callable[..., Tensor],
    blocks: Sequence[nn.Module],
    aux_block: int,
    tokens: Tensor,
    drop_path: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Run blocks one after another.

    Args:
        run: `run_block`, or a form of it.
        blocks: of the transformer.
        aux_block: number of the block whose output is also returned.
        tokens: (T, D).
        drop_path: (depth, 2, T, 1), as each block takes it; None: every branch counts.
        arguments: the others of `run_block`, the same for all blocks.

    Returns:
        Output of the last and of the auxiliary block, (T, D) each.
    """
    aux = tokens
    for index, block in enumerate(blocks):
        tokens = run(block, tokens, None if drop_path is None else drop_path[index], *arguments)
        if index == aux_block:
            aux = tokens
    return tokens, aux


def _spread(drop_path: Tensor, groups: Groups) -> Tensor:
    """Spread each image's factors (…, ΣB) to all of its tokens: (…, T, 1)."""
    parts = drop_path.split([images for images, _ in groups], dim=-1)
    spread = [part.unsqueeze(-1).expand(*part.shape, tokens) for part, (_, tokens) in zip(parts, groups, strict=True)]
    return torch.cat([part.flatten(-2) for part in spread], dim=-1).unsqueeze(-1)
