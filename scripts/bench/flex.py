"""Routed attention as a block mask for PyTorch's flex_attention.

Tokens are brought into region order first, so that a region is a run of tokens. Where a region is a whole number of
blocks, the block mask alone says which token attends to which. Elsewhere blocks hold several regions, or parts of
them, and a lookup in the routes decides within a block.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ops import RegionGrid

# The block that flex_attention's kernels are made for, and the smallest that its defaults can be told to use.
DEFAULT_BLOCK, SMALL_BLOCK = 128, 64


def block_size(grid: RegionGrid) -> int:
    """The largest of flex_attention's usual blocks that regions are made of, or the default one."""
    fits = [b for b in (DEFAULT_BLOCK, SMALL_BLOCK) if grid.tokens_per_region % b == 0 and not grid.is_padded]
    return fits[0] if fits else DEFAULT_BLOCK


def kernel_options(block: int) -> dict[str, int]:
    """Tiles no larger than the blocks, forward and backward."""
    if block == DEFAULT_BLOCK:
        return {}
    return dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), block)


def to_regions(x_BHWND: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
    """(B, H, W, N, D) -> (B, N, L, D), region after region, zeros up to a whole number of blocks."""
    x = rearrange(grid.pad(x_BHWND), "b (y h) (x w) n d -> b n (y x h w) d", y=grid.rows, x=grid.cols)
    return F.pad(x, (0, 0, 0, -x.shape[2] % block_size(grid))).contiguous()


def from_regions(x_BNLD: torch.Tensor, grid: RegionGrid) -> torch.Tensor:
    """(B, N, L, D) -> (B, H, W, N, D), the inverse of `to_regions`."""
    x = x_BNLD[:, :, : grid.num_regions * grid.tokens_per_region]
    h, w = grid.region_height, grid.region_width
    return grid.crop(rearrange(x, "b n (y x h w) d -> b (y h) (x w) n d", y=grid.rows, h=h, w=w))


def _ordered(blocks_BQK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, Q, K) bool -> the number of key blocks, (B, 1, Q), and their indices first, (B, 1, Q, K); int32."""
    counts = blocks_BQK.sum(-1, dtype=torch.int32)
    indices = blocks_BQK.byte().argsort(dim=-1, descending=True, stable=True).int()
    return counts[:, None], indices[:, None].contiguous()


def block_mask(routes: torch.Tensor, grid: RegionGrid) -> BlockMask:
    """The routes, (B, R, K), as a block mask over tokens in region order.

    It is computed from blocks: the mask of all pairs of tokens would not fit into memory for large maps.
    """
    block = block_size(grid)
    device = routes.device
    tokens = grid.num_regions * grid.tokens_per_region
    padding = -tokens % block
    region_L = F.pad(torch.arange(tokens, device=device) // grid.tokens_per_region, (0, padding))
    real_L = F.pad(grid.is_real(device).flatten(), (0, padding))
    shape_BRR = (routes.shape[0], grid.num_regions, grid.num_regions)
    allowed_BRR = torch.zeros(shape_BRR, dtype=torch.bool, device=device).scatter_(2, routes, True)

    # Which regions' real tokens each block C holds, and which pairs of blocks hold some, or only, allowed pairs.
    holds_CR = torch.zeros((tokens + padding) // block, grid.num_regions, device=device)
    holds_CR.index_put_((torch.arange(tokens + padding, device=device) // block, region_L), real_L.float(), True)
    holds_CR.clamp_(max=1)
    some_BCC = holds_CR @ allowed_BRR.float() @ holds_CR.T > 0
    missing_BCC = holds_CR @ (~allowed_BRR).float() @ holds_CR.T > 0
    all_real_C = real_L.unflatten(0, (-1, block)).all(-1)
    full_BCC = some_BCC & ~missing_BCC & all_real_C

    def mask_mod(b, h, q, kv):
        return allowed_BRR[b, region_L[q], region_L[kv]] & real_L[kv]

    return BlockMask.from_kv_blocks(
        *_ordered(some_BCC & ~full_BCC), *_ordered(full_BCC), BLOCK_SIZE=block, mask_mod=mask_mod
    )


def compiled():
    """flex_attention, newly compiled for one shape; what was compiled for others is dropped."""
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)
