"""Losses and steps of the actor and its exploration, in all three scripts."""

import math

import pytest
import torch
from fakes import arguments, each_script, nothing_good, observed, small_policy, with_stage

import rldt_furniture
import rldt_gym
import rldt_robomimic
from common.flow import VelocityMLP, expected_target, sample
from common.svgd import particle_gradient, transport_field

K, B, P, D, OBS = 8, 3, 4, 2, 5


class QuadraticCritic:
    """Q = -|a - 1|^2 and its half, so that the mean's gradient is 1.5 (1 - a)."""

    def encode(self, obs):
        return obs["state"]

    def __call__(self, obs, action):
        q = -(action - 1).square().sum(-1)
        return torch.stack([q, q / 2])


def call_losses(script, velocity, reference, critic, state, trajectory, args, **given):
    """actor_losses in states (B, OBS)."""
    conds = 3 * [state] if script is rldt_robomimic else [with_stage(script, state)]
    return script.actor_losses(velocity, reference, critic, *conds, trajectory, args, **given)


def losses(script, given=(), **settings):
    """The three losses on random trajectories, with all that went into them."""
    velocity, reference = (VelocityMLP(D, OBS, 8, 3, 4, torch.nn.SiLU).double() for _ in range(2))
    state, start = torch.randn(B, OBS).double(), torch.randn(B, P, D).double()
    states = state[:, None].expand(-1, P, -1)
    trajectory = sample(velocity, states, start, K, trajectory=True)
    k, args = torch.randint(K, (B, P)), arguments(script, alpha=0.3, **settings)
    networks, given = (velocity, reference, QuadraticCritic()), dict(given, k=k)
    result = call_losses(script, *networks, state, trajectory, args, **given)
    x = trajectory[k, torch.arange(B)[:, None], torch.arange(P)]
    return velocity, states, trajectory, x, k / K, result


def gradients(velocity, scalar, weights=None):
    return torch.autograd.grad(scalar, list(velocity.parameters()), weights, retain_graph=True)


@pytest.mark.parametrize("script, form, field, unit", [
    (rldt_gym, "literal", 0, 0), (rldt_gym, "authors", 0, 3), (rldt_gym, "authors", 2.5, 0),
    (rldt_gym, "authors", 2.5, 3.0),
    (rldt_robomimic, "authors", "critic", 0), (rldt_robomimic, "authors", "particles", 0),
    (rldt_furniture, "authors", "critic", 0), (rldt_furniture, "authors", "particles", 0),
])  # fmt: skip
@pytest.mark.parametrize("kernel", ["rbf", "delta"])
def test_transport_loss_has_the_weighted_fields_gradient(script, form, field, unit, kernel):
    given = dict(unit=unit) if unit else {}
    on_gym = dict(transport_loss=form, gradient_norm=field)
    choices = on_gym if script is rldt_gym else dict(q_gradient=field, transport_scale=10.0)
    velocity, states, trajectory, x, t, (transport, *_) = losses(script, given, kernel=kernel, **choices)
    query = expected_target(x, t, velocity(x, t, states)).detach()
    particles = query if kernel == "delta" else trajectory[-1]
    grad_q = 1.5 * (1 - particles)
    if field == "particles":
        grad_q = particle_gradient(-0.75 * (particles - 1).square().sum(-1), particles)
    length = unit or grad_q.norm(dim=-1).mean()
    scale = 10 if script is not rldt_gym else field / length if field else 1
    phi = transport_field(query, particles, scale * grad_q, 0.3, kernel)
    rest = (1 - t)[..., None]
    weight = 2 * rest if form == "literal" else 1 / rest  # eq. (13), and the authors' form of it
    expected = gradients(velocity, velocity(x, t, states), -weight * phi / (K * B * P))
    torch.testing.assert_close(gradients(velocity, transport), expected)


@each_script
def test_consistency_loss_has_the_value_and_gradient_of_eq_14(script):
    velocity, states, trajectory, x, t, (_, consistency, *_) = losses(script)
    a_dagger = x + (1 - t)[..., None] * velocity(x, t, states)
    weight = 1 / (K * (1 - t)).square()
    expected = (weight * (a_dagger - trajectory[-1]).square().sum(-1)).mean()
    torch.testing.assert_close(consistency, expected)
    torch.testing.assert_close(gradients(velocity, consistency), gradients(velocity, expected))


@each_script
def test_losses_take_points_of_the_trajectory_and_of_the_path(script):
    seen = []
    policy = lambda x, t, obs: seen.append((x, t)) or 3 * x
    reference = lambda x, t, obs: seen.append((x, t)) or x
    trajectory = torch.arange(K + 1.0).view(-1, 1, 1, 1).expand(-1, 2000, P, D)
    args = arguments(script, zero_fraction=0.0)
    networks = policy, reference, QuadraticCritic()
    constraint = call_losses(script, *networks, torch.zeros(2000, OBS), trajectory, args)[2]
    (both, times), (x_c, t_c) = seen
    x, t = both[0], times[0]
    assert torch.equal(x[..., 0], t * K)  # x_k = k here
    assert torch.equal(both[1], x_c) and torch.equal(times[1], t_c)  # the same points for both
    torch.testing.assert_close(constraint, 4 * x_c.square().sum(-1).mean())
    for k in range(K):
        assert (t == k / K).float().mean().item() == pytest.approx(1 / K, rel=0.15)
        points = x_c[t_c == k / K]  # (1 - t) noise + t K
        assert points.std().item() == pytest.approx(1 - k / K, rel=0.1)
        assert points.mean().item() == pytest.approx(k, abs=0.1)


@each_script
def test_actor_reference_and_critic_see_their_own_view_of_the_state(script):
    seen = {}

    def network(name):
        return lambda x, t, cond: seen.update({name: cond}) or x

    def critic(cond, action):
        seen["critic"] = cond
        return action.sum(-1).expand(2, -1)

    views = state, *_ = torch.randn(3, B, OBS)  # by robomimic's encoders of actor, reference and critic
    if script is not rldt_robomimic:
        views = state, state, with_stage(script, state)
    trajectory = torch.randn(K + 1, B, P, D)
    given = views if script is rldt_robomimic else views[2:]
    networks = network("actor"), network("reference"), critic
    script.actor_losses(*networks, *given, trajectory, arguments(script))
    for name, view in zip(("actor", "reference", "critic"), views, strict=True):
        each = seen[name].reshape(B, -1, view.shape[1])  # a row for all particles, or one for each
        assert torch.equal(each, view[:, None].expand_as(each)), name


@each_script
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_update_actor_steps_along_the_weighted_sum_of_the_losses(monkeypatch, script, fraction):
    policy, reference = (small_policy(script, OBS, D, 1, euler_steps=K) for _ in range(2))
    settings = dict(alpha=0.3, consistency_weight=0.7, constraint_weight=0.1, n_particles=5)
    args = arguments(script, zero_fraction=fraction, **settings)
    actor_losses, parts, starts = script.actor_losses, [], {}

    def recorded(velocity, theirs, critic, *rest):
        trajectory = rest[len(rest) - 3 if script is rldt_gym else -2]
        assert not trajectory.requires_grad
        starts["particles"] = trajectory[0]

        def at(x, t, cond):
            starts["constraint"] = x - t[..., None] * trajectory[-1]  # (1 - t) x_0
            return theirs(x, t, cond)

        assert theirs is reference.velocity
        result = actor_losses(velocity, at, critic, *rest)
        parts.extend(gradients(velocity, loss) for loss in result[:3])
        return result

    monkeypatch.setattr(script, "actor_losses", recorded)
    parameters = list(policy.velocity.parameters())
    before, optimizer = [p.detach().clone() for p in parameters], torch.optim.SGD(parameters, 0.1)
    obs = observed(script, torch.randn(200, OBS))
    rows = obs, *nothing_good(script), args
    metrics = script.update_actor(policy, reference, QuadraticCritic(), optimizer, *rows)
    total = [a + 0.7 * b + 0.1 * c for a, b, c in zip(*parts, strict=True)]  # eq. (16)
    expected = [b - 0.1 * g for b, g in zip(before, total, strict=True)]
    torch.testing.assert_close([p.detach() for p in parameters], expected)
    norm = torch.cat([g.flatten() for g in total]).norm()
    torch.testing.assert_close(metrics["diagnostics/actor_grad_norm"], norm)
    for x0 in starts.values():
        assert x0.shape == (200, 5, D)
        zero = (x0.abs() < 1e-5).all(-1).float()
        assert zero.mean().item() == pytest.approx(fraction, abs=0.06 * (0 < fraction < 1))
        some = 1 - (1 - fraction) ** 5  # drawn per particle, not per state
        assert (zero.mean(1) > 0).float().mean().item() == pytest.approx(some, abs=0.1)


# -------------------------------------------------------------------------------- exploration
@each_script
def test_exploration_noise_is_the_distance_to_the_expected_target_of_a_late_step(script):
    N = 100_000
    path = torch.randn(K + 1, D, dtype=torch.float64)
    trajectory = path[:, None].expand(-1, N, -1)
    for steps in 2, 5:
        noise = script.explore(trajectory, arguments(script, exploration_steps=steps)) - path[-1]
        variance = 0.0
        for k in range(K - steps, K):
            a_dagger = path[k] + (1 - k / K) * K * (path[k + 1] - path[k])
            variance += (path[-1] - a_dagger).square().sum().item() / steps
        noise /= math.sqrt(variance)
        assert noise.mean(0).abs().max() < 0.02
        torch.testing.assert_close(noise.T @ noise / N, torch.eye(D).double(), rtol=0, atol=0.04)
    noise = script.explore(trajectory, arguments(script, exploration_steps=2)) - path[-1]
    still = (noise.norm(dim=-1) < 1e-9).double().mean()  # the last step's expected target is the action
    assert still.item() == pytest.approx(0.5, abs=0.01)
    for steps in 0, 1:
        action = script.explore(trajectory, arguments(script, exploration_steps=steps))
        torch.testing.assert_close(action, trajectory[-1])
