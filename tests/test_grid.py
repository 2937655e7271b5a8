import torch

from hjepa.grid import Grid, cells, pool, refine, sine_positions


def test_pool_is_the_mean_of_square_neighbourhoods() -> None:
    maps = torch.randn(2, 3, 6, 4, 5)
    pooled = pool(maps, 1)
    assert pooled.shape == (2, 3, 3, 2, 5)
    torch.testing.assert_close(pooled[1, 2, 1, 1], maps[1, 2, 2:4, 2:4].mean(dim=(0, 1)))


def test_pool_drops_what_fills_no_cell_evenly() -> None:
    rows = torch.arange(7.0)[:, None, None].expand(7, 4, 1)
    assert cells(7, 4, 2) == (1, 1)
    # 7 rows hold one cell of 4; of the 3 left over, 1 goes above and 2 below.
    assert pool(rows, 2).item() == 2.5


def test_pooling_twice_is_pooling_once_more_coarsely() -> None:
    maps = torch.randn(8, 8, 3)
    torch.testing.assert_close(pool(pool(maps, 1), 1), pool(maps, 2))


def test_refine_keeps_a_constant_and_orders_in_two_dimensions() -> None:
    coarse = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).reshape(1, 2, 2, 1)
    fine = refine(coarse, 4, 4)[0, :, :, 0]
    assert (fine.diff(dim=0) >= 0).all()
    assert (fine.diff(dim=1) >= 0).all()
    torch.testing.assert_close(refine(torch.full((1, 2, 2, 1), 7.0), 5, 3), torch.full((1, 5, 3, 1), 7.0))


def test_coordinates_are_row_and_column() -> None:
    assert Grid(3, 5).coordinates(torch.tensor([0, 4, 5, 14])).tolist() == [[0, 0], [0, 4], [1, 0], [2, 4]]


def test_positions_tell_all_cells_of_all_levels_apart() -> None:
    grid = Grid(8, 8)
    fine = grid.coordinates(torch.arange(64)).reshape(8, 8, 2)
    places = torch.cat([pool(fine, level).reshape(-1, 2) for level in range(3)])
    embedded = sine_positions(places, 32)
    assert embedded.shape == (84, 32)
    assert torch.cdist(embedded, embedded).fill_diagonal_(9).min() > 0.1
