"""The public call of routed attention: check the inputs, choose an implementation, dispatch."""
import torch

from .impl import gather
from .impl.blocks import chunked_attention, masked_attention
from .layout import is_open
from .routing import Routing
from .support import triton_unsupported, warn_of_fallback
from .transforms import needs_plain_operators


def _triton(*args):
    from .impl import triton  # imports Triton, which only its users need

    return triton.routed_attention(*args)


def _chunked(*args):
    return (gather.routed_attention if needs_plain_operators() else chunked_attention)(*args)


_BACKENDS = {
    "triton": _triton,
    "chunked": _chunked,
    "masked": masked_attention,
    "gather": gather.routed_attention,
}
IMPLS = tuple(_BACKENDS)

# Fitted to `scripts/benchmark.py choice` on the CPU, in units of what a key costs a query: copying a key once for a
# region of queries, computing another region, and bringing another query into the order of regions.
COPY_COST, REGION_COST, QUERY_COST = 20, 1000, 100

# Copies of few regions of a small image are made at once: blocks of them would save less than their calls cost.
FEW_REGIONS, FEW_NUMBERS = 4, 2**20

_TRITON_HEAD_DIM = 128


def _triton_unsupported(query: torch.Tensor | None) -> str | None:
    if query is not None and is_open(*query.shape[1:3]):
        return "its kernels are for maps of one size, and an export leaves this one's open"
    if query is not None and query.shape[-1] > _TRITON_HEAD_DIM:
        return f"its kernels take heads of up to {_TRITON_HEAD_DIM} numbers, got {query.shape[-1]}"
    return triton_unsupported(query)


def unsupported(impl: str, query: torch.Tensor | None = None) -> str | None:
    """Why `impl` cannot compute `routed_attention`, or None where it can.

    Args:
        impl: A name of `IMPLS`.
        query: The (B, H, W, heads, head_dim) queries of the call. Without them, only what holds for every input is
            checked.
    """
    if impl not in IMPLS:
        return f"there is no such implementation; choose from {', '.join(IMPLS)} or auto"
    if impl == "triton":
        return _triton_unsupported(query)
    return None


def _copies(query: torch.Tensor, routing: Routing) -> str:
    """The better of the implementations that copy the routed keys."""
    routes, q, k, _ = routing
    heads, head_dim = query.shape[-2:]
    copied = routes.shape[-1] * k.tokens_per_region
    # Keys and values for each query region; logits and their softmax.
    numbers = 2 * heads * q.num_regions * copied * (head_dim + q.tokens_per_region)
    return "gather" if routes.shape[-1] <= FEW_REGIONS and numbers <= FEW_NUMBERS else "chunked"


def choose_impl(query: torch.Tensor, routing: Routing) -> str:
    """The implementation that `impl="auto"` takes for (B, Hq, Wq, heads, head_dim) queries and their routing.

    On a GPU `triton`, except where every region is routed to every other: that is dense attention, for which `masked`
    calls PyTorch's own kernel without a mask. Where the installation keeps a GPU from `triton`, a warning says so once.

    Elsewhere the fastest by the shape. By `masked` every query attends to all Hk * Wk keys; by `chunked`, to K * Tk
    copies, each made once for the Tq queries of a region, which is expensive where regions are small. `gather` makes
    the copies of the whole map at once, and takes the place of `chunked` where they are few and small. The batch plays
    no part: a model is exported for any number of images. An export that leaves the map's size open has plain products.
    """
    routes, q, k, _ = routing
    everything_routed = routes.shape[-1] == k.num_regions
    if q.has_open_size or k.has_open_size:
        return "masked" if everything_routed else "gather"  # a mask of the largest map would not fit into memory
    if query.device.type == "cuda" and not everything_routed:
        reason = unsupported("triton", query)
        if reason is None:
            return "triton"
        warn_of_fallback(reason)
    copied = routes.shape[-1] * k.tokens_per_region
    cost_of_copies = copied + QUERY_COST + (copied * COPY_COST + REGION_COST) / q.tokens_per_region
    if everything_routed or k.height * k.width <= cost_of_copies:
        return "masked"
    return _copies(query, routing)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, routing: Routing):
    routes, query_grid, key_grid, _ = routing
    if query.ndim != 5 or key.ndim != 5:
        raise ValueError(
            "query and key must be (batch, height, width, heads, head_dim), "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    batch, _, _, heads, head_dim = query.shape
    for name, x, grid in (("query", query, query_grid), ("key", key, key_grid), ("value", value, key_grid)):
        expected = (batch, grid.height, grid.width, heads, head_dim)
        if tuple(x.shape) != expected:
            raise ValueError(f"{name} must be {expected} to fit the query and its grid, got {tuple(x.shape)}")
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, query is {query.dtype} on {query.device}; they must be alike"
            )
    if not query.is_floating_point():
        raise ValueError(f"query, key and value must be of a floating-point type, got {query.dtype}")
    if routes.dtype != torch.int64 or routes.device != query.device:
        raise ValueError(f"routes must be int64 on {query.device}, got {routes.dtype} on {routes.device}")
    if routes.ndim != 3 or routes.shape[:2] != (batch, query_grid.num_regions):
        raise ValueError(f"routes must be ({batch}, {query_grid.num_regions}, topk), got {tuple(routes.shape)}")
    if not 1 <= routes.shape[2] <= key_grid.num_regions:
        raise ValueError(f"routes must name 1 to {key_grid.num_regions} key regions, got {routes.shape[2]}")


def routed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routing: Routing,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attention of every token of a query region to all tokens of the key regions that it is routed to.

    The second level of bi-level routing attention (Zhu et al., "BiFormer", CVPR 2023, equations 5 and 6), per head:
    softmax(scale * q k^T) v over the routed keys. Maps may be of any size: what a grid pads at the bottom and the
    right is given no weight. Inputs of any strides are read as they are, views of one packed projection included.

    Args:
        query: (B, Hq, Wq, heads, head_dim).
        key: (B, Hk, Wk, heads, head_dim).
        value: (B, Hk, Wk, heads, head_dim).
        routing: The key regions of each query region, as `route_regions` gives them; both maps may differ in size and
            in regions. The indices are not checked, which would wait for the device; the result for a region that is
            listed twice is undefined.
        scale: Factor of the logits, head_dim ** -0.5 unless given.
        impl: "triton" (fused, for GPUs), "chunked" (copies of the routed keys, one block of queries at a time),
            "masked" (all keys under a mask, one block at a time), "gather" (the paper's formulation, plain products of
            copies of all at once), or "auto" (see `choose_impl`).

    Returns:
        (B, Hq, Wq, heads, head_dim), of the query's dtype.

    Raises:
        ValueError: Shapes, types or devices do not fit each other, or `impl` cannot run; the message says why.
    """
    _check(query, key, value, routing)
    if impl == "auto":
        impl = choose_impl(query, routing)
    reason = unsupported(impl, query)
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot run: {reason}")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    return _BACKENDS[impl](query, key, value, routing, scale)
