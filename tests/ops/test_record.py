"""What is recorded of an attention gives the weights that it computes with."""
import pytest
import torch

from helpers.records import attend
from ops import AttentionRecord, RegionGrid, Routing, routed_attention


def test_weights_are_those_of_routed_attention():
    torch.manual_seed(0)
    query_grid, key_grid = RegionGrid(5, 7, 2, 3), RegionGrid(9, 4, 3, 2)
    query, key, value = torch.randn(2, 5, 7, 3, 8), torch.randn(2, 9, 4, 3, 8), torch.randn(2, 9, 4, 3, 8)
    routes = torch.stack([torch.stack([torch.randperm(6)[:2] for _ in range(6)]) for _ in range(2)])
    routing = Routing(routes, query_grid, key_grid)
    ours = attend(AttentionRecord(query, key, 0.7, routing), value)
    torch.testing.assert_close(ours, routed_attention(query, key, value, routing, 0.7, "gather"))


def test_the_weights_of_a_query_sum_to_one_over_its_regions():
    grid = RegionGrid(4, 6, 2, 3)
    routing = Routing(torch.tensor([[[5, 0]] + [[1, 2]] * 5]), grid, grid)
    record = AttentionRecord(torch.randn(1, 4, 6, 2, 4), torch.randn(1, 4, 6, 2, 4), 1.0, routing)
    weights = record.weights(1, 1)[0]
    seen = torch.zeros(4, 6, dtype=torch.bool)
    seen[:2, :2] = seen[2:, 4:] = True
    assert torch.equal(record.is_routed(1, 1)[0], seen)
    assert (weights > 0).all(0).equal(seen) and not weights[:, ~seen].any()
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize("row,col", [(-1, 0), (0, -1), (4, 0), (0, 6)])
def test_a_query_that_is_not_there(row, col):
    record = AttentionRecord(torch.randn(1, 4, 6, 2, 4), torch.randn(1, 4, 6, 2, 4), 1.0)
    with pytest.raises(ValueError, match=f"no query in row {row}, column {col} of a map of 4 x 6"):
        record.weights(row, col)
