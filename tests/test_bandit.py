"""A bandit with two modes: what the actor does to a flow, and the field to particles."""

import math

import pytest
import torch

from benchmark import bandit
from common.svgd import transport_field


def test_actor_steps_move_a_flow_to_the_better_mode_and_keep_the_other():
    torch.manual_seed(0)
    policy, scores = bandit.pretrain(), []
    for steps in 0, 300:
        bandit.finetune(policy, bandit.Args(), steps)
        actions = policy.sample(torch.zeros(2000, 1))
        near = (torch.cdist(actions, bandit.MODES) < 1.5 * bandit.WIDTH).float().mean(0)
        scores.append((bandit.q_value(actions).mean().item(), *near.tolist()))
    (q, _, better), (q_after, other, better_after) = scores
    assert q_after > q + 0.05
    assert better_after > better + 0.1
    assert other > 0.15


def log_mixture(x, modes, std, left):
    """Log density of left N(modes[0], std^2) + (1 - left) N(modes[1], std^2)."""
    parts = [
        math.log(w) + torch.distributions.Normal(m, std).log_prob(x).sum(-1)
        for w, m in zip((left, 1 - left), modes, strict=True)
    ]
    return torch.logsumexp(torch.stack(parts), 0)


# The field is zero at the density exp(Q / alpha'), alpha' = alpha E|grad Q|.
@pytest.mark.parametrize("start", [0.3, 0.7])
def test_particles_take_the_boltzmann_weights_of_two_modes(start):
    temperature, std, modes, P = 0.2, 0.5, torch.tensor([[-1.0], [1.0]]), 100
    count = int(start * P)
    means = torch.cat([modes[0].expand(count, 1), modes[1].expand(P - count, 1)])
    x = (means + std * torch.randn(P, 1))[None]
    for _ in range(1500):
        x.requires_grad_()
        q = temperature * log_mixture(x, modes, std, 0.75)
        (grad_q,) = torch.autograd.grad(q.sum(), x)
        x = x.detach()
        alpha = float(temperature / grad_q.norm(dim=-1).mean())
        x = x + transport_field(x, x, grad_q, alpha)
    below = torch.distributions.Normal(0, std).cdf(torch.tensor([1.0, -1.0]))  # of each mode, below zero
    share = 0.75 * below[0].item() + 0.25 * below[1].item()
    assert (x < 0).float().mean().item() == pytest.approx(share, abs=0.06)
    assert x.mean().item() == pytest.approx(0.75 * -1 + 0.25 * 1, abs=0.12)
    assert x.var().item() == pytest.approx(1 - 0.5**2 + std**2, abs=0.2)
