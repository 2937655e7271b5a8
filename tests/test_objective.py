import math

import pytest
import torch
import torch.nn.functional as F

from hjepa.config.sections import Loss, SIGReg
from hjepa.model.hjepa import Output
from hjepa.objective import Objective, agreement, covariance, gaussianity, invariance, variance

TAPS = (2, 4)


def output(embeddings: torch.Tensor | None = None) -> Output:
    g = torch.Generator().manual_seed(0)
    shapes = [(6, 4, 4, 3, 2, 8), (6, 4, 2, 1, 1, 8)]
    predictions = [torch.randn(s, generator=g, requires_grad=True) for s in shapes]
    targets = [torch.randn(s, generator=g) for s in shapes]
    return Output(predictions, targets, embeddings, torch.zeros(1), torch.zeros(1), 2)


@pytest.mark.parametrize(("kind", "distance"), [("mse", F.mse_loss), ("smoothl1", F.smooth_l1_loss)])
def test_total_is_the_weighted_sum_over_levels(kind: str, distance: object) -> None:
    out = output()
    losses = Objective(Loss(type=kind, hierarchy_weights=(1.0, 0.3)), 2, TAPS)(out, 0)
    per_level = [distance(p, t) for p, t in zip(out.predictions, out.targets, strict=True)]  # type: ignore[operator]
    torch.testing.assert_close(losses.total, per_level[0] + 0.3 * per_level[1])
    torch.testing.assert_close(losses.terms["level1"], per_level[1].detach())
    torch.testing.assert_close(losses.terms["level1/tap4"], per_level[1].detach())
    taps = [losses.terms[f"level0/tap{tap}"] for tap in TAPS]
    torch.testing.assert_close(sum(taps) / 2, losses.terms["level0"])


def test_default_weights_halve_from_level_to_level() -> None:
    assert Objective(Loss(), 4, TAPS).weights == (1.0, 0.5, 0.25, 0.125)


def test_beta_moves_the_smooth_l1_distance() -> None:
    one, other = (Objective(Loss(smoothl1_beta=beta), 2, TAPS)(output(), 0).total for beta in (1.0, 0.1))
    assert other > one


def test_every_weight_of_the_regularisers_counts() -> None:
    views = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(1))
    plain = Objective(Loss(type="smoothl1"), 2, TAPS)(output(), 0).total

    def total(**section: object) -> torch.Tensor:
        return Objective(Loss.model_validate(section), 2, TAPS)(output(views), 0).total

    base = {"invariance_weight": 2.0, "variance_weight": 3.0, "covariance_weight": 5.0, "weight": 0.5}
    expected = plain + 0.5 * (2 * invariance(views) + 3 * variance(views) + 5 * covariance(views))
    torch.testing.assert_close(total(type="combined", vicreg=base), expected)
    sigreg = SIGReg(weight=0.5, mix=0.25)
    expected = plain + 0.5 * (0.75 * agreement(views, 2) + 0.25 * gaussianity(views, sigreg, 0))
    torch.testing.assert_close(total(type="sigreg", sigreg={"weight": 0.5, "mix": 0.25}), expected)


def test_invariance_compares_views_of_one_image() -> None:
    a, b, c = torch.randn(3, 10, 4)
    torch.testing.assert_close(invariance(torch.stack((a, b))), F.mse_loss(a, b))
    pairs = (F.mse_loss(a, b) + F.mse_loss(a, c) + F.mse_loss(b, c)) / 3
    torch.testing.assert_close(invariance(torch.stack((a, b, c))), pairs)
    assert invariance(torch.stack((a, a))) == 0


def test_views_agree_with_the_mean_of_the_global_ones_alone() -> None:
    a, b, local = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(0))
    mean = (a + b) / 2
    expected = ((a - mean).square() + (b - mean).square() + (local - mean).square()).mean() / 3
    torch.testing.assert_close(agreement(torch.stack((a, b, local)), 2), expected)
    torch.testing.assert_close(agreement(torch.stack((a, b)), 2), torch.stack((a, b)).var(dim=0, unbiased=False).mean())
    torch.testing.assert_close(agreement(torch.stack((a, local)), 1), (a - local).square().mean() / 2)
    out = output(torch.stack((a, b, local)))  # two global ones
    terms = Objective(Loss(type="sigreg"), 2, TAPS)(out, 0).terms
    torch.testing.assert_close(terms["sigreg/invariance"], expected)


def test_what_a_loss_asks_of_the_model() -> None:
    asked = {kind: Loss(type=kind).has_image_level for kind in ("mse", "smoothl1", "combined", "sigreg")}
    assert asked == {"mse": False, "smoothl1": False, "combined": True, "sigreg": True}
    assert Loss().predicts
    assert Loss(hierarchy_weights=(0.0, 0.1)).predicts
    assert not Loss(hierarchy_weights=(0.0, 0.0)).predicts


def test_a_level_of_weight_zero_is_told_and_not_counted() -> None:
    out = output()
    losses = Objective(Loss(hierarchy_weights=(0.0, 2.0)), 2, TAPS)(out, 0)
    torch.testing.assert_close(losses.total, 2 * F.smooth_l1_loss(out.predictions[1], out.targets[1]))
    assert losses.terms["level0"] > 0


def test_variance_and_covariance_against_their_formulas() -> None:
    z = torch.randn(2, 64, 5)
    assert variance(torch.zeros(2, 8, 3)).item() == pytest.approx(0.99)
    assert variance(10 * z) == 0
    expected = [F.relu(1 - (v.var(0) + 1e-4).sqrt()).mean() for v in z]
    torch.testing.assert_close(variance(z), sum(expected) / 2)
    by_numpy = [((torch.cov(v.T) * (1 - torch.eye(5))) ** 2).sum() / 5 for v in z]
    torch.testing.assert_close(covariance(z), sum(by_numpy) / 2)


class TestGaussianity:
    """Conventions of SIGReg against closed forms: Epps-Pulley with window exp(-t^2/2) on [-t_max, t_max]."""

    config = SIGReg(num_slices=512, num_knots=301, t_max=8.0)

    def statistic(self, z: torch.Tensor, config: SIGReg | None = None) -> float:
        return gaussianity(z.unsqueeze(0), config or self.config, 3).item()

    def test_collapsed(self) -> None:
        # phi_n = 1: B * integral of (1 - e^{-t^2/2})^2 e^{-t^2/2} dt.
        integral = math.sqrt(2 * math.pi) * (1 - 2 / math.sqrt(2) + 1 / math.sqrt(3))
        assert self.statistic(torch.zeros(50, 4)) == pytest.approx(50 * integral, rel=1e-3)

    def test_one_dimension_is_the_classical_statistic(self) -> None:
        # Epps and Pulley 1983: n * [mean_jk g(x_j - x_k) - 2 mean_j g'(x_j) + const], integrals in closed form.
        x = torch.randn(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        root = math.sqrt(2 * math.pi)
        pairs = torch.exp(-((x - x.T) ** 2) / 2).mean() * root
        singles = torch.exp(-(x**2) / 4).mean() * root / math.sqrt(2)
        expected = 40 * (pairs - 2 * singles + root / math.sqrt(3))
        assert self.statistic(x.float()) == pytest.approx(expected.item(), rel=1e-3)

    def test_standard_normal_has_an_expectation_that_no_batch_size_changes(self) -> None:
        # E = integral of (1 - e^{-t^2}) e^{-t^2/2} dt.
        expected = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
        g = torch.Generator().manual_seed(0)
        few = SIGReg(num_slices=64, num_knots=101, t_max=8.0)
        for batch in (64, 1024):
            values = [self.statistic(torch.randn(batch, 16, generator=g), few) for _ in range(40)]
            assert sum(values) / 40 == pytest.approx(expected, rel=0.1)

    @staticmethod
    def expected(batch: int, mean: float, std: float) -> float:
        """Of samples of N(mean, std^2): batch * bias^2 + variance of the empirical characteristic function."""
        own = math.sqrt(math.pi / (std**2 + 0.5))
        wanted = math.sqrt(2 * math.pi / 3)
        a = std**2 / 2 + 1
        both = math.sqrt(math.pi / a) * math.exp(-(mean**2) / (4 * a))
        return batch * (own + wanted - 2 * both) + math.sqrt(2 * math.pi) - own

    @pytest.mark.parametrize(("mean", "std"), [(0, 1), (0.5, 1), (2, 1), (0, 3), (0, 0.3), (-1, 0.5)])
    def test_shifted_and_scaled_normals_have_their_closed_forms(self, mean: float, std: float) -> None:
        g = torch.Generator().manual_seed(0)
        config = SIGReg(num_slices=1, num_knots=301, t_max=8.0)
        found = [self.statistic(mean + std * torch.randn(512, 1, generator=g), config) for _ in range(60)]
        assert sum(found) / 60 == pytest.approx(self.expected(512, mean, std), rel=0.12)

    def test_a_line_in_the_plane_has_the_mean_of_its_shadows(self) -> None:
        # Rank one: along a direction at angle a to it, samples are N(0, cos(a)^2).
        g = torch.Generator().manual_seed(0)
        line = torch.tensor([[0.6, 0.8]])
        config = SIGReg(num_slices=200, num_knots=101, t_max=8.0)
        found = [self.statistic(torch.randn(256, 1, generator=g) * line, config) for _ in range(20)]
        angles = [math.pi * (i + 0.5) / 1000 for i in range(1000)]
        expected = sum(self.expected(256, 0, abs(math.cos(angle))) for angle in angles) / 1000
        assert sum(found) / 20 == pytest.approx(expected, rel=0.1)

    def test_shift_scale_and_rank_one_are_worse_than_normal(self) -> None:
        z = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
        normal = self.statistic(z)
        rank_one = z[:, :1] * F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(1)))
        for worse in (z + 0.5, 3 * z, 0.3 * z, rank_one, rank_one * 4):
            assert self.statistic(worse) > 5 * normal

    def test_directions_follow_the_seed(self) -> None:
        z = torch.randn(1, 32, 16)
        config = SIGReg(num_slices=4)
        assert gaussianity(z, config, 0) == gaussianity(z, config, 0)
        assert gaussianity(z, config, 0) != gaussianity(z, config, 1)

    def test_default_knots_are_close_to_the_integral(self) -> None:
        z = torch.randn(256, 8, generator=torch.Generator().manual_seed(0)) * 1.5
        fine = self.statistic(z, SIGReg(num_slices=512, num_knots=1001, t_max=3.0))
        assert self.statistic(z, SIGReg(num_slices=512)) == pytest.approx(fine, rel=0.01)

    def test_descent_makes_a_batch_gaussian(self) -> None:
        z = torch.nn.Parameter(torch.randn(128, 4, generator=torch.Generator().manual_seed(0)) * 0.1 + 1)
        optimizer = torch.optim.Adam([z], lr=0.05)
        for step in range(200):
            optimizer.zero_grad()
            gaussianity(z.unsqueeze(0), SIGReg(num_slices=64), step).backward()
            optimizer.step()
        assert z.mean(0).abs().max() < 0.2
        assert ((z.std(0) - 1).abs() < 0.25).all()
