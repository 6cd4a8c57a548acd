import math
from unittest.mock import patch

import pytest
import torch
import torch.fx.experimental._config as symbolic_shapes
import torch.nn.functional as F

from ops import BiLevelRoutingAttention, RegionGrid, bra

# (height, width), regions, top-k, where the regions do not divide the map
PADDED = {
    "both sides": ((10, 7), 4, 3),
    "one side": ((5, 8), 4, 3),
    "regions of padding alone": ((9, 9), 8, 5),
    "all regions": ((7, 5), 3, 9),
    "one token": ((1, 1), 3, 2),
}


@pytest.mark.parametrize("size", [(14, 14), (50, 61), (3, 9), (1, 1), (32, 7)])
def test_any_size(size):
    attention = BiLevelRoutingAttention(dim=16, num_heads=2, topk=4)
    x = torch.randn(2, *size, 16, requires_grad=True)
    out = attention(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None for p in attention.parameters())


def test_is_the_published_formula():
    """With every region routed, BRA is dense attention at scale dim ** -0.5 plus the local term on the values."""
    torch.manual_seed(0)
    attention = BiLevelRoutingAttention(dim=16, num_heads=2, topk=49).double()
    x = torch.randn(2, 14, 14, 16, dtype=torch.float64)
    query, key, value = attention.qkv(x).flatten(1, 2).chunk(3, dim=-1)
    heads = [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (query, key, value)]
    dense = F.scaled_dot_product_attention(*heads, scale=16**-0.5).transpose(1, 2).reshape(x.shape)
    values = value.unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    local = F.conv2d(values, attention.lepe.weight, attention.lepe.bias, padding=2, groups=16).permute(0, 2, 3, 1)
    torch.testing.assert_close(attention(x), attention.proj(dense + local), rtol=1e-12, atol=1e-12)


def randomised(**kwargs):
    """An attention in double precision of which no parameter, and so no padding token's projection, is zero."""
    torch.manual_seed(0)
    attention = BiLevelRoutingAttention(dim=12, num_heads=2, **kwargs).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def image(size, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *size, 12, dtype=torch.float64, generator=generator)


def published(attention, x):
    """What the published network computes: zeros added before the projection, and nothing masked. In plain loops."""
    regions, (batch, height, width, dim) = attention.num_regions, x.shape
    rows, cols = math.ceil(height / regions), math.ceil(width / regions)
    padded = x.new_zeros(batch, rows * regions, cols * regions, dim)
    padded[:, :height, :width] = x
    query, key, value = (padded @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=-1)
    tops, lefts = range(0, rows * regions, rows), range(0, cols * regions, cols)
    cuts = [(slice(top, top + rows), slice(left, left + cols)) for top in tops for left in lefts]
    attended = torch.zeros_like(value)
    for b in range(batch):
        queries, keys, values = ([side[b][cut].flatten(0, 1) for cut in cuts] for side in (query, key, value))
        mean_query, mean_key = (torch.stack([t.mean(0) for t in tokens]) for tokens in (queries, keys))
        routes = (mean_query @ mean_key.T).topk(attention.topk).indices
        for cut, own, chosen in zip(cuts, queries, routes, strict=True):
            gathered = [torch.cat([tokens[region] for region in chosen]) for tokens in (keys, values)]
            heads = zip(*(t.chunk(attention.num_heads, dim=-1) for t in (own, *gathered)), strict=True)
            results = [(q @ k.T * dim**-0.5).softmax(-1) @ v for q, k, v in heads]
            attended[b][cut] = torch.cat(results, dim=-1).unflatten(0, (rows, cols))
    lepe = attention.lepe
    local = F.conv2d(value.permute(0, 3, 1, 2), lepe.weight, lepe.bias, padding=2, groups=dim).permute(0, 2, 3, 1)
    return ((attended + local) @ attention.proj.weight.T + attention.proj.bias)[:, :height, :width]


@pytest.mark.parametrize("impl", ["chunked", "masked", "gather", "auto"])
@pytest.mark.parametrize("case", PADDED)
def test_published_padding_is_the_published_networks(case, impl):
    size, num_regions, topk = PADDED[case]
    settings = dict(num_regions=num_regions, topk=topk, attn_impl=impl)
    attention, x = randomised(padding="published", **settings), image(size)
    expected = published(attention, x)
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-10)
    assert (randomised(padding="masked", **settings)(x) - expected).abs().max() > 0.1


@pytest.mark.parametrize("case", PADDED)
def test_gradients_of_published_padding(case):
    size, num_regions, topk = PADDED[case]
    attention = randomised(num_regions=num_regions, topk=topk, padding="published")
    x = image(size).requires_grad_()
    upstream = torch.randn_like(x)
    ours, expected = (
        torch.autograd.grad(function(x), [x, *attention.parameters()], upstream)
        for function in (attention, lambda x: published(attention, x))
    )
    for gradient, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_paddings_agree_to_the_bit_where_nothing_is_padded(dtype):
    x = image((8, 12)).to(dtype)
    masked, published = (randomised(num_regions=4, topk=3, padding=p).to(dtype) for p in ("masked", "published"))
    results = []
    for attention in (masked, published):
        out = attention(x)
        with torch.inference_mode():
            inferred = attention(x)
        results.append([out, inferred, *torch.autograd.grad(out.sum(), list(attention.parameters()))])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_masked_padding_is_the_default():
    x = image((10, 7))
    assert randomised(num_regions=4, topk=3)(x).equal(randomised(num_regions=4, topk=3, padding="masked")(x))


@pytest.mark.parametrize("padding,grid", [("masked", RegionGrid(9, 5, 5, 5)), ("published", RegionGrid(16, 8, 8, 8))])
def test_routing_is_that_of_the_forward_pass(padding, grid):
    attention, x = randomised(num_regions=8, topk=3, padding=padding), image((9, 5))
    with patch.object(bra, "route_regions", wraps=bra.route_regions) as route:
        shown = attention.routing(x)
        attention(x)
    asked, used = (call.args for call in route.call_args_list)
    assert all(torch.equal(a, b) for a, b in zip(asked[:2], used[:2], strict=True)) and asked[2:] == used[2:]
    assert shown.query_grid == shown.key_grid == grid == used[2]
    assert shown.routes.shape == (2, grid.num_regions, 3)


@pytest.mark.compile
@pytest.mark.parametrize("size", [(9, 7), (8, 8)])
def test_published_padding_compiles_into_one_graph(size):
    torch._dynamo.reset()  # all of this file's graphs of `forward` together are more than it keeps
    attention = randomised(num_regions=4, topk=3, padding="published")
    x = image(size)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attention(x))
    compiled(x).sum().backward()


@pytest.mark.compile
def test_published_padding_exports_for_any_batch():
    attention = randomised(num_regions=4, topk=3, padding="published").requires_grad_(False)
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    program = torch.export.export(attention, (image((10, 7)),), dynamic_shapes=shapes).module()
    x = image((10, 7), batch=5)
    torch.testing.assert_close(program(x), attention(x))


@pytest.mark.compile
@pytest.mark.parametrize("impl", ["chunked", "masked", "gather", "auto"])
@pytest.mark.parametrize("size", [(14, 14), (9, 13)])
def test_compiles_into_one_graph(size, impl):
    torch._dynamo.reset()
    attention = BiLevelRoutingAttention(dim=16, num_heads=2, topk=4, attn_impl=impl)
    x = torch.randn(2, *size, 16)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attention(x))
    compiled(x).sum().backward()


def test_fewer_regions_than_topk():
    assert RegionGrid.fit(2, 2).num_regions == 4
    assert BiLevelRoutingAttention(dim=8, num_heads=1, topk=49)(torch.randn(1, 2, 2, 8)).shape == (1, 2, 2, 8)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(dim=8, num_heads=0), "num_heads must be at least 1, got 0"),
        (dict(dim=10, num_heads=3), "10 is not a multiple of num_heads 3"),
        (dict(dim=8, num_heads=2, topk=50), "topk must be 1 to num_regions"),
        (dict(dim=8, num_heads=2, topk=0), "topk must be at least 1, got 0"),
        (dict(dim=8, num_heads=2, num_regions=0), "num_regions must be at least 1"),
        (dict(dim=0, num_heads=2), "dim must be at least 1, got 0"),
        (dict(dim=8.0, num_heads=2), "dim must be a whole number, got 8.0"),
        (dict(dim=8, num_heads=2.0), "num_heads must be a whole number, got 2.0"),
        (dict(dim=8, num_heads=True), "num_heads must be a whole number, got True"),
        (dict(dim=8, num_heads=2, num_regions=(7, 7)), r"num_regions must be a whole number, got \(7, 7\)"),
        (dict(dim=8, num_heads=2, num_regions=7.0), "num_regions must be a whole number, got 7.0"),
        (dict(dim=8, num_heads=2, topk=4.0), "topk must be a whole number, got 4.0"),
        (dict(dim=8, num_heads=2, topk="4"), "topk must be a whole number, got '4'"),
        (dict(dim=8, num_heads=2, scale="dim"), "scale must be a positive number, got 'dim'"),
        (dict(dim=8, num_heads=2, padding="zeros"), "padding must be 'masked' or 'published', got 'zeros'"),
        (dict(dim=8, num_heads=2, padding=None), "padding must be 'masked' or 'published', got None"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        BiLevelRoutingAttention(**arguments)


@pytest.mark.parametrize("padding,size", [("masked", "0 x 4"), ("published", "0 x 7")])
def test_empty_map_is_refused(padding, size):
    with pytest.raises(ValueError, match=size):
        BiLevelRoutingAttention(dim=8, num_heads=2, padding=padding)(torch.randn(1, 0, 4, 8))


@pytest.mark.parametrize("padding", ["masked", "published"])
@pytest.mark.parametrize("shape", [(2, 16, 14, 14), (2, 196, 16), (14, 14, 16), (1, 2, 14, 14, 16)])
def test_input_that_is_no_map(shape, padding):
    with pytest.raises(ValueError, match=r"input must be \(B, H, W, 16\), channels last, got"):
        BiLevelRoutingAttention(dim=16, num_heads=2, padding=padding)(torch.randn(shape))


@pytest.mark.compile
@pytest.mark.parametrize("padding", ["masked", "published"])
@pytest.mark.skipif(torch.__version__ < (2, 11), reason="shown with PyTorch 2.11 and newer")
def test_exports_for_maps_of_any_size(padding):
    """With regions that are empty, padded, of one token, or as large as each other."""
    torch.manual_seed(0)
    attention = BiLevelRoutingAttention(dim=16, num_heads=2, num_regions=5, topk=3, padding=padding).eval()
    names = ("batch", "height", "width")
    sides = {i: torch.export.Dim(name, min=1 if name == "batch" else 2, max=256) for i, name in enumerate(names)}
    with symbolic_shapes.patch(backed_size_oblivious=True):
        program = torch.export.export(attention, (torch.randn(2, 12, 17, 16),), dynamic_shapes=(sides,), strict=False)
    for size in [(1, 2, 2), (3, 4, 9), (2, 10, 10), (1, 5, 31), (2, 12, 17), (1, 3, 2)]:
        x = torch.randn(*size, 16)
        torch.testing.assert_close(program.module()(x), attention(x), rtol=0, atol=1e-6)
