"""The public call of routed attention: check the inputs, choose an implementation, dispatch."""
import torch

from .impl import gather, masked
from .routing import Routing
from .support import triton_unsupported, warn_of_fallback


def _triton(*args):
    from .impl import triton  # imports Triton, which only its users need

    return triton.routed_attention(*args)


_BACKENDS = {"triton": _triton, "gather": gather.routed_attention, "masked": masked.routed_attention}
IMPLS = tuple(_BACKENDS)

# Copying one gathered key costs as much as attending to it from this many queries. Fitted on the CPU in float32, on
# BiFormer's stages at 224; `scripts/benchmark.py op` measures it.
GATHER_COPY_COST = 20

# The faster of two implementations is left where one image takes it more bytes than this, and the other fewer.
IMAGE_BYTES = 2**30

_TRITON_HEAD_DIM = 128


def _triton_unsupported(query: torch.Tensor | None) -> str | None:
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


def _costs(query: torch.Tensor, routing: Routing) -> dict[str, tuple[float, int]]:
    """Of `masked` and `gather`: keys touched for each query, and bytes for one image beside inputs and output."""
    routes, q, k, _ = routing
    heads, head_dim = query.shape[-2:]
    gathered_keys = routes.shape[-1] * k.tokens_per_region
    # Keys and values are copied for each query region; its logits and their softmax live side by side.
    gathered = 2 * heads * q.num_regions * gathered_keys * (head_dim + q.tokens_per_region)
    everything_routed = routes.shape[-1] == k.num_regions
    # A mask is made of whole regions, and copied where padding is cut off.
    masks = 0 if everything_routed else 2 if q.is_padded or k.is_padded else 1
    masked = masks * q.height * q.width * k.height * k.width
    size = query.element_size()
    return {
        "masked": (k.height * k.width, masked * size),
        "gather": (gathered_keys * (1 + GATHER_COPY_COST / q.tokens_per_region), gathered * size),
    }


def choose_impl(query: torch.Tensor, routing: Routing) -> str:
    """The implementation that `impl="auto"` takes for (B, Hq, Wq, heads, head_dim) queries and their routing.

    On a GPU `triton`, except where every region is routed to every other: that is dense attention, for which `masked`
    calls PyTorch's own kernel without a mask. Where the installation keeps a GPU from `triton`, a warning says so once.

    Elsewhere the one that touches fewer keys for each query: `masked` attends to all Hk * Wk keys; `gather` attends to
    K * Tk keys, and copies each of them once for the Tq queries of a region, which is expensive where query regions are
    small. But where that one takes more than `IMAGE_BYTES` for an image (a mask of Hq * Wq * Hk * Wk numbers; copies
    and logits of the gathered keys) and the other less than it, the other. The batch plays no part: one image is
    computed as many are, and a model is exported for any number of them.
    """
    everything_routed = routing.routes.shape[-1] == routing.key_grid.num_regions
    if query.device.type == "cuda" and not everything_routed:
        reason = unsupported("triton", query)
        if reason is None:
            return "triton"
        warn_of_fallback(reason)
    costs = _costs(query, routing)
    fast, slow = ("masked", "gather") if costs["masked"][0] <= costs["gather"][0] else ("gather", "masked")
    return slow if costs[fast][1] > max(IMAGE_BYTES, costs[slow][1]) else fast


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
        impl: "triton" (fused, for GPUs), "gather" (the paper's formulation, plain products), "masked" (dense attention
            under a mask), or "auto" (see `choose_impl`).

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
