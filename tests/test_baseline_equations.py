"""baselines/: the equations of each method, against closed forms."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_baselines import METHODS, TINY, arguments
from torch.distributions import Normal

import rldt_gym
from baselines import best_of_n, dppo, dsrl, families, fpo, ppo, qam, reinflow
from common.flow import FlowPolicy, VelocityMLP, sample, time_embedding


# ------------------------------------------------------------------------- the PPO family's parts
@st.composite
def rollouts(draw):
    """Rewards, ends and values (T, N) of rollouts, gamma and lambda."""
    T, N = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    reward, value, next_value = torch.randn(3, T, N, dtype=torch.float64, generator=generator)
    ends = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=T * N, max_size=T * N))
    end = torch.tensor(ends).view(T, N)  # 1: terminated, 2: truncated
    next_value[:-1] = torch.where(end[:-1] == 0, value[1:], next_value[:-1])
    ends = (end == 1).double(), (end == 2).double()
    return reward, *ends, value, next_value, draw(st.floats(0, 1)), draw(st.floats(0, 1))


@given(rollouts())
def test_gae_is_the_exponential_average_of_the_n_step_advantages(rollout):
    reward, terminated, truncated, value, next_value, gamma, lam = rollout
    advantage = ppo.gae(*rollout)
    T, N = reward.shape
    for n in range(N):
        for t in range(T):
            last = next(i for i in range(t, T) if terminated[i, n] or truncated[i, n] or i == T - 1)
            total, n_step = 0.0, []
            for i in range(t, last + 1):
                total += gamma ** (i - t) * reward[i, n].item()
                bootstrap = 0.0 if terminated[i, n] else gamma ** (i - t + 1) * next_value[i, n].item()
                n_step.append(total + bootstrap - value[t, n].item())
            expected = sum((1 - lam) * lam**i * a for i, a in enumerate(n_step[:-1]))
            expected += lam ** (last - t) * n_step[-1]
            assert advantage[t, n].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_reward_scale_is_the_deviation_of_the_discounted_returns_of_all_rollouts():
    scale, rng = ppo.RewardScale(3, 0.9), np.random.default_rng(0)
    running, everything = np.zeros(3), []
    for _ in range(4):
        reward, done = rng.normal(2, 5, (20, 3)).astype(np.float32), rng.random((20, 3)) < 0.1
        scaled = scale(torch.as_tensor(reward), torch.as_tensor(done).float())
        for r, d in zip(reward, done, strict=True):
            running = 0.9 * running + r
            everything.append(running.copy())
            running[d] = 0
        np.testing.assert_allclose(scaled, reward / np.std(everything), rtol=1e-4)
    scale.count.fill_(1e12)  # what comes now does not move the deviation
    outliers = scale(torch.tensor([[1e3, -1e3, 1.0]]), torch.zeros(1, 3))
    assert outliers[0].tolist() == pytest.approx([10, -10, 1 / np.std(everything)], rel=1e-4)


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("size", [1e-6, 0.1, 1e4])
def test_reward_scale_of_constant_and_of_late_rewards(size, late):
    scale, done = ppo.RewardScale(2, 0.5), torch.zeros(4, 2)
    for _ in range(late):  # rollouts without reward teach nothing
        assert torch.equal(scale(torch.zeros(4, 2), done), torch.zeros(4, 2))
        assert scale.scale() == 1
    scaled = scale(torch.full((4, 2), size), done)  # returns 1, 1.5, 1.75 and 1.875 times the reward
    torch.testing.assert_close(scaled, torch.full((4, 2), 1 / np.std([1, 1.5, 1.75, 1.875])).float())
    scale = ppo.RewardScale(2, 0.99)
    for _ in range(3):  # episodes of a single step: all returns are equal
        scaled = scale(torch.full((4, 2), -size), done + 1)
        torch.testing.assert_close(scaled, torch.full((4, 2), -10.0))
        assert scale.var < 1e-20 * size**2


class LinearFlow(torch.nn.Module):
    """v(x, t, s) = x A + t b + s C, whose every quantity has a closed form."""

    time_dim = 8

    def __init__(self, obs_dim, size):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        parameter = lambda *shape: torch.nn.Parameter(0.3 * torch.randn(*shape, generator=generator))
        self.A, self.b, self.C = parameter(size, size), parameter(size), parameter(obs_dim, size)
        self.time_mlp = torch.nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x, t, obs):
        return x @ self.A + t[..., None] * self.b + obs @ self.C


def rolled_out(name, rollout_chunks=3, **changes):
    """A method's policy with a linear flow, one rollout of Hopper by it, and the arguments."""
    module, fields = METHODS[name], dict(rollout_chunks=rollout_chunks, zero_fraction=0.0)
    args = arguments(module, **TINY[name] | fields | changes)
    sizes = dict(obs_dim=11, action_dim=3, chunk=2, euler_steps=4, width=8, depth=3, time_dim=8)
    own = dict(reinflow=reinflow.NoisyPolicy, dppo=dppo.DenoisingPolicy)
    family = families.family_of(args)
    torch.manual_seed(2)
    policy = module.make_policy(own.get(name), FlowPolicy(**sizes), family)
    policy.velocity, policy.limit = LinearFlow(11, 6), 0.2
    if name == "dppo":
        policy.frozen = LinearFlow(11, 6)
        with torch.no_grad():
            policy.frozen.b += 1.0
    policy.set_limits(obs_min=-5 * np.ones(11), obs_max=5 * np.ones(11))
    family.envs.reset(5)
    storage = family.make_replay(policy)
    torch.manual_seed(2)
    rollout, _ = ppo.collect(family, policy, module.act, storage, SimpleNamespace(world=1), 0, {})
    rollout |= {name: torch.randn(rollout_chunks, 4) for name in ("advantage", "target")}
    return policy, rollout, args


def rows(rollout):
    """The chunks of a rollout (T, N, ...), (T * N, ...) each."""
    return {name: value.flatten(0, 1) for name, value in rollout.items()}


def first_update(name, **changes):
    """Metrics of an update on the batch that the policy has just drawn, and of the next one on it."""
    policy, rollout, args = rolled_out(name, rollout_chunks=8, **changes)
    torch.manual_seed(0)
    policy.velocity = VelocityMLP(6, 11, 16, 3, 8)
    batch = METHODS[name].make_batch(policy, rows(rollout), args)
    i = torch.randperm(len(batch["obs"]))[:13]  # in another order and number than it was made in
    batch = {key: value[i] for key, value in batch.items()}
    optimizer = torch.optim.Adam(policy.velocity.parameters(), 0.01)
    if name == "reinflow":
        optimizer.add_param_group(dict(params=policy.noise.parameters()))
    return [METHODS[name].update_actor(policy, optimizer, batch, args) for _ in range(2)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name, changes", [
    ("reinflow", {}), ("dppo", {}), ("dppo", dict(form="diffusion")), ("fpo", dict(form="fpo")),
    ("fpo", {}),
])  # fmt: skip
def test_ratio_of_the_first_minibatch_is_one(name, changes, precision):
    first, second = first_update(name, clip=1e-5, precision=precision, **changes)
    assert first["diagnostics/kl"].item() == pytest.approx(0, abs=1e-7)  # products round by their size
    assert first["diagnostics/clip_fraction"] == 0
    assert second["diagnostics/kl"] > 0
    assert second["diagnostics/clip_fraction"] > 0.5
    if name != "dppo":  # then the loss is minus the mean of normalised advantages, which is 0
        assert first["losses/policy"].item() == pytest.approx(0, abs=1e-6)


# ----------------------------------------------------------------------------------- ReinFlow
def test_reinflow_draws_its_chain_on_the_grid_on_which_it_computes_log_probabilities():
    policy, rollout, args = rolled_out("reinflow", rollout_chunks=1)
    torch.manual_seed(2)
    x, obs, K, flow = torch.randn(4, 6), rollout["obs"][0], 4, policy.velocity
    expected, log_prob = [x], Normal(0, 1).log_prob(x).sum(1)
    entropy = 6 * Normal(0, 1).entropy()
    with torch.no_grad():
        for k in range(K):
            time = flow.time_mlp(time_embedding(torch.full((4,), k / K), 8))
            raw = policy.noise.layers(torch.cat([time, obs], 1)).tanh()
            sigma = torch.exp((math.log(0.1**2) + math.log(0.2**2 / 0.1**2) * (raw + 1) / 2) / 2)
            assert ((sigma > 0.1) & (sigma < 0.2)).all()
            mean = (x + (x @ flow.A + k / K * flow.b + obs @ flow.C) / K).clamp(-1, 1)
            x = mean + sigma * torch.randn(4, 6).clamp(-3, 3)
            x = x.clamp(-1, 1) if k == K - 1 else x
            expected.append(x)
            log_prob += Normal(mean, sigma).log_prob(x).sum(1)
            entropy = entropy + Normal(mean, sigma).entropy().sum(1)
    torch.testing.assert_close(rollout["chain"][0], torch.stack(expected, 1))
    ours, rate = reinflow.chain_log_prob(policy, obs, rollout["chain"][0], args)
    torch.testing.assert_close(ours.detach(), (log_prob / 30).clamp(-1, 1))
    torch.testing.assert_close(rate.detach(), entropy / 30)


def test_reinflow_holds_the_limit_of_its_noise_and_lowers_it_along_a_cosine():
    args, policy = arguments(reinflow, sigma_min=0.08, sigma_max=0.16), SimpleNamespace()
    limit = lambda spent: reinflow.set_limit(policy, spent, args)["diagnostics/sigma_limit"]
    assert limit(0) == limit(0.35) == policy.limit == pytest.approx(0.16)
    assert limit(1) == pytest.approx(0.08 + 0.7 * 0.08)
    assert limit(0.35 + 0.65 / 2) == pytest.approx((0.16 + 0.136) / 2)  # half way of a cosine
    assert limit(0.35 + 0.65 / 3) == pytest.approx(0.16 - 0.024 / 4)  # (1 - cos 60 degrees) / 2


def test_reinflow_is_drawn_to_the_actions_of_the_base_policy_from_zero():
    policy, rollout, args = rolled_out("reinflow", rollout_chunks=1, clone_weight=0.5)
    policy.frozen = LinearFlow(11, 6)
    obs, zero = rollout["obs"][0], torch.zeros(4, 6)
    assert reinflow.clone_loss(policy, obs, args) == 0
    with torch.no_grad():
        policy.velocity.b += 0.3
        start = [sample(velocity, obs, zero, 4) for velocity in (policy.velocity, policy.frozen)]
        assert max(x.abs().max() for x in start) < 1  # nothing is clipped
    loss = reinflow.clone_loss(policy, obs, args)
    torch.testing.assert_close(loss, (start[0] - start[1]).square().mean())
    (expected,) = torch.autograd.grad(loss, policy.velocity.b)
    policy.velocity.time_mlp = torch.nn.Identity()
    batch, gradients = reinflow.make_batch(policy, rows(rollout), args), []
    for args.clone_weight in 0.0, 0.5:
        optimizer = torch.optim.SGD(policy.parameters(), 0.0)
        metrics = reinflow.update_actor(policy, optimizer, batch, args)
        gradients.append(policy.velocity.b.grad)
        assert ("losses/clone" in metrics) == (args.clone_weight > 0)
    torch.testing.assert_close(gradients[1] - gradients[0], 0.5 * expected)


def test_log_probabilities_of_points_far_from_their_means_are_cut_off(monkeypatch):
    policy, rollout, args = rolled_out("reinflow", rollout_chunks=1)
    chain = rollout["chain"][0].clone()
    chain[0, 2:] += 5  # beyond any noise
    ours, _ = reinflow.chain_log_prob(policy, rollout["obs"][0], chain, args)
    assert ours[0] == -1 and ours[1] > -1
    policy, rollout, args = rolled_out("dppo", rollout_chunks=1)
    batch = dppo.make_batch(policy, rows(rollout), args)
    off = 0.1 * torch.linspace(-4, 4, 6)  # -4 to 4 standard deviations
    policy.step = lambda network, x, k, obs: (batch["x_next"] - off, torch.full((len(x),), 0.01))
    density = Normal(0, 0.1).log_prob(off)
    assert density.min() < -5
    expected = density.clamp(-5, 2).mean().expand(len(batch["k"]))
    torch.testing.assert_close(dppo.step_log_prob(policy, batch, args), expected)
    small = dataclasses.replace(args, sigma=0.01)  # of steps: likelihoods have no less than 0.1
    torch.testing.assert_close(dppo.step_log_prob(policy, batch, small), expected)
    off = 0 * off
    monkeypatch.setattr(dppo, "LIKELIHOOD_SIGMA", 0.01)  # whose greatest log-density is 3.7
    assert (dppo.step_log_prob(policy, batch, small) == 2).all()


# --------------------------------------------------------------------------------------- DPPO
def test_dppo_draws_and_scores_its_last_steps_by_the_tuned_network_and_the_first_by_the_frozen_one():
    policy, rollout, args = rolled_out("dppo", rollout_chunks=1, tuned_steps=3, sigma=0.2)
    torch.manual_seed(2)
    x, obs, K = torch.randn(4, 6), rollout["obs"][0], 4
    chain, log_prob = [], []
    with torch.no_grad():
        for k in range(K):
            flow = policy.frozen if k == 0 else policy.velocity
            mean = x + (x @ flow.A + k / K * flow.b + obs @ flow.C) / K
            noise = torch.randn(4, 6).clamp(-3, 3)
            if k > 0:
                chain.append(x)
            x = mean if k == 0 else mean + 0.2 * noise
            if k > 0:
                log_prob.append(Normal(mean, 0.2).log_prob(x).clamp(-5, 2).mean(1))
    torch.testing.assert_close(rollout["chain"][0], torch.stack([*chain, x], 1))
    batch = dppo.make_batch(policy, rows(rollout), args)
    assert batch["k"].tolist() == [1, 2, 3] * 4
    torch.testing.assert_close(batch["old_log_prob"], torch.stack(log_prob, 1).flatten())
    assert torch.equal(batch["obs"].view(4, 3, 11)[:, 1], obs)


def test_dppo_discounts_the_advantage_by_the_denoising_steps_that_follow():
    policy, rollout, args = rolled_out("dppo", tuned_steps=4, gamma_denoising=0.5)
    batch = dppo.make_batch(policy, rows(rollout), args)
    advantage = (batch["advantage"] - batch["advantage"].mean()) / batch["advantage"].std()
    weight = torch.tensor([0.125, 0.25, 0.5, 1.0]).repeat(12)
    objective = (weight * advantage * dppo.step_log_prob(policy, batch, args)).mean()
    expected = torch.autograd.grad(objective, policy.velocity.A)[0]
    before = policy.velocity.A.detach().clone()
    policy.velocity.time_mlp = None
    dppo.update_actor(policy, torch.optim.SGD(policy.velocity.parameters(), 0.1), batch, args)
    torch.testing.assert_close(policy.velocity.A.detach(), before + 0.1 * expected, rtol=1e-4, atol=1e-7)


def test_diffusion_steps_are_the_posterior_of_the_forward_process():
    # of actions N(0, s^2) the exact prediction of the noise is linear, and the chain of posteriors must
    # carry N(0, abar_k s^2 + 1 - abar_k) from each k to k + 1
    K, s = 6, 0.3
    policy = dppo.DenoisingPolicy(1, 1, 1, K, width=8, depth=3, time_dim=4, form="diffusion")
    level = [math.cos((1 - k / K + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(K + 1)]
    np.testing.assert_allclose(policy.alpha_bar[1:], np.array(level[1:]) / level[-1], rtol=1e-5)
    assert policy.alpha_bar[0] < 1e-3

    def exact(x, t, obs):
        signal = policy.alpha_bar[(t * K).round().long()]
        return (1 - signal).sqrt() * x / (signal * s**2 + 1 - signal)  # E[eps | x]

    for k in range(K):
        mean, std = policy.step(exact, torch.tensor([[0.5]]), torch.tensor(k), torch.zeros(1, 1))
        signal, after = policy.alpha_bar[k].item(), policy.alpha_bar[k + 1].item()
        var = signal * s**2 + 1 - signal
        covariance = math.sqrt(signal * after) * s**2 + (1 - after) * math.sqrt(signal / after)
        assert mean.item() == pytest.approx(0.5 * covariance / var, rel=1e-3)
        # the variance given a, plus that of the mean of a given x_k, is the whole conditional variance
        slope = math.sqrt(after) * (1 - signal / after) / (1 - signal)
        whole = after * s**2 + 1 - after - covariance**2 / var
        found = std.item() ** 2 + slope**2 * s**2 * (1 - signal) / var
        assert found == pytest.approx(whole, rel=1e-3, abs=1e-6)


# ---------------------------------------------------------------------------------------- FPO
def gaussian_flow(mean, s):
    """The exact velocity of the straight path from N(0, 1) to N(mean, s^2)."""

    def velocity(x, t, obs):
        t = t[..., None]
        return mean + (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2) * (x - t * mean)

    return velocity


def test_fpo_clips_and_fpo_plus_plus_pulls_the_ratio_back_where_the_advantage_is_negative():
    ratio = torch.tensor([[0.5, 0.95, 1.0, 1.05, 2.0]])
    plus, minus = torch.full((1, 1), 2.0), torch.full((1, 1), -2.0)
    one, two = (fpo.Args(form=form, clip=0.1) for form in ("fpo", "fpo++"))
    for args, advantage, expected in (
        (one, plus, torch.tensor([[1.0, 1.9, 2.0, 2.1, 2.2]])),
        (one, minus, torch.tensor([[-1.8, -1.9, -2.0, -2.1, -4.0]])),
        (two, plus, fpo.surrogate(ratio, plus, one)),
        (two, minus, -2 * ratio - 2 * (ratio - 1) ** 2 / 0.2),
    ):
        torch.testing.assert_close(fpo.surrogate(ratio, advantage, args), expected)
    many = torch.linspace(0.5, 1.5, 1001)[None]  # of a negative advantage the best lies at the lower end
    assert many[0, fpo.surrogate(many, minus, two).argmax()].item() == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("form", ["fpo", "fpo++"])
def test_fpo_update_takes_the_ratio_of_the_old_loss_over_the_new_one_and_bounds_it(monkeypatch, form):
    # losses fall from 3 to 2 on the first action and rise from 1 to 50 on the second
    args, shift = fpo.Args(form=form, clip=0.5), torch.nn.Parameter(torch.zeros(()))
    old, new = torch.tensor([[3.0, 3.0], [1.0, 1.0]]), torch.tensor([[2.0, 2.0], [50.0, 50.0]])
    seen, original = [], fpo.surrogate
    monkeypatch.setattr(fpo, "cfm_losses", lambda *_: new + shift)
    record = lambda ratio, *rest: seen.append(ratio) or original(ratio, *rest)
    monkeypatch.setattr(fpo, "surrogate", record)
    policy = SimpleNamespace(velocity=torch.nn.ParameterList([shift]))
    batch = dict(old_losses=old, advantage=torch.tensor([1.0, -1.0]))
    fpo.update_actor(policy, torch.optim.SGD([shift], 0.0), batch, args)
    expected = torch.tensor([[math.e] * 2, [math.exp(-10)] * 2])
    torch.testing.assert_close(seen[0].detach(), expected[:, : 1 if form == "fpo" else 2])


@pytest.mark.parametrize("form", ["fpo", "fpo++"])
def test_fpo_compares_losses_at_the_same_pairs_and_bounds_them(monkeypatch, form):
    policy, rollout, args = rolled_out("fpo", samples=5, form=form)
    batch = fpo.make_batch(policy, rows(rollout), args)
    assert batch["noise"].shape == (12, 5, 6)
    assert set(batch["t"].flatten().tolist()) <= {0.0, 0.25, 0.5, 0.75}
    action, noise, t = batch["action"][:, None], batch["noise"], batch["t"][..., None]
    x = (1 - t) * noise + t * action
    v = policy.velocity(x, t[..., 0], batch["obs"][:, None])
    error = (x - t * v) - noise if form == "fpo" else v - (action - noise)  # FPO: of the noise
    expected = error.square().view(12, 5, 2, 3).mean(-1).sum(-1)  # two actions of three numbers
    torch.testing.assert_close(batch["old_losses"], expected.detach(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(fpo, "LOSS_CLAMP", 1.0)
    assert fpo.cfm_losses(policy, batch, args).max() <= 1


# ---------------------------------------------------------------------------------------- QAM
class Quadratic(torch.nn.Module):
    """Q(s, a) = -|a - target|^2 / 2 twice, with a difference of 1."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, obs, action):
        q = -0.5 * (action - self.target).square().sum(-1)
        return torch.stack([q, q - 1])


def test_lean_adjoint_is_the_product_of_the_jacobians():
    K, B, D = 5, 3, 4
    base = VelocityMLP(D, 2, 16, 3, 8, activation=torch.nn.Mish).double()
    obs, points = torch.randn(B, 2).double(), 0.5 * torch.randn(K + 1, B, D).double()
    critic = Quadratic(torch.full((D,), 0.3))
    q_of = lambda action: critic(obs, action.clamp(-1, 1))
    adjoint, q, grad_q = qam.lean_adjoint(base, q_of, obs, points, 2.5)
    assert adjoint.shape == (K, B, D)
    inside = points[-1].abs() < 1
    torch.testing.assert_close(grad_q, torch.where(inside, 0.3 - points[-1].clamp(-1, 1), 0.0).double())
    torch.testing.assert_close(q, critic(obs, points[-1].clamp(-1, 1)))
    for b in range(B):
        g = -2.5 * grad_q[b]
        for k in reversed(range(K)):
            t = torch.tensor((k + 1) / K).double()
            drift = lambda x: 2 * base(x[None], t, obs[b : b + 1])[0] - x / t
            g = g + torch.autograd.functional.jacobian(drift, points[k, b]).T @ g / K
            torch.testing.assert_close(adjoint[k, b], g, rtol=1e-6, atol=1e-8)


def test_adjoint_loss_is_zero_where_the_velocity_is_the_base_moved_against_the_adjoint():
    K, B, D = 4, 3, 2
    base, obs = LinearFlow(2, D), torch.randn(B, 2)
    points, adjoint = torch.randn(K + 1, B, D), torch.randn(K, B, D)
    t, h = torch.arange(K)[:, None, None] / K, 1 / K
    sigma2 = 2 * (1 - t + h) / (t + h)
    right = lambda x, t, s: base(x, t, s) - sigma2 / 2 * adjoint
    assert qam.adjoint_losses(right, base, obs, points, adjoint).sum() < 1e-8
    losses = qam.adjoint_losses(base, base, obs, points, adjoint)  # |sigma g|^2 of each step
    torch.testing.assert_close(losses, (sigma2 * adjoint.square()).sum((1, 2)) / B)


def test_memoryless_process_carries_the_base_density():
    # run with the exact velocity of N(0.4, 0.5^2), its end has that density, whatever it started from
    flow, x0 = gaussian_flow(0.4, 0.5), torch.randn(20_000, 1)
    points = qam.sample_memoryless(flow, flow, torch.zeros(20_000, 1), x0, 64)
    assert points.shape == (65, 20_000, 1)
    assert points[-1].mean().item() == pytest.approx(0.4, abs=0.03)
    assert points[-1].std().item() == pytest.approx(0.5, abs=0.03)
    assert torch.corrcoef(torch.stack([x0[:, 0], points[-1][:, 0]]))[0, 1].abs() < 0.1


def test_qam_tilts_the_base_by_the_critic():
    # base N(0, 0.5^2), Q = -(a - 0.3)^2 / 2, inverse temperature b: the optimum has precision 4 + b and
    # mean 0.3 b / (4 + b); its velocity differs from the base's by a linear function of x at each step
    b, K = 4.0, 48
    exact = gaussian_flow(0.0, 0.5)
    base = lambda x, t, obs: exact(x, t.expand(x.shape[:-1]), obs)

    class Moved(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope, self.shift = (torch.nn.Parameter(torch.zeros(K)) for _ in range(2))

        def forward(self, x, t, obs):
            k = (t * K).round().long()
            return base(x, t, obs) + self.slope[k][..., None] * x + self.shift[k][..., None]

    velocity = Moved()
    policy = SimpleNamespace(velocity=velocity, euler_steps=K, action_size=1, obs_dim=1)
    networks = policy, SimpleNamespace(velocity=base), Quadratic(torch.tensor([0.3]))
    optimizer = torch.optim.Adam(velocity.parameters(), 0.1)
    args = arguments(qam, device="cpu", precision="float32", inv_temp=b, zero_fraction=0.0)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 80)
        qam.update_actor(*networks, optimizer, torch.zeros(512, 1), args)
    action = sample(velocity, torch.zeros(20_000, 1), torch.randn(20_000, 1), K)
    assert action.mean().item() == pytest.approx(0.3 * b / (4 + b), abs=0.03)
    assert action.std().item() == pytest.approx(1 / math.sqrt(4 + b), abs=0.03)


def test_qam_critic_target_is_the_mean_less_half_a_deviation_at_clipped_actions():
    args = arguments(qam, device="cpu", precision="float32", gamma=0.9)
    zero, seen = torch.zeros(2, 3), []
    batch = dict(reward=zero, terminated=zero, truncated=zero, next_obs=torch.randn(2, 3, 11))

    class Recorder(Quadratic):
        def forward(self, obs, action):
            seen.append(action)
            return super().forward(obs, action)

    policy = SimpleNamespace(sample=lambda obs: 3 * torch.randn(6, 6))
    pessimistic = qam.Pessimistic(Recorder(torch.zeros(6)), args.pessimism, bound=1.0)
    y = rldt_gym.critic_target(policy, pessimistic, batch, 1.0, 0.0, args)
    assert seen[0].abs().max() == 1
    expected = 0.9 * (-0.5 * seen[0].square().sum(1) - 0.5 - 0.5 * 0.5)
    torch.testing.assert_close(y.flatten(), expected)


# ---------------------------------------------------------------------------------- best of N
def test_best_of_n_takes_the_candidate_of_the_highest_smaller_q():
    policy = best_of_n.BestOfN(2, 2, 1, 4, critic_sizes=(2, 2, True), width=8, depth=3, time_dim=4)
    obs, x0 = torch.randn(7, 2), torch.zeros(7, 2)
    with torch.no_grad():
        assert torch.equal(policy.sample(obs, x0), sample(policy.velocity, obs, x0, 4))  # one candidate
        policy.candidates.fill_(5)
        torch.manual_seed(3)
        chosen = policy.sample(obs, x0, trajectory=True)
        torch.manual_seed(3)
        start = torch.randn(7, 5, 2)
        start[:, 0] = 0  # the first candidate starts where it is told
        for b in range(7):
            points = sample(policy.velocity, obs[b].expand(5, -1), start[b], 4, trajectory=True)
            q = policy.critic(obs[b].expand(5, -1), points[-1]).min(0).values
            torch.testing.assert_close(chosen[:, b], points[:, q.argmax()])


# ---------------------------------------------------------------------------------------- DSRL
def steered(D):
    """A policy with a linear flow and an actor that looks at the observation, and its arguments."""
    args = arguments(dsrl, precision="float32", device="cpu", zero_fraction=0.0)
    sizes = dict(obs_dim=2, action_dim=D, chunk=1, euler_steps=4, width=8, depth=3, time_dim=8)
    policy = dsrl.SteeredPolicy(**sizes, bound=args.bound)
    policy.velocity = LinearFlow(2, D).requires_grad_(False)
    torch.nn.init.normal_(policy.actor.layers[-1].weight, 0, 0.1)
    return policy, args


def test_dsrl_starts_the_flow_from_a_squashed_gaussian_of_this_density():
    policy, _ = steered(6)
    policy.double()
    obs, x0 = torch.randn(7, 2).double(), torch.randn(7, 6).double()
    mean, std = policy.actor(obs)
    tanh, u = torch.distributions.TanhTransform(), mean + std * x0
    scaled = torch.distributions.TransformedDistribution(Normal(mean, std), tanh)
    w, log_prob = policy.noise(obs, x0)
    torch.testing.assert_close(w, 1.5 * u.tanh())
    torch.testing.assert_close(log_prob, scaled.log_prob(u.tanh()).sum(-1))
    assert torch.equal(policy.sample(obs, x0), sample(policy.velocity, obs, x0, 4))  # the base
    policy.steered.fill_(True)
    for start, noise in (x0, w), (0 * x0, 1.5 * mean.tanh()), (1e4 * x0, 1.5 * x0.sign()):
        expected = sample(policy.velocity, obs, noise, 4)
        torch.testing.assert_close(policy.sample(obs, start), expected)
    untrained = dsrl.NoiseActor(2, 6, 8, 3)(torch.randn(7, 2))
    assert (untrained[0] == 0).all() and (untrained[1] == 1).all()


def test_dsrl_critic_of_noise_learns_the_value_of_the_action_to_which_noise_leads():
    # a linear flow and a quadratic critic make a value that is quadratic in the noise
    policy, args = steered(1)
    critic, obs = Quadratic(torch.tensor([0.3])), torch.tensor([0.5, -0.2]).expand(256, 2)
    learned = torch.nn.Linear(3, 2, bias=False)
    noise_critic = lambda obs, w: learned(torch.cat([w**0, w, w**2], 1)).T
    noise_critic.parameters = learned.parameters
    optimizer = torch.optim.Adam(learned.parameters(), 0.05)
    for _ in range(600):
        dsrl.update_noise_critic(policy, critic, noise_critic, optimizer, obs, args)
    w, obs = torch.linspace(-2, 2, 9)[:, None], obs[:9]
    expected = critic(obs, sample(policy.velocity, obs, w, 4))
    torch.testing.assert_close(noise_critic(obs, w).detach(), expected, rtol=0.01, atol=0.01)


def test_dsrl_actor_takes_the_noise_that_is_as_good_as_its_entropy_allows():
    # Q = -(w - 0.3)^2 / 2 and coefficient alpha: the optimum is nearly N(0.3, alpha)
    policy, args = steered(1)
    critic, obs = Quadratic(torch.tensor([0.3])), torch.randn(512, 2)
    policy.log_alpha.data.fill_(math.log(0.01))
    optimizer = torch.optim.Adam(policy.actor.parameters(), 0.01)  # the coefficient stays
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 300)
        policy.log_alpha.grad = None
        entropy = dsrl.update_actor(policy, critic, optimizer, obs, args)["losses/entropy"]
    w, _ = policy.noise(obs, torch.randn(512, 1))
    assert w.mean().item() == pytest.approx(0.3, abs=0.03)
    assert w.std().item() == pytest.approx(0.1, abs=0.02)
    assert entropy.item() == pytest.approx(Normal(0, 0.1 / 1.5).entropy().item(), abs=0.1)
    assert policy.log_alpha.grad == entropy < 0  # it would rise: the target is 0
