import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import rldt_gym
from common.flow import (
    ACTIVATIONS,
    VelocityMLP,
    expected_target,
    flow_matching_loss,
    interpolate,
    sample,
    time_embedding,
)
from common.svgd import transport_field

K, B, P, D, OBS = 8, 3, 4, 2, 5


class QuadraticCritic(torch.nn.Module):
    """Q = -|a - 1|^2 and its half, so that the mean's gradient is 1.5 (1 - a)."""

    def forward(self, obs, action):
        q = -(action - 1).square().sum(-1)
        return torch.stack([q, q / 2])


def networks(seed=0):
    torch.manual_seed(seed)
    velocity, reference = (VelocityMLP(D, OBS, width=8, time_dim=4, activation="silu").double() for _ in range(2))
    return velocity, reference.requires_grad_(False)


def losses(transport_loss, kernel="rbf", seed=0):
    """The three losses on random trajectories, with all that went into them; K = 8, t known from the seed."""
    velocity, reference = networks()
    args = rldt_gym.Args(
        euler_steps=K, bf16=False, device="cpu", transport_loss=transport_loss, kernel=kernel, alpha=0.3
    )
    obs = torch.randn(B, OBS, dtype=torch.float64)
    start = torch.randn(B, P, D, dtype=torch.float64)
    trajectory = sample(velocity, obs[:, None].expand(-1, P, -1), start, K, trajectory=True)
    torch.manual_seed(seed)
    k = torch.randint(K, (B, P))  # the first draw inside actor_losses
    torch.manual_seed(seed)
    result = rldt_gym.actor_losses(velocity, reference, QuadraticCritic(), obs, trajectory, args)
    x = trajectory[k, torch.arange(B)[:, None], torch.arange(P)]
    return velocity, obs[:, None].expand(-1, P, -1), trajectory, x, k / K, result


def field(velocity, obs, trajectory, x, t, kernel="rbf"):
    query = expected_target(x, t, velocity(x, t, obs)).detach()
    particles = query if kernel == "delta" else trajectory[-1]
    return transport_field(query, particles, 1.5 * (1 - particles), 0.3, kernel)


def gradients(velocity, scalar):
    return torch.autograd.grad(scalar, list(velocity.parameters()))


def jacobian_product(velocity, x, t, obs, vectors):
    """sum over the batch of J_v^T vectors."""
    return torch.autograd.grad(velocity(x, t, obs), list(velocity.parameters()), vectors)


@pytest.mark.parametrize("kernel", ["rbf", "delta"])
@pytest.mark.parametrize("seed", [0, 1])
def test_gradient_of_the_literal_transport_loss_is_the_field_times_the_jacobian(kernel, seed):
    velocity, obs, trajectory, x, t, (transport, *_) = losses("literal", kernel, seed)
    phi = field(velocity, obs, trajectory, x, t, kernel)
    expected = jacobian_product(velocity, x, t, obs, -2 / K * (1 - t)[..., None] * phi / (B * P))
    torch.testing.assert_close(gradients(velocity, transport), expected)


@pytest.mark.parametrize("kernel", ["rbf", "delta"])
def test_gradient_of_the_authors_transport_loss_is_weighted_by_one_over_one_minus_t(kernel):
    velocity, obs, trajectory, x, t, (transport, *_) = losses("authors", kernel)
    phi = field(velocity, obs, trajectory, x, t, kernel)
    expected = jacobian_product(velocity, x, t, obs, -phi / (K * (1 - t))[..., None] / (B * P))
    torch.testing.assert_close(gradients(velocity, transport), expected)


def test_the_two_transport_losses_differ_by_twice_one_minus_t_squared():
    # one particle in all, so that there is one t per loss
    velocity, reference = networks()
    obs, start = torch.randn(1, OBS, dtype=torch.float64), torch.randn(1, 1, D, dtype=torch.float64)
    trajectory = sample(velocity, obs[:, None], start, K, trajectory=True)
    for seed in range(6):
        gradient = {}
        for form in ("literal", "authors"):
            args = rldt_gym.Args(euler_steps=K, bf16=False, device="cpu", transport_loss=form)
            torch.manual_seed(seed)
            t = (torch.randint(K, (1, 1)) / K).item()
            torch.manual_seed(seed)
            transport = rldt_gym.actor_losses(velocity, reference, QuadraticCritic(), obs, trajectory, args)[0]
            gradient[form] = torch.cat([g.flatten() for g in gradients(velocity, transport)])
        torch.testing.assert_close(gradient["literal"], 2 * (1 - t) ** 2 * gradient["authors"])


def test_literal_transport_loss_has_the_value_of_eq_13():
    velocity, obs, trajectory, x, t, (transport, *_) = losses("literal")
    phi = field(velocity, obs, trajectory, x, t)
    torch.testing.assert_close(transport, phi.square().sum(-1).mean() / K)


def test_consistency_loss_has_the_value_and_gradient_of_eq_14():
    velocity, obs, trajectory, x, t, (_, consistency, *_) = losses("literal")
    a_dagger = x + (1 - t)[..., None] * velocity(x, t, obs)
    weight = 1 / (K * (1 - t)).square()
    expected = (weight * (a_dagger - trajectory[-1]).square().sum(-1)).mean()
    torch.testing.assert_close(consistency, expected)
    torch.testing.assert_close(gradients(velocity, consistency), gradients(velocity, expected))


def test_consistency_loss_of_a_straight_flow_is_zero():
    straight = lambda x, t, obs: torch.ones_like(x)
    obs, start = torch.zeros(B, OBS), torch.randn(B, P, D)
    trajectory = sample(straight, obs[:, None].expand(-1, P, -1), start, K, trajectory=True)
    args = rldt_gym.Args(euler_steps=K, bf16=False, device="cpu")
    result = rldt_gym.actor_losses(straight, straight, QuadraticCritic(), obs, trajectory, args)
    assert result[1] < 1e-10
    assert result[2] == 0


def test_constraint_loss_of_two_constant_velocities_is_their_squared_distance():
    fast = lambda x, t, obs: torch.full_like(x, 3.0)
    slow = lambda x, t, obs: torch.ones_like(x)
    trajectory = torch.randn(K + 1, B, P, D)
    args = rldt_gym.Args(euler_steps=K, bf16=False, device="cpu")
    result = rldt_gym.actor_losses(fast, slow, QuadraticCritic(), torch.zeros(B, OBS), trajectory, args)
    assert result[2].item() == pytest.approx(4.0 * D)


def test_update_actor_steps_along_the_weighted_sum_of_the_losses():
    velocity, obs, trajectory, _, _, _ = losses("literal")
    reference = networks(5)[1]
    args = rldt_gym.Args(
        euler_steps=K, bf16=False, device="cpu", alpha=0.3, consistency_weight=0.7, constraint_weight=0.1
    )
    torch.manual_seed(0)
    parts = rldt_gym.actor_losses(velocity, reference, QuadraticCritic(), obs[:, 0], trajectory, args)
    total = gradients(velocity, parts[0] + 0.7 * parts[1] + 0.1 * parts[2])
    before = [p.detach().clone() for p in velocity.parameters()]
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(velocity.parameters(), 0.1)
    metrics = rldt_gym.update_actor(velocity, reference, QuadraticCritic(), optimizer, obs[:, 0], trajectory, args)
    torch.testing.assert_close(list(velocity.parameters()), [b - 0.1 * g for b, g in zip(before, total, strict=True)])
    norm = torch.cat([g.flatten() for g in total]).norm()
    torch.testing.assert_close(metrics["diagnostics/actor_grad_norm"], norm)


def gaussian_velocity(x, t, mean, std):
    """E[a - eps | x_t = x] for a ~ N(mean, std^2), eps ~ N(0, 1): the exact flow of eq. (1)."""
    variance = t**2 * std**2 + (1 - t) ** 2
    return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)


def gaussian_score(x, t, mean, std):
    x = x.clone().requires_grad_()
    marginal = torch.distributions.Normal(t * mean, torch.sqrt(t**2 * std**2 + (1 - t) ** 2))
    return torch.autograd.grad(marginal.log_prob(x).sum(), x)[0]


gaussians = st.tuples(st.floats(-2, 2), st.floats(0.1, 3)).map(
    lambda g: [torch.tensor(v, dtype=torch.float64) for v in g]
)
times = st.floats(0.01, 0.95).map(lambda t: torch.tensor(t, dtype=torch.float64))


@given(gaussian=gaussians, t=times)
def test_score_of_a_gaussian_flow_follows_from_its_velocity(gaussian, t):
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    velocity = gaussian_velocity(x, t, *gaussian)
    torch.testing.assert_close(gaussian_score(x, t, *gaussian), (t * velocity - x) / (1 - t), rtol=1e-7, atol=1e-8)


@given(first=gaussians, second=gaussians, t=times)
def test_score_difference_of_two_flows_is_t_over_one_minus_t_times_the_velocity_difference(first, second, t):
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    score = gaussian_score(x, t, *first) - gaussian_score(x, t, *second)
    velocity = gaussian_velocity(x, t, *first) - gaussian_velocity(x, t, *second)
    torch.testing.assert_close(score, t / (1 - t) * velocity, rtol=1e-7, atol=1e-8)


@given(t=st.floats(0, 1), seed=st.integers(0, 1000))
def test_expected_target_is_the_action_from_every_point_of_a_straight_path(t, seed):
    generator = torch.Generator().manual_seed(seed)
    action, noise = torch.randn(2, 6, 3, dtype=torch.float64, generator=generator)
    t = torch.full((6,), t, dtype=torch.float64)
    torch.testing.assert_close(expected_target(interpolate(action, noise, t), t, action - noise), action)


def test_interpolation_runs_from_the_noise_to_the_action():
    action, noise = torch.randn(2, 5, 3)
    assert torch.equal(interpolate(action, noise, torch.zeros(5)), noise)
    assert torch.equal(interpolate(action, noise, torch.ones(5)), action)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_euler_sampler_is_exact_on_a_straight_flow(steps):
    shift, x0 = torch.tensor([1.0, -2.0]), torch.randn(7, 2)
    action = sample(lambda x, t, cond: shift.expand_as(x), torch.zeros(7, 0), x0, steps)
    torch.testing.assert_close(action, x0 + shift)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_euler_sampler_evaluates_the_velocity_at_the_start_of_every_step(steps):
    seen = []

    def velocity(x, t, cond):
        seen.append(t.item())
        return -x

    x0 = torch.ones(1, 1, dtype=torch.float64)
    action = sample(velocity, torch.zeros(1, 0), x0, steps)
    assert seen == pytest.approx([k / steps for k in range(steps)])
    assert action.item() == pytest.approx((1 - 1 / steps) ** steps)


def test_trajectory_holds_all_points_from_the_start_to_the_action():
    velocity = VelocityMLP(3, 4, width=8)
    x0, cond = torch.randn(5, 2, 3), torch.randn(5, 2, 4)
    points = sample(velocity, cond, x0, 6, trajectory=True)
    assert points.shape == (7, 5, 2, 3)
    assert torch.equal(points[0], x0)
    assert torch.equal(points[-1], sample(velocity, cond, x0, 6))
    torch.testing.assert_close(points[3], points[2] + velocity(points[2], torch.tensor(2 / 6), cond) / 6)


def test_sampling_from_zeros_is_deterministic():
    velocity, cond = VelocityMLP(3, 4, width=8), torch.randn(5, 4)
    first, second = (sample(velocity, cond, torch.zeros(5, 3), 4) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sample(velocity, cond, torch.randn(5, 3), 4))


def test_sampler_keeps_no_graph():
    assert not sample(VelocityMLP(3, 4, width=8), torch.randn(5, 4), torch.zeros(5, 3), 2).requires_grad


def test_flow_matching_loss_of_a_zero_velocity_is_the_second_moment_of_the_target():
    # E|a - eps|^2 per dimension = |a|^2 + 1; standard error of 4e5 draws of (2 - eps)^2 is below 0.01
    loss = flow_matching_loss(
        lambda x, t, cond: torch.zeros_like(x), torch.full((200_000, 2), 2.0), torch.zeros(200_000, 0)
    )
    assert loss.item() == pytest.approx(5.0, abs=0.05)


def test_flow_matching_loss_of_a_constant_data_point_is_zero_for_its_exact_velocity():
    exact = lambda x, t, cond: (1.5 - x) / (1 - t[..., None])  # x_t = (1 - t) eps + t a gives a - eps
    loss = flow_matching_loss(exact, torch.full((1000, 2), 1.5, dtype=torch.float64), torch.zeros(1000, 0))
    assert loss.item() < 1e-8


def test_flow_matching_loss_draws_times_uniformly_and_one_per_sample():
    seen = []

    def velocity(x, t, cond):
        seen.append(t)
        return x

    flow_matching_loss(velocity, torch.zeros(20_000, 3), torch.zeros(20_000, 0))
    assert seen[0].shape == (20_000,)
    histogram = torch.histc(seen[0], 10, 0, 1) / 2000
    assert (histogram - 1).abs().max() < 0.1  # 4.7 standard errors


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("cond_mlp", [(), (7,), (9, 6)])
def test_every_option_of_the_velocity_network_gives_finite_velocities_and_gradients(activation, layer_norm, cond_mlp):
    velocity = VelocityMLP(3, 5, 8, 5, 4, activation, layer_norm, cond_mlp)
    out = velocity(torch.randn(6, 2, 3), torch.rand(6, 2), torch.randn(6, 2, 5))
    assert out.shape == (6, 2, 3)
    out.square().sum().backward()
    for name, parameter in velocity.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert any(isinstance(m, torch.nn.LayerNorm) for m in velocity.modules()) == layer_norm


@pytest.mark.parametrize("cond_mlp", [(), (7, 6)])
def test_one_time_for_all_equals_the_same_time_for_each(cond_mlp):
    velocity = VelocityMLP(3, 5, width=8, layer_norm=True, cond_mlp=cond_mlp)
    x, cond = torch.randn(6, 2, 3), torch.randn(6, 2, 5)
    torch.testing.assert_close(velocity(x, torch.tensor(0.3), cond), velocity(x, torch.full((6, 2), 0.3), cond))


def test_velocity_depends_on_action_time_and_state():
    velocity = VelocityMLP(3, 5, width=8)
    x, t, cond = torch.randn(1, 3), torch.tensor(0.25), torch.randn(1, 5)
    out = velocity(x, t, cond)
    for other in ((x + 1, t, cond), (x, t + 0.5, cond), (x, t, cond + 1)):
        assert not torch.allclose(velocity(*other), out)


def test_residual_trunk_is_the_published_network():
    velocity = VelocityMLP(3, 5, width=8, depth=3, time_dim=4)
    x, t, cond = torch.randn(6, 3), torch.rand(6), torch.randn(6, 5)
    time = velocity.time_mlp(time_embedding(t, 4))
    first, block, last = velocity.trunk
    hidden = first(torch.cat([x, time, cond], -1))
    hidden = hidden + block.layers[5](F.relu(block.layers[2](F.relu(hidden))))
    torch.testing.assert_close(velocity(x, t, cond), last(hidden))


@pytest.mark.parametrize("depth, blocks", [(3, 1), (5, 2), (7, 3)])
def test_depth_counts_the_hidden_layers(depth, blocks):
    velocity = VelocityMLP(2, 2, width=8, depth=depth)
    assert len(velocity.trunk) - 2 == blocks
    assert sum(isinstance(m, torch.nn.Linear) for m in velocity.trunk.modules()) == depth + 1


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_even_or_small_depth_is_an_error(depth):
    with pytest.raises(ValueError, match=f"odd and at least 3.*{depth}"):
        VelocityMLP(2, 2, depth=depth)


def test_config_rebuilds_the_network():
    velocity = VelocityMLP(3, 5, 8, 5, 4, "gelu", True, (7, 6))
    copy = VelocityMLP(**velocity.config)
    copy.load_state_dict(velocity.state_dict())
    x, t, cond = torch.randn(6, 3), torch.rand(6), torch.randn(6, 5)
    assert torch.equal(copy(x, t, cond), velocity(x, t, cond))


@given(t=st.floats(0, 1), other=st.floats(0, 1))
def test_time_embedding_tells_all_times_apart(t, other):
    first, second = (time_embedding(torch.tensor(v, dtype=torch.float64), 16) for v in (t, other))
    assert first.shape == (16,)
    assert first.abs().max() <= 1
    if abs(t - other) > 1e-3:
        assert (first - second).abs().max() > 1e-4
