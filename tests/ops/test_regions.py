import pytest
import torch

from ops import RegionGrid


@pytest.mark.parametrize("height", [1, 2, 6, 7, 8, 13, 14, 49, 50, 56, 61, 133])
@pytest.mark.parametrize("width", [1, 7, 9, 50, 84])
@pytest.mark.parametrize("regions", [1, 2, 7, 8])
def test_fit_covers_any_map_without_an_empty_region(height, width, regions):
    grid = RegionGrid.fit(height, width, regions)
    assert grid.rows <= regions and grid.cols <= regions
    assert (grid.token_counts() > 0).all()
    assert grid.token_counts().sum() == height * width
    assert grid.is_real().sum(1).view(grid.rows, grid.cols).equal(grid.token_counts())


def test_fit_is_the_published_grid_where_seven_divides():
    assert RegionGrid.fit(56, 28, 7) == RegionGrid(56, 28, 7, 7)
    assert not RegionGrid.fit(56, 28, 7).is_padded


@pytest.mark.parametrize("height,width", [(14, 21), (13, 9), (1, 1), (50, 61)])
def test_crop_inverts_pad(height, width):
    grid = RegionGrid.fit(height, width)
    x = torch.randn(2, height, width, 3, 5)
    padded = grid.pad(x)
    assert padded.shape[1:3] == (grid.rows * grid.region_height, grid.cols * grid.region_width)
    assert grid.crop(padded).equal(x)
    torch.testing.assert_close(padded.square().sum(), x.square().sum())


def test_nothing_is_copied_where_nothing_is_padded():
    x = torch.randn(1, 14, 14, 2, 4)
    assert RegionGrid.fit(14, 14).pad(x) is x


@pytest.mark.parametrize("arguments", [(0, 4, 1, 1), (4, 0, 1, 1), (4, 4, 0, 1), (4, 4, 1, 5), (9, 9, 7, 1)])
def test_impossible_grids_are_refused(arguments):
    with pytest.raises(ValueError, match="region"):
        RegionGrid(*arguments)


def test_fit_refuses_an_empty_map():
    with pytest.raises(ValueError, match="0 x 5"):
        RegionGrid.fit(0, 5)
