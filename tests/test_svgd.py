import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.svgd import particle_gradient, rbf_kernel, transport_field

SIZES = dict(B=st.integers(1, 3), M=st.integers(1, 4), P=st.integers(1, 7), D=st.integers(1, 5))


def draw(B, M, P, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, M, D), (B, P, D), (B, P, D)
    return (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


def brute_force(query, particles, grad_q, alpha):
    """The field of eq. (6), one pair of points after the other."""
    query, particles, grad_q = (x.numpy() for x in (query, particles, grad_q))
    phi = np.zeros_like(query)
    for b in range(len(query)):
        P = particles.shape[1]
        scale = alpha * np.mean([math.sqrt(sum(g * g)) for g in grad_q[b]])
        for i, x in enumerate(query[b]):
            h = max(np.median([sum((x - a) ** 2) for a in particles[b]]) / (2 * math.log(P + 1)), 1e-8)
            for a, g in zip(particles[b], grad_q[b], strict=True):
                kappa = math.exp(-sum((x - a) ** 2) / (2 * h))
                phi[b, i] += (kappa * g + scale * kappa * (x - a) / h) / P
    return phi


@given(**SIZES, alpha=st.floats(0, 10), seed=st.integers(0, 10_000))
def test_field_equals_a_brute_force_double_loop(B, M, P, D, alpha, seed):
    query, particles, grad_q = draw(B, M, P, D, seed)
    phi = transport_field(query, particles, grad_q, alpha)
    expected = brute_force(query, particles, grad_q, alpha)
    np.testing.assert_allclose(phi.numpy(), expected, rtol=1e-9, atol=1e-11)


def test_delta_kernel_returns_the_gradient_of_q():
    query, _, grad_q = draw(2, 4, 4, 3)
    assert torch.equal(transport_field(query, query, grad_q, 0.5, "delta"), grad_q)


def test_coincident_particles_give_the_floor_bandwidth_and_a_finite_field():
    points = torch.ones(2, 4, 3)
    kappa, h = rbf_kernel(points, points)
    torch.testing.assert_close(h, torch.full_like(h, 1e-8))
    assert torch.equal(kappa, torch.ones_like(kappa))
    grad_q = torch.randn(2, 4, 3)
    phi = transport_field(points, points, grad_q, 1.0)
    torch.testing.assert_close(phi, grad_q.mean(1, keepdim=True).expand_as(phi))


@pytest.mark.parametrize("query, particles, grad_q, kernel, message", [
    ((2, 3, 4), (2, 5, 4), (2, 6, 4), "rbf", r"shapes .*do not fit"),  # gradients of other particles
    ((2, 3, 4), (1, 5, 4), (1, 5, 4), "rbf", r"shapes .*do not fit"),  # other batch
    ((2, 3, 4), (2, 5, 3), (2, 5, 3), "rbf", r"shapes .*do not fit"),  # other dimension
    ((2, 3, 4), (2, 5, 4), (2, 5, 4), "delta", "delta"),  # at other points than the particles
    ((1, 2, 2), (1, 2, 2), (1, 2, 2), "imq", r"'imq'.*rbf or delta"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_an_error(query, particles, grad_q, kernel, message):
    with pytest.raises(ValueError, match=message):
        transport_field(torch.ones(query), torch.ones(particles), torch.ones(grad_q), 0.0, kernel)


def test_particle_gradient_leads_to_the_weighted_mean():
    rng = np.random.default_rng(0)
    q, particles = rng.normal(size=(3, 7)) * [[0.01], [1.0], [5.0]], rng.normal(size=(3, 7, 4))
    result = particle_gradient(torch.tensor(q), torch.tensor(particles)).numpy()
    tau = np.sqrt(np.mean(np.std(q, axis=1) ** 2))
    for i in range(3):
        weight = np.exp(q[i] / tau)
        expected = np.average(particles[i], 0, weight) - particles[i]
        np.testing.assert_allclose(result[i], expected, rtol=1e-6)
