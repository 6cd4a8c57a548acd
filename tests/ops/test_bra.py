import pytest
import torch
import torch.nn.functional as F

from ops import BiLevelRoutingAttention, RegionGrid


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


@pytest.mark.compile
@pytest.mark.parametrize("impl", ["chunked", "masked", "gather", "auto"])
@pytest.mark.parametrize("size", [(14, 14), (9, 13)])
def test_compiles_into_one_graph(size, impl):
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
        (dict(dim=8, num_heads=0), "8 is not a multiple of num_heads 0"),
        (dict(dim=10, num_heads=3), "10 is not a multiple of num_heads 3"),
        (dict(dim=8, num_heads=2, topk=50), "topk must be 1 to num_regions"),
        (dict(dim=8, num_heads=2, topk=0), "topk must be 1 to num_regions"),
        (dict(dim=8, num_heads=2, num_regions=0), "num_regions must be at least 1"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        BiLevelRoutingAttention(**arguments)


def test_empty_map_is_refused():
    with pytest.raises(ValueError, match="0 x 4"):
        BiLevelRoutingAttention(dim=8, num_heads=2)(torch.randn(1, 0, 4, 8))


@pytest.mark.parametrize("shape", [(2, 16, 14, 14), (2, 196, 16), (14, 14, 16), (1, 2, 14, 14, 16)])
def test_input_that_is_no_map(shape):
    with pytest.raises(ValueError, match=r"input must be \(B, H, W, 16\), channels last, got"):
        BiLevelRoutingAttention(dim=16, num_heads=2)(torch.randn(shape))
