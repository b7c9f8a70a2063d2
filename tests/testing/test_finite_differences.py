import pytest
import torch

from mtenn_core.testing._probe.finite_differences import directional_derivatives

N = 2000


def log_sum_exp(t, y):
    top = y.amax(-1, keepdim=True)
    return top[:, 0] + torch.logsumexp(t * (y - top), -1) / t[:, 0]


def boltzmann(t, y):
    low = y.amin(-1, keepdim=True)
    return low[:, 0] + (torch.softmax(-t * (y - low), -1) * (y - low)).sum(-1)


FUNCTIONS = {
    "log-sum-exp": log_sum_exp,
    "boltzmann": boltzmann,
    "mean": lambda t, y: y.mean(-1),
    "mean minus deviation": lambda t, y: y.mean(-1) - y.std(-1),
}


@pytest.fixture(params=range(3))
def cases(request):
    """Scales t from 1 to 1000, spreads around 1/t, where the weights change, at 0, 10 and ±1e4."""
    generator = torch.Generator().manual_seed(request.param)

    def pick(values):
        return torch.tensor(values).double()[
            torch.randint(len(values), (N, 1), generator=generator)
        ]

    t, base = pick([1.0, 10.0, 100.0, 1000.0]), pick([0.0, 10.0, 1e4, -1e4])
    spread = 10 ** (2 * torch.rand(N, 1, generator=generator).double() - 1) / t
    y = base + spread * (2 * torch.rand(N, 4, generator=generator).double() - 1)
    axes = torch.eye(4).double()[torch.randint(4, (N,), generator=generator)]
    return t, torch.round(y * 2**33) / 2**33, axes


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_error_bar_covers_the_error(name, cases):
    """The checks allow 10 times the bar; the largest ratio measured in 360,000 cases was 1.02."""
    function, (t, y, axes) = FUNCTIONS[name], cases
    found = directional_derivatives(
        lambda points: function(t.repeat(2, 28).reshape(-1, 1), points),
        y,
        axes,
        torch.full((N,), 0.125),
    )
    leaf = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(t, leaf).sum(), leaf)
    true = (gradient * axes).sum(1)
    assert ((found.derivative - true).abs() <= 2 * found.error).all()
    # ... and is no excuse: an error of 0.1 % of the gradient shows in nearly every case.
    shows = 10 * found.error <= 1e-3 * gradient.abs().amax(1)
    assert shows.double().mean() > 0.995


def derivative_at_one(function):
    point = torch.ones(1, 1, dtype=torch.float64)
    found = directional_derivatives(function, point, point, torch.tensor([0.125]))
    return float(found.derivative), float(found.error)


def test_a_false_plateau_at_large_steps_is_refused():
    """A step of width 1e-4 in the slope: every coarse step says 0.5, the slope is 1."""

    def softplus(points):
        x = (points[:, 0] - 1 + 2e-4) * 1e4
        return torch.nn.functional.softplus(x, threshold=1e9) / 1e4

    derivative, error = derivative_at_one(softplus)
    true = torch.sigmoid(torch.tensor(2.0).double()).item()
    assert abs(derivative - true) <= 10 * error <= 1e-4


def test_arithmetic_in_float32_widens_the_bar():
    double = derivative_at_one(lambda points: points[:, 0].exp())
    single = derivative_at_one(lambda points: points[:, 0].float().exp().double())
    e = torch.tensor(1.0).double().exp().item()
    assert abs(single[0] - e) <= 10 * single[1] <= 1e-2
    assert double[1] < 1e-9 < single[1]


def test_a_kink_or_noise_gives_no_confident_answer():
    _, kink = derivative_at_one(lambda points: (points[:, 0] - 1).abs() + (points[:, 0] > 1))
    _, noise = derivative_at_one(lambda points: torch.rand_like(points[:, 0]))
    assert kink > 1
    assert noise > 1


def test_a_function_that_ends_nearby_is_differentiated_inside():
    derivative, error = derivative_at_one(lambda points: (points[:, 0] - 0.99).log())
    assert abs(derivative - 100) <= 10 * error <= 1e-3
