"""Routed attention from the formula alone: plain loops over tokens in float64, no padding, no layout tricks."""
import torch

from ops import RegionGrid


def tokens_of_regions(grid: RegionGrid) -> list[list[tuple[int, int]]]:
    """The (y, x) of each region's tokens."""
    h, w = grid.region_height, grid.region_width
    return [
        [(y, x) for y in range(top, min(top + h, grid.height)) for x in range(left, min(left + w, grid.width))]
        for top in range(0, grid.rows * h, h)
        for left in range(0, grid.cols * w, w)
    ]


def region_means(x, grid):
    return torch.stack(
        [torch.stack([x[:, i, j].double() for i, j in tokens]).mean(0) for tokens in tokens_of_regions(grid)], dim=1
    ).flatten(2)


def routed_attention(query, key, value, routing, scale):
    routes, query_grid, key_grid, _ = routing
    query, key, value = query.double(), key.double(), value.double()
    out = torch.empty_like(query)
    query_tokens, key_tokens = tokens_of_regions(query_grid), tokens_of_regions(key_grid)
    for b in range(query.shape[0]):
        for region, tokens in enumerate(query_tokens):
            routed = [token for r in routes[b, region].tolist() for token in key_tokens[r]]
            keys = torch.stack([key[b, y, x] for y, x in routed])
            values = torch.stack([value[b, y, x] for y, x in routed])
            for y, x in tokens:
                logits = scale * torch.einsum("nd,lnd->nl", query[b, y, x], keys)
                out[b, y, x] = torch.einsum("nl,lnd->nd", logits.softmax(-1), values)
    return out


def eager_attention(query, key, value, routing, scale):
    """The same in the inputs' own precision: dense, masked token by token, one plain operation after the other."""
    routes, query_grid, key_grid, _ = routing
    region_of_query = torch.empty(query_grid.height, query_grid.width, dtype=torch.long)
    region_of_key = torch.empty(key_grid.height, key_grid.width, dtype=torch.long)
    for region_of, grid in ((region_of_query, query_grid), (region_of_key, key_grid)):
        for region, tokens in enumerate(tokens_of_regions(grid)):
            for y, x in tokens:
                region_of[y, x] = region
    routed = torch.zeros(*routes.shape[:2], key_grid.num_regions, dtype=torch.bool).scatter_(2, routes.cpu(), True)
    mask = routed[:, region_of_query.flatten()][:, :, region_of_key.flatten()].to(query.device)
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    logits = (query @ key.transpose(-1, -2)) * scale
    out = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1) @ value
    return out.transpose(1, 2).unflatten(1, (query_grid.height, query_grid.width))
