import contextlib
import copy
import csv
import dataclasses
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import sys
from collections import Counter

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, WALL_COLUMNS, check_resumed_run_keeps_its_base
from hypothesis import given
from hypothesis import strategies as st
from pickle_bomb import LOADED, Bomb
from safetensors import safe_open
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pretrain_fm
import rldt_furniture
from benchmark import actor_probe_furniture, decision_probe_furniture
from benchmark.particle_probe_furniture import Chosen
from common.flow import VelocityMLP, expected_target, sample
from common.svgd import particle_gradient, transport_field
from demos import furniture as dataset
from envs.furniture_mujoco import FurnitureVectorEnv
from rldt_furniture import (
    Critic,
    FlowPolicy,
    Replay,
    actor_losses,
    collect,
    critic_obs,
    critic_target,
    evaluate,
    rate,
    stages_of,
    summary,
    td_lambda,
    update_actor,
    update_critic,
)

DIMS = {"one_leg": 58, "lamp": 44}
STAGES = {"one_leg": 1, "lamp": 2}


def arguments(**changes):
    """Arguments of the functions below main()."""
    values = dict(device="cpu", bf16=False, chunk=2, euler_steps=4, horizon=20, backend="mujoco", actor_layer_norm=False, q_gradient="critic",
                  transport_scale=30.0)  # fmt: skip
    return rldt_furniture.Args(**values | changes)


def small_policy(obs_dim=4, action_dim=2, chunk=2, euler_steps=4, layer_norm=False, cond_mlp=()):
    return FlowPolicy(obs_dim, action_dim, chunk, euler_steps, width=16, depth=3, time_dim=8, layer_norm=layer_norm, cond_mlp=cond_mlp)


def small_critic(policy, extra=0):
    return Critic(policy.config["obs_dim"] + extra, policy.action_size, 16, 2, True, "default")


def copied(module):
    return copy.deepcopy(module.state_dict())


def changed(module, before):
    """Names of the parameters that differ from `before`."""
    return {key for key, value in module.state_dict().items() if not torch.equal(value.cpu(), before[key].cpu())}


class FakeEnvs:
    """Scripted episodes in place of a simulator, with the interface of FurnitureVectorEnv.

    An episode lasts length(seed) chunks; assembles(seed, t, chunk) pairs are assembled in chunk t, at most `stages` in all. In
    chunk diverges(seed) the simulation diverges. A step that ends an episode takes one environment step, any other as many as
    the chunk has.
    """

    def __init__(self, num_envs, length, assembles, stages=1, stop_on_success=True, chunk=2, action_dim=2, obs_dim=4, diverges=lambda seed: None):
        self.num_envs, self.length, self.assembles, self.stages, self.stop_on_success = num_envs, length, assembles, stages, stop_on_success
        self.chunk, self.action_dim, self.obs_dim, self.diverges = chunk, action_dim, obs_dim, diverges
        self.observation_space = gym.spaces.Dict({"state": gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)})
        self.seed, self.t, self.stage, self.over = *np.zeros((3, num_envs), int), np.ones(num_envs, bool)
        self.seeds, self.executed, self.active, self.resets, self.closed = [], [], [], 0, False
        self.steps, self.valid = Counter(), Counter()  # by seed: environment steps, and chunks until all is assembled or the end

    def observation(self, seed, t):
        """What is seen in chunk t of the episode of a seed: its last five digits, t, and noise of its own."""
        rng = np.random.default_rng([seed, t])
        return np.r_[seed % 100_000 / 100_000, t / 10, rng.normal(size=self.obs_dim - 2)].astype(np.float32)

    def observe(self):
        return {"state": np.stack([self.observation(seed, t) for seed, t in zip(self.seed, self.t, strict=True)])}

    def reset(self, seeds, mask):
        assert len(seeds) == self.num_envs
        assert mask.any()
        self.resets += 1
        for i in np.flatnonzero(mask):
            self.seeds.append(seeds[i])
            self.seed[i], self.t[i], self.stage[i], self.over[i] = seeds[i], 0, 0, False
        return self.observe()

    def step(self, chunks, active):
        assert chunks.shape == (self.num_envs, self.chunk, self.action_dim)
        assert not (active & self.over).any()  # what has ended is not stepped
        self.executed.append(chunks.copy()), self.active.append(active.copy())
        reward, steps = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for i in np.flatnonzero(active):
            seed, t = self.seed[i], self.t[i]
            self.valid[seed] += self.stage[i] < self.stages
            if self.diverges(seed) == t:  # what is seen is the last finite state
                truncated[i] = True
            else:
                reward[i] = min(self.assembles(seed, t, chunks[i]), self.stages - self.stage[i])
                self.stage[i] += int(reward[i])
                terminated[i] = self.stop_on_success and self.stage[i] == self.stages
                truncated[i] = t + 1 == self.length(seed) and not terminated[i]
                self.t[i] += 1
            self.over[i] = terminated[i] or truncated[i]
            steps[i] = 1 if self.over[i] else self.chunk
            self.steps[seed] += steps[i]
        return self.observe(), reward, terminated, truncated, self.stage.copy(), steps

    def close(self):
        self.closed = True


# -------------------------------------------------------------------------------- TD(lambda)
@st.composite
def segments(draw):
    """Rewards, ends and next values (T, L) of segments, gamma, lambda and the number of stages."""
    T, L = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    value = 0.5 + 1.5 * torch.randn(T, L, dtype=torch.float64, generator=generator)  # some outside the range of returns
    end, reward = (torch.tensor(draw(st.lists(st.sampled_from(options), min_size=T * L, max_size=T * L))).view(T, L)
                   for options in ([0, 0, 0, 1, 2], [0, 0, 1, 2]))  # fmt: skip
    return reward.double(), (end == 1).double(), (end == 2).double(), value, draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.integers(1, 2))


def recursive(t, r, terminated, truncated, value, gamma, lam, most):
    """y_t as it is defined, for one segment of plain numbers."""
    if terminated[t]:
        y = r[t]
    elif truncated[t] or t == len(r) - 1:
        y = r[t] + gamma * value[t]
    else:
        y = r[t] + gamma * ((1 - lam) * value[t] + lam * recursive(t + 1, r, terminated, truncated, value, gamma, lam, most))
    return min(max(y, 0.0), most)


@given(segments())
def test_td_lambda_equals_its_recursive_definition_clipped_to_the_number_of_stages(segment):
    *arrays, gamma, lam, most = segment
    y = td_lambda(*arrays, gamma, lam, most)
    for column in range(y.shape[1]):
        one = [x[:, column].tolist() for x in arrays]
        expected = [recursive(t, *one, gamma, lam, most) for t in range(len(y))]
        assert y[:, column].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_pairs_assembled_one_after_the_other_add_up():
    reward = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    end = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    y = td_lambda(reward, end, torch.zeros(4, 1), torch.full((4, 1), 77.0), 0.5, 1.0, 2)
    assert y.flatten().tolist() == [0.5 * 1.25, 1.25, 0.5, 1.0]


# ------------------------------------------------------------------------------------ networks
def test_policy_scales_by_the_demonstrations_and_clamps_observations_at_five():
    policy = small_policy(2, 2, chunk=3)
    policy.obs_min.copy_(torch.tensor([-2.0, 0.0])), policy.obs_max.copy_(torch.tensor([4.0, 10.0]))
    policy.action_min.copy_(torch.tensor([-0.5, -1.0])), policy.action_max.copy_(torch.tensor([0.5, 3.0]))
    raw = np.array([[-2, 0], [4, 10], [1, 5], [15.9, 30.1], [-13.9, -20.1]], np.float32)
    expected = torch.tensor([[-1.0, -1], [1, 1], [0, 0], [4.966667, 5], [-4.966667, -5]])
    torch.testing.assert_close(policy.normalize(raw), expected, atol=2e-5, rtol=0)
    action = torch.tensor([[-1.0, -1, 1, 1, 0, 0]])  # three actions of two dimensions, one after the other
    np.testing.assert_allclose(policy.to_env(action), [[[-0.5, -1], [0.5, 3], [0, 1]]], atol=2e-6)


def test_a_dimension_that_never_changes_stays_finite():
    policy = small_policy(1)
    policy.obs_min.fill_(0.7), policy.obs_max.fill_(0.7)
    assert policy.normalize(np.array([[0.7], [0.6], [0.8]], np.float32)).flatten().tolist() == [-1, -5, 5]


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("cond_mlp", [(), (12, 6)])
def test_policy_has_the_layers_that_are_asked_for(layer_norm, cond_mlp):
    policy = small_policy(layer_norm=layer_norm, cond_mlp=cond_mlp)
    assert any(isinstance(module, torch.nn.LayerNorm) for module in policy.modules()) == layer_norm
    widths = [m.out_features for m in policy.velocity.cond_mlp if isinstance(m, torch.nn.Linear)] if cond_mlp else []
    assert widths == list(cond_mlp)
    assert policy.sample(torch.randn(3, 4)).shape == (3, 4)


@pytest.mark.parametrize("furniture, critic_stage, seen", [("lamp", True, True), ("lamp", False, False), ("one_leg", True, False)])
def test_critic_sees_the_share_of_assembled_pairs_in_tasks_of_several(furniture, critic_stage, seen):
    args, state = arguments(furniture=furniture, critic_stage=critic_stage), torch.randn(2, 3, 4)
    stage = torch.tensor([[0.0, 1, 2], [2, 0, 0]])
    obs = critic_obs(state, stage, args)
    assert torch.equal(obs[..., :4], state)
    assert obs.shape == (2, 3, 4 + seen)
    if seen:
        assert torch.equal(obs[..., 4], stage / 2)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_batched_critics_equal_two_networks_with_the_same_weights(layer_norm):
    critic = Critic(5, 3, 16, 2, layer_norm, "default")
    obs, action = torch.randn(7, 5), torch.randn(7, 3)
    q = critic(obs, action)
    assert q.shape == (2, 7)
    for member in range(2):
        x = torch.cat([obs, action], 1)
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            x = F.linear(x, weight[member].T, bias[member, 0])
            if i < 2:
                x = F.silu(F.layer_norm(x, (16,)) if layer_norm else x)
        torch.testing.assert_close(q[member], x[:, 0])
    assert not torch.allclose(q[0], q[1])


@pytest.mark.parametrize("init, bias", [("normal", 0.0), ("default", 1 / 16)])
def test_critic_initialisations(init, bias):
    critic = Critic(156, 100, 256, 2, False, init)
    std = 0.1 if init == "normal" else 1 / 16 / math.sqrt(3)
    for weight, offset in zip(critic.weights[:2], critic.biases[:2], strict=True):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert offset.abs().max().item() == pytest.approx(bias, rel=0.05)


# ----------------------------------------------------------------------------- critic's updates
@pytest.mark.parametrize("furniture", ["one_leg", "lamp"])
def test_critic_target_averages_the_smaller_value_of_the_target_networks_over_policy_actions(furniture):
    args, policy, stages = arguments(furniture=furniture, value_samples=3, gamma=0.9), small_policy(), STAGES[furniture]
    target = small_critic(policy, extra=stages - 1)
    target.biases[-1].data.fill_(0.5 * stages)  # values inside [0, stages]
    T, L = 3, 2
    batch = {"state": torch.randn(T + 1, L, 4), "stage": torch.tensor([[0.0, 0], [0, 1], [1, 1], [1, 2]]).clamp_max(stages - 1)}
    batch |= {name: torch.zeros(T, L) for name in ("reward", "terminated", "truncated")}
    batch["reward"][1, 0] = batch["terminated"][1, 0] = batch["truncated"][0, 1] = 1
    torch.manual_seed(1)
    y = critic_target(policy, target, batch, args, 0.4)
    torch.manual_seed(1)
    noise, values = torch.randn(3 * T * L, policy.action_size).view(3, T, L, -1), torch.empty(3, T, L)
    for n, t, column in itertools.product(range(3), range(T), range(L)):
        state, stage = batch["state"][t + 1, column][None], batch["stage"][t + 1, column]
        seen = torch.cat([state, stage.view(1, 1) / 2], 1) if stages == 2 else state
        values[n, t, column] = target(seen, policy.sample(state, noise[n, t, column][None])).min()
    assert len(values[:, 0, 0].unique()) == 3
    expected = td_lambda(batch["reward"], batch["terminated"], batch["truncated"], values.mean(0), 0.9, 0.4, stages)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-4, atol=1e-5)
    assert y[1, 0].item() == 1
    assert not y.requires_grad


@pytest.mark.parametrize("furniture", ["one_leg", "lamp"])
def test_critic_target_takes_another_lambda_and_is_clipped_to_the_number_of_pairs(furniture):
    args, policy = arguments(furniture=furniture, td_lambda=0.1), small_policy()
    target = small_critic(policy, extra=STAGES[furniture] - 1)
    batch = {"state": torch.randn(4, 2, 4), "stage": torch.zeros(4, 2)} | {name: torch.zeros(3, 2) for name in ("reward", "terminated", "truncated")}
    results = []
    for lam, bias in (None, 0.4), (0.1, 0.4), (0.9, 0.4), (0.1, 77.0):
        target.biases[-1].data.fill_(bias)
        torch.manual_seed(1)
        results.append(critic_target(policy, target, batch, args, lam))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
    assert (results[3] == STAGES[furniture]).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_update_critic_descends_the_squared_error_of_both_networks_and_moves_the_target(momentum):
    critic, args = small_critic(small_policy(), extra=1), arguments(target_momentum=momentum)
    target = copy.deepcopy(critic).requires_grad_(False)
    for parameter in target.parameters():
        parameter.add_(1.0)
    obs, action, y, old_target = torch.randn(3, 5), torch.randn(3, 4), torch.rand(3), copied(target)
    q = critic(obs, action)
    loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
    gradient = torch.autograd.grad(loss, list(critic.parameters()))
    expected = [p.detach() - 0.1 * g for p, g in zip(critic.parameters(), gradient, strict=True)]
    metrics = update_critic(critic, target, torch.optim.SGD(critic.parameters(), 0.1), obs, action, y, args)
    torch.testing.assert_close([p.detach() for p in critic.parameters()], expected, rtol=1e-4, atol=1e-5)
    for key, new in critic.state_dict().items():
        torch.testing.assert_close(target.state_dict()[key], momentum * old_target[key] + (1 - momentum) * new)
    assert metrics["losses/critic"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["diagnostics/q"].item() == pytest.approx(q.mean().item(), rel=1e-5)


# ----------------------------------------------------------------------------- actor's updates
K, B, P, D = 4, 3, 5, 2


class QuadraticCritic:
    """Q = -0.75 |a - 1|^2 from both networks."""

    def __call__(self, obs, action):
        return -0.75 * (action - 1).square().sum(-1).expand(2, -1)


def losses(seed=0, **changes):
    """Networks, the three losses and what they were computed from, in double precision."""
    torch.manual_seed(seed)
    velocity, reference = (VelocityMLP(D, 3, 16, 3, 8).double() for _ in range(2))
    obs, start = torch.randn(B, 3, dtype=torch.float64), torch.randn(B, P, D, dtype=torch.float64)
    trajectory = sample(velocity, obs[:, None].expand(-1, P, -1), start, K, trajectory=True)
    args = arguments(**dict(euler_steps=K, alpha=0.3, transport_scale=1.0, transport_loss="literal") | changes)
    k = torch.randint(K, (B, P))
    result = actor_losses(velocity, reference, QuadraticCritic(), obs, obs, trajectory, args, k)
    x = trajectory[k, torch.arange(B)[:, None], torch.arange(P)]
    return velocity, reference, obs[:, None].expand(-1, P, -1), trajectory, x, k / K, args, result


def gradients(velocity, scalar):
    return torch.autograd.grad(scalar, list(velocity.parameters()), retain_graph=True)


@pytest.mark.parametrize("kernel", ["rbf", "delta"])
@pytest.mark.parametrize("form", ["literal", "authors"])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_gradient_of_the_transport_loss_is_the_field_times_the_jacobian(kernel, form, scale):  # eq. (13)
    velocity, _, obs, trajectory, x, t, args, (transport, *_) = losses(kernel=kernel, transport_loss=form, transport_scale=scale)
    query = expected_target(x, t, velocity(x, t, obs)).detach()
    particles = query if kernel == "delta" else trajectory[-1]
    phi = transport_field(query, particles, scale * 1.5 * (1 - particles), args.alpha, kernel)
    weight = -2 / K * (1 - t) if form == "literal" else -1 / (K * (1 - t))
    expected = torch.autograd.grad(velocity(x, t, obs), list(velocity.parameters()), weight[..., None] * phi / (B * P))
    torch.testing.assert_close(gradients(velocity, transport), expected)


@pytest.mark.parametrize("kernel", ["rbf", "delta"])
def test_transport_loss_can_take_the_gradient_from_the_particles(kernel):
    velocity, _, obs, trajectory, x, t, args, (transport, *_) = losses(kernel=kernel, transport_scale=3.0, q_gradient="particles")
    query = expected_target(x, t, velocity(x, t, obs)).detach()
    particles = query if kernel == "delta" else trajectory[-1]
    q = -0.75 * (particles - 1).square().sum(-1)
    phi = transport_field(query, particles, 3 * particle_gradient(q, particles), args.alpha, kernel)
    expected = torch.autograd.grad(velocity(x, t, obs), list(velocity.parameters()), (-2 / K * (1 - t))[..., None] * phi / (B * P))
    torch.testing.assert_close(gradients(velocity, transport), expected)


def test_negative_spread_stops():
    with pytest.raises(SystemExit, match="--bc-spread must be at least 0, got -1"):
        rldt_furniture.resolve(rldt_furniture.parse_args(["--backend", "mujoco", "--bc-spread", "-1"]))


def test_gradient_of_the_particles_needs_two_of_them():
    argv = ["--q-gradient", "particles", "--backend", "mujoco", "--n-particles"]
    assert rldt_furniture.resolve(rldt_furniture.parse_args([*argv, "2"])).n_particles == 2
    with pytest.raises(SystemExit, match="--q-gradient particles needs --n-particles"):
        rldt_furniture.resolve(rldt_furniture.parse_args([*argv, "1"]))


def test_consistency_loss_has_the_value_and_gradient_of_eq_14():
    velocity, _, obs, trajectory, x, t, _, (_, consistency, *_) = losses()
    a_dagger = x + (1 - t)[..., None] * velocity(x, t, obs)
    expected = ((a_dagger - trajectory[-1]).square().sum(-1) / (K * (1 - t)).square()).mean()
    torch.testing.assert_close(consistency, expected)
    torch.testing.assert_close(gradients(velocity, consistency), gradients(velocity, expected))


def test_constraint_loss_has_the_value_and_gradient_of_eq_15():
    velocity, seen = VelocityMLP(D, 3, 16, 3, 8).double(), {}

    def reference(x, t, obs):
        seen.update(x=x, t=t, obs=obs)
        return x.sin()

    trajectory, obs = torch.randn(K + 1, B, P, D, dtype=torch.float64), torch.randn(B, 3, dtype=torch.float64)
    _, _, constraint, _ = actor_losses(velocity, reference, QuadraticCritic(), obs, obs, trajectory, arguments(euler_steps=K))
    expected = (velocity(seen["x"], seen["t"], seen["obs"]) - seen["x"].sin()).square().sum(-1).mean()
    torch.testing.assert_close(constraint, expected)
    torch.testing.assert_close(gradients(velocity, constraint), gradients(velocity, expected))


@pytest.mark.parametrize("zero_fraction", [0.0, 1.0])
def test_constraint_is_taken_between_the_actions_and_the_noise_that_particles_start_from(zero_fraction):
    seen = {}

    def reference(x, t, obs):
        seen.update(x=x, t=t)
        return x - 1

    trajectory, obs = torch.randn(K + 1, B, P, D), torch.zeros(B, 3)
    args = arguments(euler_steps=K, zero_fraction=zero_fraction)
    result = actor_losses(lambda x, t, obs: x, reference, QuadraticCritic(), obs, obs, trajectory, args)
    assert result[2].item() == pytest.approx(D, rel=1e-4)  # both velocities at one point
    x0 = seen["x"] - seen["t"][..., None] * trajectory[-1]  # (1 - t) x_0
    assert (x0.abs() < 1e-5).all() == (zero_fraction == 1)
    if zero_fraction == 0:
        assert (x0.abs() > 1e-5).any(-1).all()


def test_critic_sees_what_it_is_given_and_both_velocities_the_state():
    seen = {}

    def velocity(name):
        return lambda x, t, obs: seen.update({name: obs}) or x

    def critic(obs, action):
        seen["critic"] = obs
        return action.sum(-1).expand(2, -1)

    obs, obs_q = torch.randn(B, 3), torch.randn(B, 4)
    actor_losses(velocity("actor"), velocity("reference"), critic, obs, obs_q, torch.randn(K + 1, B, P, D), arguments(euler_steps=K))
    for name, given_obs in ("actor", obs), ("reference", obs), ("critic", obs_q):
        each = seen[name].reshape(-1, B, P, given_obs.shape[1])
        assert torch.equal(each, given_obs[:, None].expand(len(each), -1, P, -1)), name


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_noise_scale_is_that_of_rollouts_particles_and_targets_but_not_of_the_evaluation(monkeypatch, scale):
    policy, starts = small_policy(), []
    args = arguments(noise_scale=scale, zero_fraction=0.5, num_envs=400, rollout_chunks=3, segment_chunks=2, value_samples=1, final_eval_episodes=200)
    sample = policy.sample
    monkeypatch.setattr(policy, "sample", lambda obs, x0, trajectory=False: starts.append(x0) or sample(obs, x0, trajectory))
    collect(policy, scripted(400, [9] * 400, [()] * 400), Replay(args, 4, policy.action_size).rollout(), itertools.count(100), args)
    assert (starts[0][:200] == 0).all() and starts[0][200:].std().item() == pytest.approx(scale, rel=0.1)
    starts.clear()
    batch = dict(state=torch.zeros(3, 200, 4), stage=torch.zeros(3, 200), **{name: torch.zeros(2, 200) for name in ("reward", "terminated", "truncated")})
    critic_target(policy, small_critic(policy), batch, args)
    assert starts[0].std().item() == pytest.approx(scale, rel=0.1)
    starts.clear()
    update_actor(policy, copy.deepcopy(policy), small_critic(policy), torch.optim.SGD(policy.parameters(), 0.1), torch.zeros(300, 4), torch.zeros(300, 4), args)
    noise = starts[0][(starts[0] != 0).any(-1)]
    assert noise.std().item() == pytest.approx(scale, rel=0.1)
    starts.clear()
    evaluate(policy, scripted(400, [1] * 400, [()] * 400), args, 200, 100)
    assert starts[0][200:].std().item() == pytest.approx(1, rel=0.1)
    with pytest.raises(SystemExit, match="--noise-scale must be above 0"):
        rldt_furniture.resolve(rldt_furniture.Args(noise_scale=0.0))


@pytest.mark.parametrize("zero_fraction", [0.0, 0.5, 1.0])
def test_update_actor_steps_along_the_weighted_sum_of_the_losses_of_its_particles(monkeypatch, zero_fraction):  # eq. (16)
    policy, seen = small_policy(), []
    bias = policy.velocity.trunk[0].bias

    def fake_losses(velocity, reference, critic, obs, obs_q, trajectory, args):
        seen.append((trajectory, obs_q))
        return bias.sum(), 10 * bias.sum(), 100 * bias.sum(), {"losses/transport": torch.zeros(())}

    monkeypatch.setattr(rldt_furniture, "actor_losses", fake_losses)
    args = arguments(n_particles=6, zero_fraction=zero_fraction, consistency_weight=0.7, constraint_weight=0.2)
    before, obs, obs_q = bias.detach().clone(), torch.randn(50, 4), torch.randn(50, 5)
    metrics = update_actor(policy, copy.deepcopy(policy), small_critic(policy), torch.optim.SGD(policy.parameters(), 0.1), obs, obs_q, args)
    torch.testing.assert_close(bias.detach(), before - 0.1 * (1 + 0.7 * 10 + 0.2 * 100))
    assert metrics["diagnostics/actor_grad_norm"].item() == pytest.approx(28 * 4)  # of 16 equal numbers
    ((trajectory, seen_q),) = seen
    assert seen_q is obs_q
    assert trajectory.shape == (5, 50, 6, 4)
    assert not trajectory.requires_grad
    zero = (trajectory[0] == 0).all(-1).float()
    assert zero.mean().item() == pytest.approx(zero_fraction, abs=0.1)
    assert (zero.mean(1) > 0).float().mean().item() == pytest.approx(1 - (1 - zero_fraction) ** 6, abs=0.1)  # drawn per particle
    bias.data.copy_(before)
    with torch.no_grad():
        again = policy.sample(obs[:, None].expand(-1, 6, -1), trajectory[0], trajectory=True)
    torch.testing.assert_close(trajectory, again)


# -------------------------------------------------------------------------------------- replay
CAPACITY, T, N = 3, 10, 4


def numbered(added, valid=None, reached=None):
    """A replay whose states and actions encode rollout, environment and time: 1000 rollout + 100 environment + time."""
    replay = Replay(arguments(buffer_iterations=CAPACITY, rollout_chunks=T, num_envs=N), 2, 3)
    for rollout in range(added):
        slot = replay.rollout()
        code = 1000.0 * rollout + 100 * torch.arange(N) + torch.arange(T)[:, None]
        slot["state"].copy_(code[..., None].expand(-1, -1, 2)), slot["action"].copy_(code[..., None].expand(-1, -1, 3))
        slot["reward"].copy_(code), slot["stage"].copy_(code)
        slot["valid"].copy_(torch.ones(T, N) if valid is None else valid)
        slot["reached"].copy_(torch.zeros(T, N) if reached is None else reached)
    return replay


@given(added=st.integers(1, 7), length=st.integers(1, T - 1), count=st.integers(1, 40), seed=st.integers(0, 1000), balanced=st.booleans())
def test_segments_are_consecutive_rows_of_one_environment_in_one_rollout_that_begin_validly(added, length, count, seed, balanced):
    torch.manual_seed(seed)
    valid, reached = (torch.rand(T, N) < 0.7).float(), torch.randint(3, (T, N)).float()
    valid[0] = 1
    batch = numbered(added, valid, reached).draw(count, length, 0.3, balanced)
    assert batch["state"].shape == (length + 1, count, 2)
    assert batch["action"].shape == (length, count, 3)
    first = batch["state"][0, :, 0]
    codes = first + torch.arange(length + 1)[:, None]
    assert torch.equal(batch["state"], codes[..., None].expand(-1, -1, 2))
    assert torch.equal(batch["stage"], codes)
    assert torch.equal(batch["action"], codes[:-1, :, None].expand(-1, -1, 3))
    assert torch.equal(batch["reward"], codes[:-1])
    assert (first % 100 + length <= T - 1).all()  # the next state of the last step is a row too
    assert (batch["valid"][0] == 1).all()
    assert (first // 1000 >= max(0, added - CAPACITY)).all()
    time, column = (codes[:-1] % 100).long(), (first // 100 % 10).long().expand(length, -1)
    assert torch.equal(batch["valid"], valid[time, column])
    assert torch.equal(batch["reached"], reached[time, column])


@pytest.mark.parametrize("fraction", [0.0, 0.33, 1.0])
@pytest.mark.parametrize("count", [1, 7, 24])
@pytest.mark.parametrize("kinds", [(0,), (0, 1), (0, 1, 2), (0, 2)])
def test_equally_many_segments_begin_in_episodes_of_each_number_of_pairs(fraction, count, kinds):
    reached = torch.full((T, N), float(kinds[0]))
    for i, kind in enumerate(kinds[1:]):
        reached[2 + i, 1] = kind  # few of them
    begins = numbered(4, reached=reached).draw(count, 2, fraction, balanced=True)["reached"][0].tolist()
    shares = [begins.count(kind) for kind in kinds]
    assert sum(shares) == count
    assert max(shares) - min(shares) <= 1


def test_episodes_that_cannot_begin_a_segment_do_not_count():
    reached = torch.zeros(T, N)
    reached[8:] = 2  # two rows, and segments of three
    assert (numbered(1, reached=reached).draw(8, 3, 0.33, balanced=True)["reached"][0] == 0).all()


def test_unbalanced_segments_are_drawn_by_their_number():
    reached = torch.zeros(T, N)
    reached[:, 0] = 1
    begins = numbered(2, reached=reached).draw(4000, 2, 0.33, balanced=False)["reached"][0]
    assert begins.mean().item() == pytest.approx(1 / N, abs=0.04)


@given(added=st.integers(1, 7), count=st.integers(1, 60), fraction=st.floats(0, 1), balanced=st.booleans())
def test_at_least_the_fresh_fraction_comes_from_the_newest_rollout(added, count, fraction, balanced):
    reached = torch.zeros(T, N)
    reached[:3], reached[3:5] = 1, 2
    rollout = numbered(added, reached=reached).draw(count, 2, fraction, balanced)["state"][0, :, 0] // 1000
    assert (rollout == added - 1).sum() >= fraction * count - 1e-9


def test_every_kept_rollout_environment_and_start_is_drawn():
    first = numbered(5).draw(20_000, 3, 0.33, balanced=True)["state"][0, :, 0].long()
    assert set((first // 1000).tolist()) == {2, 3, 4}
    assert set((first // 100 % 10).tolist()) == set(range(N))
    assert set((first % 100).tolist()) == set(range(T - 3))


def test_fresh_segments_come_from_wherever_there_are_some():
    replay = numbered(2)
    replay.data["reached"][0] = 1  # pairs assembled in the old rollout only
    begins = replay.draw(10, 2, 1.0, balanced=True)
    assert begins["reached"][0].sum() == 5
    assert (begins["state"][0, :, 0] // 1000).tolist().count(1) == 5


def test_a_new_rollout_starts_without_what_its_slot_held():
    replay = numbered(CAPACITY, reached=torch.ones(T, N))
    slot = replay.rollout()
    assert replay.slot() == 0
    for name in ("reward", "terminated", "truncated", "valid", "reached"):
        assert (slot[name] == 0).all()
        assert (replay.data[name][0] == 0).all()
    assert (replay.data["valid"][1:] == 1).all()


# ------------------------------------------------------------------------------------- rollouts
def rollout(envs, policy=None, **changes):
    """Collects one rollout from fake environments; returns policy, slot, env steps and pairs assembled."""
    furniture = {1: "one_leg", 2: "lamp"}[envs.stages]
    args = arguments(**dict(num_envs=envs.num_envs, buffer_iterations=1, time_limit="bootstrap", furniture=furniture) | changes)
    policy = policy or small_policy()
    replay = Replay(args, 4, policy.action_size)
    for value in replay.data.values():
        value.fill_(77)  # as if left from an older rollout
    torch.manual_seed(2)
    steps, assembled = collect(policy, envs, replay.rollout(), itertools.count(100), args)
    return policy, replay.newest(), steps, assembled.tolist()


def scripted(num_envs, lengths, pairs, diverges=None, **kwargs):
    """Episodes of seeds 100, 101, ... of `lengths` chunks that assemble a pair in each of their chunks `pairs`."""
    assembles = lambda seed, t, chunk: pairs[seed - 100].count(t)
    return FakeEnvs(num_envs, lambda seed: lengths[seed - 100], assembles, diverges=(diverges or {}).get, **kwargs)


# Three environments of a task of two pairs, eight rows each. Episodes: 100 assembles both pairs in its first two chunks, 101 one
# and does not end within the rollout, 102 none before its time limit. Then the first two to end begin 103 (one pair, time limit)
# and 104 (one pair, then the simulation diverges).
LENGTHS, PAIRS, DIVERGES = [5, 20, 3, 3, 9], [(0, 1), (2,), (), (1,), (0,)], {104: 2}
ROWS = [[(100, 0), (100, 1), (100, 2), (103, 0), (103, 1), (103, 2), (103, 3), None],
        [(101, t) for t in range(8)],
        [(102, 0), (102, 1), (102, 2), (102, 3), (104, 0), (104, 1), (104, 2), (104, 2)]]  # fmt: skip
STAGE = [[0, 1, 2, 0, 0, 1, 1, 77], [0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]]
VALID = [[1, 1, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1, 0]]
REWARD = [[1, 1, 0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]]
SUCCESS = [[0, 1, 0, 0, 0, 0, 0, 0], [0] * 8, [0] * 8]
LIMIT = [[0, 0, 0, 0, 0, 1, 0, 0], [0] * 8, [0, 0, 1, 0, 0, 0, 1, 0]]
CUT = [[0] * 8, [0, 0, 0, 0, 0, 0, 1, 0], [0] * 8]
REACHED = [[2, 2, 2, 1, 1, 1, 1, 0], [1] * 8, [0, 0, 0, 0, 1, 1, 1, 1]]


def table(*parts):
    """Sum of tables with a list per environment -> (rows, environments)."""
    return np.sum([np.array(part, float) for part in parts], 0).T.tolist()


@pytest.mark.parametrize("time_limit", ["bootstrap", "terminal"])
def test_rollout_of_scripted_episodes_of_two_pairs(time_limit):
    envs = scripted(3, LENGTHS, PAIRS, DIVERGES, stages=2)
    policy, slot, steps, assembled = rollout(envs, rollout_chunks=8, time_limit=time_limit)
    assert envs.seeds == [100, 101, 102, 103, 104]
    assert slot["stage"].tolist() == table(STAGE)
    assert slot["valid"].tolist() == table(VALID)
    assert slot["reward"].tolist() == table(REWARD)
    assert slot["terminated"].tolist() == (table(SUCCESS) if time_limit == "bootstrap" else table(SUCCESS, LIMIT))
    assert slot["truncated"].tolist() == (table(LIMIT, CUT) if time_limit == "bootstrap" else table(CUT))
    assert slot["reached"].tolist() == table(REACHED)
    for column, rows in enumerate(ROWS):
        for row, episode in enumerate(rows):
            if episode:
                assert torch.equal(slot["state"][row, column], policy.normalize(envs.observation(*episode))), (row, column)
    assert assembled == [2, 1, 0]  # that of 101 was cut, 103 and 104 were second episodes
    assert steps == sum(envs.steps.values()) == 2 * (2 + 7 + 3 + 3 + 3) - 4  # an episode's last step is one environment step


@pytest.mark.parametrize("end, failed", [("failure", 1), ("bootstrap", 0)])
def test_end_of_a_rollout_fails_the_episode_that_began_with_it_and_cuts_later_ones(end, failed):
    _, slot, *_ = rollout(scripted(2, LENGTHS[:2] + [9], PAIRS[:2] + [()], stages=2), rollout_chunks=6, rollout_end=end)  # 102 begins in row 3
    assert slot["terminated"].T.tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, failed, 0]]
    assert slot["truncated"].T.tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1 - failed, 0]]


def test_rollout_stores_the_actions_that_were_executed():
    envs = scripted(3, LENGTHS, PAIRS, DIVERGES, stages=2)
    policy, slot, *_ = rollout(envs, rollout_chunks=8)
    row = np.zeros(3, int)
    for chunks, active in zip(envs.executed, envs.active, strict=True):
        for i in np.flatnonzero(active):
            while not slot["valid"][row[i], i]:
                row[i] += 1
            np.testing.assert_array_equal(chunks[i], policy.to_env(slot["action"][row[i], i][None])[0])
            row[i] += 1
    assert row.tolist() == [6, 7, 7]


def test_what_follows_the_last_pair_is_masked_where_episodes_go_on():
    # 100 assembles its pairs in chunks 0 and 1 of 4, 101 one of two, 102 (after 100) both at once and still runs at the end
    envs = scripted(2, [4, 20, 9], [(0, 1), (5,), (0, 0)], stages=2, stop_on_success=False)
    policy, slot, steps, assembled = rollout(envs, rollout_chunks=9, stop_on_success=False)
    assert envs.seeds == [100, 101, 102]
    assert slot["valid"][:, 0].tolist() == [1, 1, 0, 0, 0, 1, 0, 0, 0]
    assert slot["reward"][:, 0].tolist() == [1, 1, 0, 0, 0, 2, 0, 0, 0]
    assert slot["stage"][:, 0].tolist() == [0, 1, 2, 2, 2, 0, 2, 2, 2]
    assert slot["terminated"][slot["valid"] > 0].tolist().count(1) == slot["terminated"][1, 0] + slot["terminated"][5, 0] == 2
    assert slot["reached"].T.tolist() == [[2] * 9, [1] * 9]
    assert slot["truncated"][7, 0] == 0
    assert slot["truncated"][:, 1].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0]
    for row, episode in enumerate([(100, 0), (100, 1), (100, 2), (100, 3), (100, 4), (102, 0), (102, 1), (102, 2), (102, 3)]):
        assert torch.equal(slot["state"][row, 0], policy.normalize(envs.observation(*episode)))
    assert steps == 2 * (4 + 8 + 3) - 1
    assert assembled == [2, 1]


@pytest.mark.parametrize("stop_on_success", [False, True])
def test_the_pair_of_a_task_of_one_at_the_time_limit_is_a_success(stop_on_success):
    envs = scripted(1, [2, 2, 2], [(1,)] * 3, stop_on_success=stop_on_success)
    _, slot, _, assembled = rollout(envs, rollout_chunks=6, stop_on_success=stop_on_success, time_limit="terminal")
    assert slot["reward"][:, 0].tolist() == slot["terminated"][:, 0].tolist() == [0, 1, 0, 0, 1, 0]
    assert slot["valid"][:, 0].tolist() == [1, 1, 0, 1, 1, 0]
    assert slot["stage"][:, 0].tolist() == [0, 0, 1, 0, 0, 1]
    assert slot["reached"][:, 0].tolist() == [1] * 6
    assert slot["truncated"].sum() == 0
    assert assembled == [1]


def test_a_whole_episode_fits_into_the_default_rollout():
    args = rldt_furniture.resolve(arguments(rollout_chunks=0, horizon=7, chunk=2, segment_chunks=0))
    assert (args.rollout_chunks, args.segment_chunks) == (5, 4)
    envs = scripted(1, [4], [()])  # seven steps in chunks of two
    _, slot, _, assembled = rollout(envs, rollout_chunks=args.rollout_chunks, time_limit="terminal")
    assert assembled == [0]
    assert slot["terminated"][:, 0].tolist() == [0, 0, 0, 1, 0]
    assert slot["truncated"].sum() == 0


def test_exploration_scale_is_a_factor_on_the_noise():
    policy, actions = None, []
    for scale in 0.0, 1.0, 0.5:
        policy, slot, *_ = rollout(scripted(4, [20] * 4, [()] * 4), policy, rollout_chunks=2, exploration_steps=4, exploration_scale=scale, zero_fraction=0.0)
        actions.append(slot["action"][0].clone())
    quiet, loud, half = actions
    assert (loud - quiet).abs().max() > 0.01
    torch.testing.assert_close(half - quiet, (loud - quiet) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exploration_steps, noisy", [(0, False), (1, False), (4, True)])
def test_exploration_adds_noise_only_from_steps_before_the_last(exploration_steps, noisy):
    envs = scripted(4, [20] * 4, [()] * 4)
    policy, slot, *_ = rollout(envs, rollout_chunks=3, exploration_steps=exploration_steps, zero_fraction=0.0)
    torch.manual_seed(2)
    with torch.no_grad():
        clean = policy.sample(slot["state"][0])
    assert torch.allclose(slot["action"][0], clean, atol=1e-5) != noisy


@pytest.mark.parametrize("fraction, count", [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_share_of_the_environments_acts_from_zero(fraction, count):
    envs = scripted(4, [20] * 4, [()] * 4)
    policy, slot, *_ = rollout(envs, rollout_chunks=7, exploration_steps=0, zero_fraction=fraction)
    with torch.no_grad():
        deterministic = policy.sample(slot["state"], torch.zeros(7, 4, 4))
    same = (slot["action"] - deterministic)[:-1].abs().amax((0, 2)) < 1e-5
    assert same.tolist() == [True] * count + [False] * (4 - count)


# ------------------------------------------------------------------------------------ evaluation
class Identity:
    """A policy whose actions are its x_0."""

    action_size = 4
    normalize = staticmethod(lambda obs: obs)
    sample = staticmethod(lambda obs, x0: x0)
    to_env = staticmethod(lambda action: action.view(len(action), 2, 2).numpy())


@pytest.mark.parametrize("backend", ["mujoco", "isaac"])
@pytest.mark.parametrize("num_envs", [1, 3, 4, 16])
@pytest.mark.parametrize("stop_on_success", [False, True])
def test_evaluation_runs_every_initial_state_once_from_zero_and_once_from_noise(num_envs, stop_on_success, backend):
    starts = {}

    def assembles(seed, t, chunk):
        zero = not chunk.any()
        starts.setdefault((seed, zero), []).append(t)
        return int(t == 0 and seed % 2 == 0) + int(t == 1 and seed % 3 == (0 if zero else 1))

    pairs = lambda seed, zero: int(seed % 2 == 0) + int(seed % 3 == (0 if zero else 1))
    envs = FakeEnvs(num_envs, lambda seed: 2 + seed % 3, assembles, stages=2, stop_on_success=stop_on_success)
    scores = evaluate(Identity(), envs, arguments(furniture="lamp", backend=backend), episodes=7, seed=50)
    assert scores["zero"].tolist() == [pairs(50 + j, True) for j in range(7)]
    assert scores["noise"].tolist() == [pairs(50 + j, False) for j in range(7)]
    assert {0, 1, 2} == set(scores["zero"])
    assert Counter(envs.seeds[:14] if num_envs == 16 else envs.seeds) == {50 + j: 2 for j in range(7)}
    for (seed, zero), times in starts.items():  # from start to end, the last pair or time limit, from x_0 of one kind
        assert times == list(range(2 if pairs(seed, zero) == 2 else 2 + seed % 3))
    if backend == "isaac":
        assert envs.resets == -(-14 // num_envs)


@pytest.mark.parametrize("backend", ["mujoco", "isaac"])
def test_a_simulation_that_diverges_ends_its_episode_with_the_pairs_it_had(backend):
    envs = scripted(2, [9] * 10, [(0,), (0, 1), (), ()] + [()] * 6, {100: 2, 102: 0}, stages=2)
    scores = evaluate(Identity(), envs, arguments(furniture="lamp", backend=backend), episodes=4, seed=100)
    assert scores["zero"].tolist() == scores["noise"].tolist() == [1, 2, 0, 0]
    assert [envs.valid[100 + i] for i in range(4)] == [2 * 3, 2 * 2, 2 * 1, 2 * 9]


def test_evaluation_draws_its_own_noise():
    seen = []
    envs = FakeEnvs(2, lambda seed: 3, lambda seed, t, chunk: seen.append(chunk) or 0)
    before = torch.get_rng_state()
    for seed in (4, 4, 5):
        evaluate(Identity(), envs, arguments(), episodes=1, seed=seed)
    first, second, other = (np.array(seen[6 * i : 6 * i + 6]) for i in range(3))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    assert first.any((1, 2)).sum() == 3
    assert len(np.unique(first)) == 3 * 4 + 1  # new noise for every chunk
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("k, n", [(0, 30), (7, 20), (100, 100), (1, 1)])
def test_rate_is_the_mean_with_wilsons_interval(k, n):
    z, p = 1.959963984540054, k / n
    center, half = (p + z**2 / (2 * n)) / (1 + z**2 / n), z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    result = rate(np.arange(n) < k)
    assert result == pytest.approx((p, center - half, center + half), abs=1e-9)
    assert [type(number) for number in result] == [float] * 3  # checkpoints hold plain numbers


def test_summary_counts_complete_assemblies_and_averages_pairs():
    stages = np.array([0, 1, 2, 2])
    result = summary(stages, "eval_success_sampled", arguments(furniture="lamp"))
    low, high = rate(stages == 2)[1:]
    assert result == {"eval_success_sampled": 0.5, "eval_success_sampled_low": low, "eval_success_sampled_high": high,
                      "eval_stages_sampled": 1.25, "eval_stages_sampled_std": pytest.approx(stages.std())}  # fmt: skip
    assert all(type(number) is float for number in result.values())
    assert set(result) <= set(rldt_furniture.COLUMNS)
    assert summary(np.array([0, 1]), "eval_success", arguments())["eval_success"] == 0.5


# -------------------------------------------------------------------------------- base policies
@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Files of small random policies: {furniture: path}."""
    paths = {}
    for furniture, dim in DIMS.items():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            policy = small_policy(dim, action_dim=10, chunk=4)
        paths[furniture] = tmp_path_factory.mktemp("base") / f"{furniture}.safetensors"
        rldt_furniture.save_base(policy, paths[furniture], furniture=furniture)
    return paths


def base_args(furniture="one_leg", **changes):
    return arguments(**dict(furniture=furniture, chunk=4, actor_width=16, actor_depth=3, time_dim=8, cond_mlp=()) | changes)


@pytest.mark.parametrize("extras", [dict(), dict(layer_norm=True, cond_mlp=(12, 6))])
def test_base_policy_round_trip_in_half_precision(tmp_path, extras):
    policy = small_policy(58, 10, chunk=4, **extras)
    policy.obs_min.uniform_(-3, -2), policy.action_max.uniform_(2, 3)
    path = tmp_path / "deeper" / "b.safetensors"
    rldt_furniture.save_base(policy, path, furniture="one_leg")
    loaded = rldt_furniture.load_base(path, base_args(actor_layer_norm=bool(extras), cond_mlp=extras.get("cond_mlp", ())))
    assert loaded.config == policy.config
    for key, value in policy.state_dict().items():
        new = loaded.state_dict()[key]
        assert new.dtype == torch.float32
        assert torch.equal(new, value if key in FlowPolicy.SCALING else value.half().float()), key
    weights = sum(value.numel() for value in policy.state_dict().values())
    assert path.stat().st_size < 2 * weights + 10_000


@pytest.mark.parametrize("changes", [
    dict(furniture="lamp"), dict(chunk=8), dict(actor_width=32), dict(actor_depth=5), dict(time_dim=16), dict(euler_steps=8),
    dict(actor_layer_norm=True), dict(cond_mlp=(8,)),
])  # fmt: skip
def test_base_policy_that_does_not_fit_stops_in_one_line(bases, changes):
    with pytest.raises(SystemExit, match=r"one_leg\.safetensors: has \w+ .*, the run wants ") as stop:
        rldt_furniture.load_base(bases["one_leg"], base_args(**changes))
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("content", [b"", b"garbage that is no safetensors file", "half", "pickle", None])
def test_damaged_or_missing_base_policy_stops_in_one_line(bases, tmp_path, content):
    path = tmp_path / "mine.safetensors"
    if content == "half":
        content = bases["one_leg"].read_bytes()[:2000]
    elif content == "pickle":
        content = pickle.dumps(Bomb())
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=r"mine\.safetensors: not a base policy") as stop:
        rldt_furniture.load_base(path, base_args())
    assert "\n" not in str(stop.value)
    assert LOADED == []


@pytest.mark.parametrize("config", ["{", "[]", '{"obs_dim": 58}', {"width": 32}, {"depth": 4}, {"cameras": 0}, None])
def test_base_policy_with_a_damaged_config_stops_in_one_line(bases, tmp_path, config):
    path = tmp_path / "mine.safetensors"
    with safe_open(bases["one_leg"], "pt") as file:
        state, stored = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])
    config = json.dumps(stored | config) if isinstance(config, dict) else config
    save_file(state, path, metadata=config and {"config": config})
    with pytest.raises(SystemExit, match=r"mine\.safetensors: not a base policy") as stop:
        rldt_furniture.load_base(path, base_args())
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("shipped, given_flags, source", [
    (True, dict(), "shipped"), (False, dict(), "pretrained"), (True, dict(pretrain=True), "pretrained"), (True, dict(base="own"), "own"),
    (True, dict(dataset="mine.hdf5"), "pretrained"),
])  # fmt: skip
def test_base_policy_is_given_shipped_or_pretrained(monkeypatch, bases, tmp_path, shipped, given_flags, source):
    monkeypatch.setattr(rldt_furniture, "DEMOS", tmp_path / "demos")
    monkeypatch.setattr(rldt_furniture, "get_demonstrations", lambda args: demonstrations(58))
    policies = {"shipped": tmp_path / "demos" / "one_leg" / "base_med.safetensors", "own": tmp_path / "own.safetensors"}
    for name, path in policies.items():
        if shipped or name == "own":
            rldt_furniture.save_base(small_policy(58, 10, chunk=4), path)
    if "base" in given_flags:
        given_flags = dict(base=policies["own"])
    args = base_args(randomness="med", bc_epochs=1, bc_batch=8, **given_flags)
    policy = rldt_furniture.get_base(args, tmp_path)
    assert (tmp_path / "base.safetensors").exists() == (source == "pretrained")
    expected = rldt_furniture.load_base(policies.get(source, tmp_path / "base.safetensors"), args)
    assert changed(policy, expected.state_dict()) == set()
    if source == "pretrained":  # the assembler's demonstrations are MuJoCo's; of others it is not known
        with rldt_furniture.safe_open(tmp_path / "base.safetensors", "pt") as file:
            assert json.loads(file.metadata()["info"]).get("backend") == (None if "dataset" in given_flags else "mujoco")


def demonstrations(obs_dim=44, lengths=(3, 17, 20)):
    """Episodes whose first state and action are the step number, whose second action is the episode."""
    ends = np.cumsum(lengths)
    steps = np.arange(ends[-1], dtype=np.float32)
    action = np.stack([steps, 1 + np.digitize(steps, ends)] + [steps + 2] * 8, 1).astype(np.float32)
    return {"state": np.stack([steps] + [-1 - steps] * (obs_dim - 1), 1), "action": action, "episode_ends": ends, "meta": {}}


def pretrain(data, checkpoint=None, **changes):
    return rldt_furniture.pretrain(base_args("lamp", **dict(bc_epochs=1, bc_batch=8) | changes), data, log=lambda line: None, checkpoint=checkpoint)


def test_pretraining_chunks_are_consecutive_and_stay_inside_an_episode(monkeypatch):
    seen, loss = [], rldt_furniture.flow_matching_loss
    monkeypatch.setattr(rldt_furniture, "flow_matching_loss", lambda v, a, o: seen.append((a, o)) or loss(v, a, o))
    policy = pretrain(demonstrations(), bc_epochs=60, bc_spread=0.0)
    chunk, obs = torch.cat([a for a, _ in seen]).view(-1, 4, 10), torch.cat([o for _, o in seen])
    raw = ((chunk + 1) / 2 * (policy.action_max - policy.action_min + 1e-6) + policy.action_min).round()
    assert (raw[:, 1:, 0] - raw[:, :-1, 0] == 1).all()
    assert (raw[:, :, 1] == raw[:, :1, 1]).all()
    assert ((obs[:, 0] + 1) / 2 * 39).round().tolist() == raw[:, 0, 0].tolist()
    assert set(raw[:, 0, 0].int().tolist()) == {*range(3, 17), *range(20, 37)}  # every start but those too late


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_scaling_is_by_standard_deviations(spread):
    data = demonstrations()
    policy = pretrain(data, bc_spread=spread)
    for name, scaled in (
        ("state", policy.normalize(data["state"])),
        ("action", 2 * (torch.tensor(data["action"]) - policy.action_min) / (policy.action_max - policy.action_min) - 1),
    ):
        torch.testing.assert_close(scaled.mean(0), torch.zeros(scaled.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(scaled.std(0, correction=0), torch.full((scaled.shape[1],), 1 / spread), atol=1e-4, rtol=1e-4, msg=name)


def test_scaling_is_the_range_of_the_demonstrations():
    policy = pretrain(demonstrations(), bc_spread=0.0)
    assert (policy.obs_min[0], policy.obs_max[0], policy.obs_min[1], policy.obs_max[1]) == (0, 39, -40, -1)
    assert (policy.action_min[1], policy.action_max[1], policy.action_max[2]) == (1, 3, 41)


def test_pretraining_lowers_the_validation_loss():
    short, long = (pretrain(demonstrations(lengths=(40,) * 8), bc_epochs=epochs, bc_batch=32, bc_lr=5e-3, bc_ema=0.9).validation_loss
                   for epochs in (1, 60))  # fmt: skip
    assert long < 0.5 * short


def test_pretraining_starts_from_another_base_with_its_scaling(tmp_path):
    first = pretrain(demonstrations(), bc_epochs=20)
    rldt_furniture.save_base(first, tmp_path / "first.safetensors")
    other = demonstrations()
    other["state"] = 3 * other["state"] + 1
    second = pretrain(other, bc_epochs=2, bc_lr=1e-6, bc_from=tmp_path / "first.safetensors")
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=2e-3, atol=2e-4), name  # the file is in half precision
    fresh = pretrain(other, bc_epochs=2, bc_lr=1e-6)
    assert not torch.allclose(fresh.obs_min, first.obs_min, rtol=0.1)
    with pytest.raises(SystemExit, match="not a base policy"):
        pretrain(other, bc_from=tmp_path / "none.safetensors")


def test_pretraining_shows_the_averaged_policy_every_500_steps():
    seen = []
    torch.manual_seed(0)
    each = lambda step, policy, validation: seen.append((step, copy.deepcopy(policy.state_dict()), validation))
    policy = rldt_furniture.pretrain(arguments(actor_width=8, actor_depth=3, time_dim=8, chunk=4, bc_batch=8, bc_epochs=84),
                                     demonstrations(lengths=(20,) * 6), log=lambda *_: None, each=each)  # fmt: skip
    assert [step for step, *_ in seen] == [500, 1000, seen[-1][0]] and 1000 < seen[-1][0] < 1500  # and at the end
    for key, value in policy.state_dict().items():
        torch.testing.assert_close(seen[-1][1][key], value)
    assert seen[-1][2] == policy.validation_loss
    assert any(not torch.equal(value, seen[-1][1][key]) for key, value in seen[0][1].items())


def test_pretraining_goes_on_where_it_was_cut_off(monkeypatch, tmp_path):
    def run(path, stop_at=math.inf):
        """The policy, None if cut off, and the number of steps made here."""
        loss, calls = rldt_furniture.flow_matching_loss, []

        def counted(v, a, o):
            calls.append(torch.is_grad_enabled())
            if sum(calls) == stop_at:
                raise KeyboardInterrupt
            return loss(v, a, o)

        with monkeypatch.context() as patch:
            patch.setattr(rldt_furniture, "flow_matching_loss", counted)
            with contextlib.suppress(KeyboardInterrupt):
                return pretrain(demonstrations(), checkpoint=path, bc_epochs=170), sum(calls)
        return None, sum(calls)

    torch.manual_seed(3)
    whole, steps = run(None)
    torch.manual_seed(3)
    assert run(tmp_path / "unfinished", stop_at=550) == (None, 550)
    torch.manual_seed(4)
    continued, steps_made = run(tmp_path / "unfinished")
    assert steps_made == steps - 500
    assert continued.validation_loss == whole.validation_loss
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name


def test_an_unfinished_pretraining_of_other_settings_or_an_unreadable_one_stops(tmp_path):
    path = tmp_path / "unfinished"
    pretrain(demonstrations(), checkpoint=path)
    with pytest.raises(SystemExit, match="with other settings or data; finish it with those, or delete it"):
        pretrain(demonstrations(), checkpoint=path, bc_lr=2e-3)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SystemExit, match=r"(?s)cannot be loaded .*delete it to pretrain from the start"):
        pretrain(demonstrations(), checkpoint=path)
    assert not LOADED


def test_demonstrations_shorter_than_a_chunk_stop():
    with pytest.raises(SystemExit, match=r"as long as a chunk \(4 steps\)"):
        pretrain(demonstrations(lengths=(3, 2)))


# ------------------------------------------------------------------------------- demonstrations
def write_demos(path, furniture="one_leg", lengths=(24, 30), rewards=None, obs_dim=None, action_dim=10, spoil=None):
    """Random demonstrations that assemble everything in their last steps; rewards: sums that replace those."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(furniture=furniture, randomness="low", backend="mujoco")
        for i, length in enumerate(lengths):
            demo, reward = data.create_group(f"demo_{i}"), np.zeros(length, np.float32)
            reward[-2:] = (rewards[i] if rewards else STAGES.get(furniture, 1)) / 2
            demo["actions"], demo["rewards"] = rng.uniform(-1, 1, (length, action_dim)).astype(np.float32), reward
            demo["obs/state"] = rng.normal(size=(length, obs_dim or DIMS[furniture])).astype(np.float32)
            if spoil:
                spoil(demo)
    return path


def test_demonstrations_are_read_in_their_order(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", "lamp", range(3, 15), rewards=[2] * 5 + [1] + [2] * 6)  # the sixth is incomplete
    data = dataset.load(path, "lamp")
    lengths = [3, 4, 5, 6, 7, *range(9, 15)]
    assert np.diff(data["episode_ends"], prepend=0).tolist() == lengths
    assert (data["state"].shape, data["action"].shape) == ((sum(lengths), 44), (sum(lengths), 10))
    assert data["state"].dtype == data["action"].dtype == np.float32
    assert data["meta"] == {"furniture": "lamp", "randomness": "low", "backend": "mujoco"}
    with h5py.File(path) as file:
        np.testing.assert_array_equal(data["state"][-14:], file["data/demo_11/obs/state"])
        np.testing.assert_array_equal(data["action"][3:7], file["data/demo_1/actions"])
    few = dataset.load(path, "lamp", max_episodes=2)
    assert few["episode_ends"].tolist() == [3, 7]
    np.testing.assert_array_equal(few["state"], data["state"][:7])


def lacks(key):
    return lambda demo: demo.pop(key)


def nan(key):
    def spoil(demo):
        demo[key][3, 1] = np.nan

    return spoil


@pytest.mark.parametrize("written, message", [
    (dict(furniture="lamp"), "holds lamp, not one_leg"), (dict(obs_dim=44), r"demo_0: obs/state are \(24, 44\), not \(24, 58\)"),
    (dict(action_dim=7), r"demo_0: actions are \(24, 7\), not \(24, 10\)"), (dict(rewards=[0, 0]), r"no successful demonstration \(2 failed\)"),
    (dict(lengths=()), r"no successful demonstration \(0 failed\)"), (dict(spoil=lacks("actions")), "data/demo_0 lacks actions"),
    (dict(spoil=lacks("rewards")), "data/demo_0 lacks rewards"), (dict(spoil=lacks("obs")), "data/demo_0 lacks obs/state"),
    (dict(spoil=nan("obs/state")), "demo_0: obs/state contain NaN"), (dict(spoil=nan("actions")), "demo_0: actions contain NaN"),
])  # fmt: skip
def test_demonstrations_that_do_not_fit_stop_in_one_line(tmp_path, written, message):
    path = write_demos(tmp_path / "d.hdf5", **written)
    with pytest.raises(dataset.DatasetError, match=message) as stop:
        dataset.load(path, "one_leg")
    assert str(stop.value).startswith(f"{path}: ")
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("content, message", [
    (None, "no such file"), (b"", "cannot be read"), (b"garbage", "cannot be read"), ("half", "truncated"), ("other", "not demonstrations of a furniture"),
    ("renamed", "cannot be read"),
])  # fmt: skip
def test_missing_or_damaged_demonstrations_stop_in_one_line(tmp_path, content, message):
    path = tmp_path / "d.hdf5"
    if content == "half":
        path.write_bytes(write_demos(tmp_path / "whole.hdf5").read_bytes()[:6000])
    elif content == "other":
        with h5py.File(path, "w") as file:
            file["data/demo_0/actions"] = np.zeros((3, 10))
    elif content == "renamed":
        with h5py.File(write_demos(path), "a") as file:
            file.move("data/demo_1", "data/first")
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message) as stop:
        dataset.load(path, "one_leg")
    assert type(stop.value) is dataset.DatasetError
    assert "\n" not in str(stop.value)


def test_missing_demonstrations_are_made(monkeypatch, tmp_path):
    commands = []

    class Result:
        returncode = 0

    def run(command, cwd):
        commands.append(command)
        (tmp_path / "lamp").mkdir()
        write_demos(command[-1], "lamp")
        return Result

    monkeypatch.setattr(rldt_furniture, "DEMOS", tmp_path)
    monkeypatch.setattr(rldt_furniture.subprocess, "run", run)
    args, path = arguments(furniture="lamp", randomness="med", bc_episodes=1), tmp_path / "lamp" / "med.hdf5"
    for _ in range(2):  # the second time they are there
        assert rldt_furniture.get_demonstrations(args)["episode_ends"].tolist() == [24]
    assert commands == [[sys.executable, "-m", "demos.make_furniture_demos", "--furniture", "lamp", "--randomness", "med", "--out", str(path)]]
    path.unlink()
    Result.returncode = 1
    monkeypatch.setattr(rldt_furniture.subprocess, "run", lambda command, cwd: Result)
    with pytest.raises(SystemExit, match="could not be made"):
        rldt_furniture.get_demonstrations(args)
    args.dataset = tmp_path / "none.hdf5"
    with pytest.raises(SystemExit, match="no such file"):
        rldt_furniture.get_demonstrations(args)


# ----------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize("furniture, horizon, rows", [("one_leg", 700, 89), ("lamp", 1000, 126)])
def test_resolve_fills_in_the_settings_of_the_task(furniture, horizon, rows):
    args = rldt_furniture.resolve(rldt_furniture.Args(furniture=furniture, backend="mujoco"))
    assert (args.horizon, args.rollout_chunks, stages_of(args)) == (horizon, rows, STAGES[furniture])
    assert args.transport_scale == {"one_leg": 30, "lamp": 8}[furniture]
    assert rldt_furniture.resolve(rldt_furniture.Args(furniture=furniture, backend="mujoco", transport_scale=3.0)).transport_scale == 3
    assert args.device in ("cpu", "cuda")
    assert args.stop_on_success
    args = rldt_furniture.resolve(rldt_furniture.Args(furniture=furniture, backend="mujoco", horizon=48, rollout_chunks=40))
    assert (args.horizon, args.rollout_chunks) == (48, 40)


@pytest.mark.parametrize("name", [
    "chunk", "euler_steps", "n_particles", "num_envs", "rounds", "reference_every", "segments", "value_samples", "eval_every", "eval_episodes", "threads",
])  # fmt: skip
def test_numbers_below_one_stop_with_the_flag(name):
    with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} must be at least 1, got 0"):
        rldt_furniture.resolve(rldt_furniture.Args(**{name: 0}))


@pytest.mark.parametrize("changes, message", [
    (dict(segment_chunks=20, rollout_chunks=20), r"--segment-chunks 20 .*--rollout-chunks 20"), (dict(segment_chunks=-1), "--segment-chunks -1"),
    (dict(exploration_steps=-1), "--exploration-steps"), (dict(exploration_scale=-0.1), "--exploration-scale"), (dict(exploration_steps=9, euler_steps=8), "--exploration-steps"),
    (dict(chunk=-1), "--chunk"), (dict(horizon=-4), "--horizon"), (dict(rollout_chunks=-3), "--rollout-chunks -3"),
    (dict(actor_ema=1.0), "--actor-ema"), (dict(actor_ema=-0.1), "--actor-ema"), (dict(backend="isaac"), "--backend isaac: Isaac Gym is not installed; use --backend mujoco"),
])  # fmt: skip
def test_values_out_of_range_stop_in_one_line(changes, message):
    with pytest.raises(SystemExit, match=message) as stop:
        rldt_furniture.resolve(rldt_furniture.Args(**changes))
    assert "\n" not in str(stop.value)


def test_cuda_without_a_cuda_device_stops(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        rldt_furniture.resolve(rldt_furniture.Args(device="cuda"))
    assert rldt_furniture.resolve(rldt_furniture.Args()).device == "cpu"


@pytest.mark.parametrize("argv", [["--preset", "paper"], ["--preset=paper"]])
@pytest.mark.parametrize("furniture, rows", [("one_leg", 89), ("lamp", 126)])
def test_paper_preset_sets_the_values_of_the_paper(argv, furniture, rows):
    args = rldt_furniture.resolve(rldt_furniture.parse_args([*argv, "--furniture", furniture]))
    paper = dict(
        preset="paper", iterations=250, num_envs=1000, rollout_chunks=rows, segment_chunks=rows - 1, buffer_iterations=20, euler_steps=32,
        actor_width=1024, actor_depth=7, actor_layer_norm=True, cond_mlp=(512, 64), time_dim=32, chunk=8, bc_spread=0.0, bc_epochs=8000, bc_batch=256, bc_lr=1e-4,
        bc_lr_end=1e-5, bc_ema=0.995, gamma=0.995, td_lambda=0.5, target_momentum=0.998, critic_lr=5e-4, critic_width=512, critic_depth=3,
        critic_stage=True, warmup_iterations=2, warmup_lambda=0.5, warmup_factor=1, n_particles=8, kernel="rbf", alpha=1e-3, consistency_weight=0.5,
        constraint_weight=0.2, q_gradient="critic", reference="previous", reference_every=1, actor_lr=2e-5, actor_lr_end=1.0, actor_warmup=32,
        transport_loss="authors", transport_scale=1.0, actor_ema=0.0, value_samples=2, rounds=16, critic_steps=128, actor_steps=2, eval_every=10,
        stop_on_success=False, time_limit="terminal", critic_layer_norm=False, critic_init="normal", fresh_fraction=0.33, zero_fraction=0.0,
        exploration_steps=2, balanced=True, bf16=False,
    )  # fmt: skip
    assert {key: getattr(args, key) for key in paper} == paper
    assert args.actor_batch * args.n_particles == 50_000


def test_explicit_flags_win_over_the_preset():
    args = rldt_furniture.parse_args(["--n-particles", "5", "--preset", "paper", "--critic-batch=64", "--cond-mlp", "7", "9"])
    assert (args.n_particles, args.critic_batch, args.cond_mlp, args.rounds) == (5, 64, (7, 9), 16)


def test_no_flags_give_the_defaults():
    assert rldt_furniture.parse_args([]) == rldt_furniture.parse_args(["--preset", "laptop"]) == rldt_furniture.Args()


@pytest.mark.parametrize("argv", [["rldt_furniture.py"], ["pretrain_fm.py", "furniture"]])
def test_help_exits_with_zero_and_mentions_every_field(monkeypatch, capsys, argv):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [*argv, "--help"])
    name = argv[0].removesuffix(".py")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, name, raising=False)
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(name, run_name="__main__")
    assert stop.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for field in dataclasses.fields(rldt_furniture.Args):
        flag = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"{flag}(?![\w-])", text), flag
    assert ("--out" in text) == ("furniture" in argv)
    assert "robomimic" not in text.replace("pretrain_fm.py robomimic", "")


# ------------------------------------------------------------------- whole runs without simulators
def flags(base, runs, **changes):
    """Flags of a run of four iterations, the first and the last of which evaluate."""
    values = dict(
        furniture="lamp", backend="mujoco", runs=runs, chunk=4, euler_steps=4, actor_width=16, actor_depth=3, cond_mlp=(), time_dim=8, device=DEVICE,
        threads=1, seed=3, iterations=4, num_envs=2, horizon=40, rollout_chunks=13, buffer_iterations=2, eval_every=10, eval_episodes=2, final_eval_episodes=3,
        rounds=2, critic_steps=2, critic_batch=8, critic_width=16, segments=6, segment_chunks=3, warmup_iterations=1, actor_steps=1, actor_batch=4,
        n_particles=2, exploration_steps=2, actor_lr=1e-3, actor_warmup=2, actor_layer_norm=False,
        q_gradient="critic", transport_scale=30.0, actor_lr_end=0.3, reference="previous",
    ) | ({"base": base} if base else {}) | changes  # fmt: skip
    named = {key.replace("_", "-"): value for key, value in values.items()}
    words = [f"--{'' if v else 'no-'}{k}" if isinstance(v, bool) else f"--{k}={v}" for k, v in named.items() if v != ()]
    return words + [f"--{k}" for k, v in named.items() if v == ()]


def only_run(runs):
    (run,) = runs.iterdir()
    return run


def metrics(run):
    """The rows of metrics.csv without the columns of wall time."""
    return [{key: value for key, value in row.items() if key not in WALL_COLUMNS} for row in csv.DictReader((run / "metrics.csv").open())]


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def assert_same_networks(run, other):
    for name in ("policy", "averaged", "critic", "target", "reference"):
        expected = checkpoint(other)[name]
        for key, value in checkpoint(run)[name].items():
            assert torch.equal(value, expected[key]), (name, key)


def main(argv):
    return rldt_furniture.main(rldt_furniture.parse_args(list(map(str, argv))))


RESULTS = ("base_success", "final_success", "base_stages", "final_stages", "best_success", "best_stages", "best_success_sampled", "env_steps")


@pytest.fixture(scope="module")
def _fakes():
    """Scripted episodes of up to 5 chunks instead of a simulator; a chunk's actions decide whether it assembles a pair."""
    made = []

    def make_envs(args, num_envs, stop_on_success=True):
        assembles = lambda seed, t, chunk: int(math.sin(100 * chunk.sum()) > 0.4)
        made.append(FakeEnvs(num_envs, lambda seed: 3 + seed % 3, assembles, stages_of(args), stop_on_success, 4, 10, DIMS[args.furniture]))
        return made[-1]

    return made, make_envs


@pytest.fixture
def fakes(_fakes, monkeypatch):
    """Runs main() on fake environments; the list holds those that were made."""
    monkeypatch.setattr(rldt_furniture, "make_envs", _fakes[1])
    _fakes[0].clear()
    return _fakes[0]


@pytest.fixture(scope="module")
def fake_run(_fakes, bases, tmp_path_factory):
    """Directory and result of a complete run on fake environments; read it, do not write to it."""
    runs = tmp_path_factory.mktemp("fake")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rldt_furniture, "make_envs", _fakes[1])
        result = main(flags(bases["lamp"], runs))
    signal.signal(signal.SIGINT, handler)
    return only_run(runs), result


@pytest.fixture
def copied_run(fake_run, tmp_path):
    return shutil.copytree(fake_run[0], tmp_path / "copy")


def test_run_succeeds_and_fails_in_turn_so_that_it_tests_something(fake_run):
    rows = metrics(fake_run[0])
    assert any(0 < float(row["train_success"]) < 1 for row in rows[1:4])
    assert all(float(row["train_success"]) <= float(row["train_stages"]) / 2 + 0.5 for row in rows[1:4])
    replay = torch.load(fake_run[0] / "replay0.pt", weights_only=True)
    assert set(replay["reached"][replay["valid"] > 0].tolist()) == {0, 1, 2}
    assert set(replay["stage"][replay["valid"] > 0].tolist()) == {0, 1}
    assert checkpoint(fake_run[0])["critic"]["weights.0"].shape[1] == 44 + 1 + 40  # state, stage and action


@pytest.mark.parametrize("changes", [
    dict(td_lambda=0.0, critic_layer_norm=False, critic_init="normal", exploration_steps=0, time_limit="bootstrap", value_samples=2, critic_stage=False, q_gradient="particles", reference_every=25),
    dict(transport_loss="literal", kernel="delta", reference="pretrained", bf16=False, n_particles=1, balanced=False, actor_ema=0.5),
    dict(furniture="one_leg", stop_on_success=False, segment_chunks=0, reference_every=1),
])  # fmt: skip
def test_run_with_the_other_choices_ends_with_finite_numbers(fakes, bases, tmp_path, changes):
    furniture = changes.get("furniture", "lamp")
    result = main(flags(bases[furniture], tmp_path, **dict(iterations=3, warmup_iterations=0, segments=3) | changes))
    run = only_run(tmp_path)
    assert result["task"] == f"{furniture}-low"
    assert np.isfinite([result["final_success"], result["final_success_sampled"]]).all()
    rows, saved = metrics(run), checkpoint(run)
    assert float(rows[2]["diagnostics/base_distance"]) > 0
    followed = all(torch.equal(value, saved["policy"][key]) for key, value in saved["reference"].items())
    assert followed == (changes.get("reference_every") == 1)
    assert saved["critic"]["weights.0"].shape[1] == DIMS[furniture] + 40 + ("critic_stage" not in changes and furniture == "lamp")
    assert all(envs.closed for envs in fakes)


def in_training(counter):
    """Without the seeds of the evaluations of a run with seed 3."""
    assert {4_000_000, 4_000_001, 4_000_002} <= set(counter)
    return {seed: value for seed, value in counter.items() if seed // 1_000_000 != 4}


def test_training_follows_its_schedules(fakes, bases, tmp_path, monkeypatch):
    calls = {"lambda": [], "critic": [], "actor": []}
    target, critic, actor = rldt_furniture.critic_target, rldt_furniture.update_critic, rldt_furniture.update_actor
    monkeypatch.setattr(rldt_furniture, "critic_target", lambda *args: calls["lambda"].append(args[-1]) or target(*args))
    monkeypatch.setattr(rldt_furniture, "update_critic", lambda *args: calls["critic"].append(len(args[-2])) or critic(*args))
    monkeypatch.setattr(rldt_furniture, "update_actor", lambda *args: calls["actor"].append(args[3].param_groups[0]["lr"]) or actor(*args))
    changes = dict(warmup_factor=3, warmup_lambda=0.9, td_lambda=0.3, actor_lr=0.01, actor_lr_end=0.5, actor_warmup=3)
    main(flags(bases["lamp"], tmp_path, **changes))
    assert calls["lambda"] == [0.9] * 2 + [0.3] * 4  # two rounds an iteration, one iteration before the actor starts
    assert len(calls["critic"]) == 2 * 6 + 4 * 2
    assert max(calls["critic"]) == 8
    decay = [1 - 0.5 * iteration / 4 for iteration in (2, 2, 3, 3)]
    assert calls["actor"] == pytest.approx([0.01 * d * w for d, w in zip(decay, (1 / 3, 2 / 3, 1, 1), strict=True)])
    rows = metrics(only_run(tmp_path))
    for i, row in enumerate(rows):
        assert (row["eval_success"] != "") == (row["eval_stages_sampled"] != "") == (i in (0, 4))
        assert (row["losses/critic"] != "") == (row["train_stages"] != "") == (i in (1, 2, 3))
        assert (row["losses/transport"] != "") == (i in (2, 3))
    assert float(rows[1]["diagnostics/base_distance"]) == 0
    assert float(rows[3]["diagnostics/base_distance"]) > 0
    (envs,) = fakes
    steps = np.diff([int(row["env_steps"]) for row in rows]).tolist()
    assert steps[3] == 0
    assert sum(steps) == sum(in_training(envs.steps).values())


def test_states_after_the_last_pair_reach_neither_update_and_the_critic_sees_their_stage(fakes, bases, tmp_path, monkeypatch):
    used, seen = [], []
    critic, actor = rldt_furniture.update_critic, rldt_furniture.update_actor
    monkeypatch.setattr(rldt_furniture, "update_critic", lambda *args: seen.append(args[3]) or critic(*args))
    monkeypatch.setattr(rldt_furniture, "update_actor", lambda *args: used.append(args[4]) or seen.append(args[5]) or actor(*args))
    main(flags(bases["lamp"], tmp_path, segments=40, stop_on_success=False))
    (envs,) = fakes
    valid = {seed % 100_000: chunks for seed, chunks in in_training(envs.valid).items()}
    assert len(valid) == len(in_training(envs.valid))  # no two seeds with the same last digits
    for states in torch.cat(used), torch.cat(seen):
        last = [valid[round(state[0].item() * 100_000)] - 1 - round(state[1].item() * 10) for state in states]
        assert min(last) == 0  # the state in which the last pair is assembled, or before the time limit, but none after it
    assert any(chunks < 3 for chunks in valid.values())  # an episode is at least so long
    assert set(torch.cat(seen)[:, -1].tolist()) == {0, 0.5}


def test_evaluating_a_run_gives_the_rates_of_its_last_evaluation(fakes, fake_run, capsys):
    run, result = fake_run
    scores = main(["--evaluate", run, "--final-eval-episodes=3", "--seed=3", "--num-envs=2", "--threads=1", "--device=cpu"])
    assert scores == {"zero": result["final_success"], "noise": result["final_success_sampled"]}
    printed = capsys.readouterr().out
    assert f"lamp-low (mujoco), 3 episodes from x_0 = 0: success {100 * scores['zero']:.0f} %" in printed
    assert f"{result['final_stages']:.2f} pairs" in printed
    assert all(envs.closed for envs in fakes)


@pytest.mark.parametrize("flag, backend", [("auto", "isaac"), ("mujoco", "mujoco")])
def test_a_run_is_evaluated_in_its_own_simulator_or_in_the_one_asked_for(monkeypatch, copied_run, flag, backend):
    monkeypatch.setattr(rldt_furniture, "isaac_missing", lambda: "")
    stored = json.loads((copied_run / "args.json").read_text())
    (copied_run / "args.json").write_text(json.dumps(stored | {"backend": "isaac", "bf16": False}))
    args = rldt_furniture.resolve(rldt_furniture.parse_args(["--evaluate", str(copied_run), "--backend", flag]))
    assert (args.backend, args.furniture, args.chunk, args.horizon, args.bf16) == (backend, "lamp", 4, 40, False)


def test_best_policy_is_measured_again_on_other_episodes(fakes, bases, tmp_path, monkeypatch):
    seen = []

    def evaluated(policy, envs, args, episodes, seed):
        seen.append((episodes, seed))
        stages = 2 * (np.arange(episodes) < {0: 1, 1: 2, 2: 1, 3: 3}[len(seen) - 1])  # base, middle, final, best again
        return {"zero": stages, "noise": 2 - stages}

    monkeypatch.setattr(rldt_furniture, "evaluate", evaluated)
    result = main(flags(bases["lamp"], tmp_path, eval_every=2, iterations=4, eval_episodes=3, final_eval_episodes=4))
    assert seen == [(4, 4_000_000), (3, 4_000_000), (4, 4_000_000), (4, 4_500_000)]
    assert [result[key] for key in RESULTS[:-1]] == [0.25, 0.25, 0.5, 0.5, 0.75, 1.5, 0.25]
    best, last = (rldt_furniture.load_policy(only_run(tmp_path) / name, "cpu").state_dict() for name in ("best_policy.pt", "policy.pt"))
    assert not all(torch.equal(value, last[key]) for key, value in best.items())


@pytest.mark.parametrize("at, saved", [("training", 3), ("saving", 3)])
def test_run_that_crashed_and_is_resumed_gives_the_metrics_of_one_that_did_not(monkeypatch, fakes, fake_run, bases, tmp_path, at, saved):
    update, save, calls = rldt_furniture.update_critic, torch.save, Counter()

    def crash(*args):
        calls["update"] += 1
        if at == "training" and calls["update"] == 10:  # in the third training iteration
            raise RuntimeError("crash")
        return update(*args)

    def full(value, path):
        if path.name.startswith("checkpoint"):
            calls["save"] += 1
            if at == "saving" and calls["save"] == 4:  # the replay's oldest rollout is overwritten by then, in memory and in its file
                path.write_bytes(b"as much as fits")
                raise OSError(28, "No space left on device")
        save(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(rldt_furniture, "update_critic", crash)
        patch.setattr(torch, "save", full)
        with pytest.raises((RuntimeError, SystemExit), match=r"crash|Cannot write .*checkpoint\.pt.*No space left.*disk full"):
            main(flags(bases["lamp"], tmp_path))
    run = only_run(tmp_path)
    assert not list(run.glob("*.partial"))
    assert checkpoint(run)["state"]["iteration"] == saved
    result = main(["--resume", run])
    assert metrics(run) == metrics(fake_run[0])
    assert_same_networks(run, fake_run[0])
    assert [result[key] for key in RESULTS] == [fake_run[1][key] for key in RESULTS]


def test_ctrl_c_finishes_the_iteration_and_the_resumed_run_equals_one_never_stopped(monkeypatch, fakes, fake_run, bases, tmp_path):
    update, calls = rldt_furniture.update_critic, []

    def pressed(*args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rldt_furniture, "update_critic", pressed)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
            main(flags(bases["lamp"], tmp_path))
    run = only_run(tmp_path)
    assert stop.type is SystemExit
    assert str(stop.value) == f"Stopped after iteration 2, saved. Continue with: python rldt_furniture.py --resume {run}"
    assert len(calls) == 2 * 4  # the whole iteration
    assert all(envs.closed for envs in fakes)
    result = main(str(stop.value).split("rldt_furniture.py ")[1].split())
    assert metrics(run) == metrics(fake_run[0])
    assert_same_networks(run, fake_run[0])
    assert [result[key] for key in RESULTS] == [fake_run[1][key] for key in RESULTS]


def test_second_ctrl_c_stops_at_once(monkeypatch, fakes, bases, tmp_path):
    calls = []

    def pressed(*args):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    monkeypatch.setattr(rldt_furniture, "update_critic", pressed)
    with pytest.raises(KeyboardInterrupt):
        main(flags(bases["lamp"], tmp_path))
    assert len(calls) == 2
    assert checkpoint(only_run(tmp_path))["state"]["iteration"] == 1


def test_nan_in_a_loss_stops_with_its_name_and_keeps_the_last_checkpoint(monkeypatch, fakes, fake_run, bases, tmp_path):
    update, calls = rldt_furniture.update_critic, []

    def broken(*args):
        calls.append(1)
        return update(*args) | ({"losses/critic": torch.tensor(torch.nan)} if len(calls) == 6 else {})

    with monkeypatch.context() as patch:
        patch.setattr(rldt_furniture, "update_critic", broken)
        with pytest.raises(FloatingPointError, match=r"losses/critic became nan in iteration 2.*checkpoint\.pt"):
            main(flags(bases["lamp"], tmp_path))
    run = only_run(tmp_path)
    assert checkpoint(run)["state"]["iteration"] == 2
    main(["--resume", run])
    assert metrics(run) == metrics(fake_run[0])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_average_of_the_actor_s_weights_acts_and_is_evaluated_and_kept(monkeypatch, fakes, bases, tmp_path, ema):
    expected, update = copied(rldt_furniture.load_base(bases["lamp"], base_args(furniture="lamp"))), rldt_furniture.update_actor
    used = []

    def step(policy, *rest):
        result = update(policy, *rest)
        for key, value in policy.named_parameters():
            expected[key] = ema * expected[key] + (1 - ema) * value.detach().cpu()
        return result

    def is_expected(policy):
        return all(torch.allclose(value.cpu(), expected[key], atol=1e-6) for key, value in policy.state_dict().items())

    monkeypatch.setattr(rldt_furniture, "update_actor", step)
    for name in "collect", "evaluate", "critic_target":
        function = getattr(rldt_furniture, name)
        monkeypatch.setattr(rldt_furniture, name, lambda policy, *rest, function=function: used.append(is_expected(policy)) or function(policy, *rest))
    start = copy.deepcopy(expected)
    main(flags(bases["lamp"], tmp_path, actor_ema=ema))
    assert len(used) >= 11 and all(used[:11])  # two evaluations, three rollouts with two rounds of targets each; what may follow is the best policy's
    run = only_run(tmp_path)
    policy, saved = rldt_furniture.load_policy(run / "policy.pt", "cpu"), checkpoint(run)
    assert is_expected(policy)
    assert changed(policy, start) and not changed(policy, saved["averaged"])
    assert bool(changed(policy, saved["policy"])) == (ema > 0)


def test_progress_bar_ends_at_the_number_of_iterations(fakes, bases, tmp_path, capsys):
    main(flags(bases["lamp"], tmp_path))
    assert re.findall(r"(\d+(?:/\d+|it)) \[", capsys.readouterr().err)[-1] == "4/4"


def test_run_that_pretrained_its_base_goes_on_from_the_same_base(monkeypatch, fakes, tmp_path):
    path = write_demos(tmp_path / "demos.hdf5", "lamp", (40,) * 4)
    changes = dict(dataset=path, pretrain=True, warmup_iterations=2, bc_epochs=2, bc_batch=32)
    main(flags(None, tmp_path / "whole", **changes))
    whole = only_run(tmp_path / "whole")
    assert (whole / "base.safetensors").exists()
    update, calls = rldt_furniture.update_critic, []

    def crash(*args):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("crash")
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rldt_furniture, "update_critic", crash)
        with pytest.raises(RuntimeError, match="crash"):
            main(flags(None, tmp_path / "parts", **changes))
    run = only_run(tmp_path / "parts")
    main(["--resume", run])
    assert metrics(run) == metrics(whole)
    assert_same_networks(run, whole)


@pytest.mark.parametrize("content", [b"", b"garbage", "half", "pickle"])
@pytest.mark.parametrize("name, flag", [("checkpoint.pt", "--resume"), ("replay0.pt", "--resume"), ("policy.pt", "--evaluate")])
def test_damaged_file_stops_with_a_name(fakes, copied_run, content, name, flag):
    path = copied_run / name
    if content == "half":
        content = path.read_bytes()[: path.stat().st_size // 2]
    elif content == "pickle":
        content = pickle.dumps(Bomb())
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=r"(checkpoint|replay0|policy)\.pt: cannot be loaded"):
        main([flag, copied_run, "--device=cpu"])
    assert LOADED == []


def test_resuming_a_finished_run_writes_its_result_again(fakes, fake_run, copied_run):
    (copied_run / "result.json").unlink()  # as if killed between the last checkpoint and the result
    (copied_run / "policy.pt").unlink()
    result = main(["--resume", copied_run])
    assert metrics(copied_run) == metrics(fake_run[0])
    assert [result[key] for key in RESULTS] == [fake_run[1][key] for key in RESULTS]
    assert (copied_run / "policy.pt").exists()


def test_resuming_keeps_the_base_policy_that_the_run_started_from(fakes, copied_run):
    check_resumed_run_keeps_its_base(rldt_furniture, copied_run)


def test_resuming_what_is_no_run_directory_or_has_damaged_arguments_says_so(fakes, copied_run, tmp_path):
    with pytest.raises(SystemExit, match="not a run directory"):
        main(["--resume", tmp_path])
    (copied_run / "args.json").write_text('{"furniture": "la')
    for flag in ("--resume", "--evaluate"):
        with pytest.raises(SystemExit, match=r"args\.json: cannot be read"):
            main([flag, copied_run])


def test_resume_takes_the_stored_arguments_and_says_which_flags_it_does_not_use(copied_run, capsys):
    args = rldt_furniture.resolve(rldt_furniture.parse_args(["--resume", str(copied_run), "--seed", "99"]))
    assert (args.seed, args.actor_width, args.furniture, args.cond_mlp) == (3, 16, "lamp", ())
    assert "not used: --seed\n" in capsys.readouterr().out
    rldt_furniture.resolve(rldt_furniture.parse_args(["--resume", str(copied_run)]))
    assert "not used" not in capsys.readouterr().out


def test_pretraining_alone_writes_a_base_policy_its_success_and_its_pairs(fakes, tmp_path, capsys):
    out = tmp_path / "new" / "base.safetensors"
    args = base_args("lamp", dataset=write_demos(tmp_path / "d.hdf5", "lamp", (40,) * 4), bc_epochs=1, bc_batch=32, num_envs=2, final_eval_episodes=3,
                     threads=1, rollout_chunks=20)  # fmt: skip
    info = pretrain_fm.furniture(args, out)
    rldt_furniture.load_base(out, args)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["info"]) == info
    assert {"furniture", "randomness", "backend", "validation_loss", "success_zero", "success_sampled", "pairs_zero", "pairs_sampled"} <= set(info)
    assert 0 < info["pairs_zero"] + info["pairs_sampled"] <= 4
    assert f"success {100 * info['success_zero']:.0f} % ({info['pairs_zero']:.2f} pairs)" in capsys.readouterr().out


# ------------------------------------------------------------------------- a whole run on MuJoCo
@pytest.fixture(scope="module")
def one_leg(tmp_path_factory):
    """Directory and result of a complete run on One-Leg whose base is pretrained on random demonstrations; read it only."""
    runs = tmp_path_factory.mktemp("one_leg")
    path = write_demos(tmp_path_factory.mktemp("demos") / "demos.hdf5")
    handler = signal.getsignal(signal.SIGINT)
    changes = dict(furniture="one_leg", pretrain=True, dataset=path, bc_epochs=2, bc_batch=16, iterations=3, horizon=10, rollout_chunks=6,
                   final_eval_episodes=2, cond_mlp=7, actor_layer_norm=True)  # fmt: skip
    result = main(flags(None, runs, **changes))
    signal.signal(signal.SIGINT, handler)
    return only_run(runs), result


def test_run_on_mujoco_writes_every_file(one_leg):
    run, returned = one_leg
    assert run.name.startswith("one_leg-low__rldt__3__")
    assert not list(run.glob("*.partial"))
    assert {"args.json", "base.safetensors", "base_policy.pt", "policy.pt", "checkpoint.pt", "replay0.pt", "metrics.csv", "curve.png", "result.json"} <= {
        path.name for path in run.iterdir()
    }
    args = json.loads((run / "args.json").read_text())
    assert set(args) == {field.name for field in dataclasses.fields(rldt_furniture.Args)}
    assert (args["seed"], args["horizon"], args["backend"], args["cond_mlp"]) == (3, 10, "mujoco", [7])
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    saved = checkpoint(run)
    assert saved["state"]["iteration"] == 4
    assert changed(rldt_furniture.load_policy(run / "policy.pt", "cpu"), saved["policy"]) == set()
    result, rows = json.loads((run / "result.json").read_text()), metrics(run)
    assert result == json.loads(json.dumps(returned))
    assert (result["task"], result["backend"], result["episodes"]) == ("one_leg-low", "mujoco", 2)
    for name, row in ("base", rows[0]), ("final", rows[-1]):
        for kind in "success", "stages":
            for end in (kind, f"{kind}_sampled", *([f"{kind}_low", f"{kind}_high", f"{kind}_sampled_low"] if kind == "success" else [])):
                assert result[f"{name}_{end}"] == pytest.approx(float(row[f"eval_{end}"]))
    assert result["best_success"] >= result["final_success"]
    assert result["env_steps"] == int(rows[-1]["env_steps"])
    assert {"torch", "numpy", "mujoco", "python"} == set(result["versions"])
    # six rows: ten steps in three chunks, the row in which they ended, and one chunk of the next episode
    assert np.diff([int(row["env_steps"]) for row in rows]).tolist() == [2 * 14] * 2 + [0]


def test_tensorboard_holds_the_scalars_of_the_metrics(one_leg):
    run, _ = one_leg
    events = EventAccumulator(str(run))
    events.Reload()
    tags = {"charts/eval_success", "charts/eval_success_sampled", "charts/eval_stages", "charts/train_stages", "losses/critic", "losses/transport"}
    assert tags <= set(events.Tags()["scalars"])
    expected = [(int(r["env_steps"]), float(r["losses/critic"])) for r in metrics(run) if r["losses/critic"]]
    assert [(e.step, e.value) for e in events.Scalars("losses/critic")] == [(s, pytest.approx(v)) for s, v in expected]


def test_replay_of_a_run_on_mujoco_holds_its_episodes(one_leg):
    slot = torch.load(one_leg[0] / "replay1.pt", weights_only=True)  # of the second training iteration
    assert slot["state"].shape == (6, 2, 58)
    assert slot["valid"].tolist() == [[1, 1]] * 3 + [[0, 0], [1, 1], [0, 0]]
    assert slot["terminated"].tolist() == [[0, 0]] * 2 + [[1, 1]] + [[0, 0]] * 3
    assert (slot["state"][1:4] != slot["state"][:3]).any(-1).all()
    assert not torch.equal(slot["state"][0], slot["state"][4])
    assert slot["state"].abs().max() <= 5


def test_environments_are_made_as_the_arguments_say():
    args = rldt_furniture.resolve(base_args("lamp", randomness="med", horizon=9, threads=1, rollout_chunks=20, segment_chunks=3))
    envs = rldt_furniture.make_envs(args, 2, stop_on_success=False)
    assert isinstance(envs, FurnitureVectorEnv)
    assert (envs.num_envs, envs.chunk, envs.horizon, envs.stop_on_success) == (2, 4, 9, False)
    assert envs.observation_space["state"].shape == (44,)
    assert rldt_furniture.make_envs(args, 1).stop_on_success
    envs.close()


def test_video_shows_both_policies_or_says_why_not(bases, tmp_path, capsys, monkeypatch):
    for name in "MUJOCO_GL", "PYOPENGL_PLATFORM":  # as before, afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    policy = rldt_furniture.load_base(bases["one_leg"], base_args())
    args = base_args(horizon=3, video_episodes=2)
    path = tmp_path / "videos" / "film.mp4"
    seeds, reset = [], rldt_furniture.FurnitureEnv.reset
    monkeypatch.setattr(rldt_furniture.FurnitureEnv, "reset", lambda env, seed: (seeds.append(seed), reset(env, seed=seed))[1])
    rldt_furniture.record_video({"base": policy, "finetuned": policy}, args, path)
    start = 1_000_000 * (args.seed + 1)  # where no demonstration and no rollout starts
    assert seeds == 2 * [start, start + 1]
    printed = capsys.readouterr().out
    assert "Traceback" not in printed
    assert path.exists() == printed.startswith("Video (MuJoCo; base, finetuned from left to right)")
    if not path.exists():
        assert "install libegl1 or libosmesa6" in printed


# --------------------------------------------------------------------------- what a critic knows
class Gaussians:
    """A policy whose chunks are its noise plus the state."""

    action_size, normalize, to_env = 3, None, None

    def sample(self, obs, x0):
        return x0 + obs


class Linear(torch.nn.Module):
    gradient = torch.tensor([2.0, -1.0, 0.5])

    def forward(self, obs, action):
        return torch.stack([action @ self.gradient, action @ self.gradient + 2])  # two networks


@pytest.mark.parametrize("operator, choose", [
    ("best", lambda q, a, spread: a[q.argmax()]), ("mean", lambda q, a, spread: a.mean(0)),
    ("top 4", lambda q, a, spread: a[np.argsort(q)[-4:]].mean(0)),
    ("weighted", lambda q, a, spread: np.average(a, 0, np.exp((q - q.mean()) / spread))),
])  # fmt: skip
def test_probe_chooses_among_the_particles_of_each_state(operator, choose):
    obs = torch.tensor([[0.0, 0.0, 0.0], [5.0, -5.0, 1.0]])
    torch.manual_seed(0)
    chosen = Chosen(Gaussians(), Linear(), operator, particles=9, move=0.3).sample(obs, torch.zeros(2, 3))
    torch.manual_seed(0)
    particles = (torch.randn(2, 9, 3) + obs[:, None]).numpy()
    q = particles @ Linear.gradient.numpy()  # (2, 9)
    for i in range(2):
        np.testing.assert_allclose(chosen[i], choose(q[i], particles[i], np.sqrt(q.var(1).mean())), rtol=1e-4, atol=1e-5)


def test_probe_moves_chunks_by_a_length():
    obs, start = torch.zeros(1, 3), torch.ones(1, 3)
    gradient = Linear.gradient / Linear.gradient.norm()
    move = {name: Chosen(Gaussians(), Linear(), name, particles=100_000, move=0.3).sample(obs, start)[0] - start[0] for name in ("base", "gradient", "covariance")}
    torch.testing.assert_close(move["base"], torch.zeros(3))
    torch.testing.assert_close(move["gradient"], 0.3 * gradient)
    torch.testing.assert_close(move["covariance"], 0.3 * gradient, rtol=0, atol=0.01)
    with pytest.raises(SystemExit, match="--operators: worst is none of base, best"):
        Chosen(Gaussians(), Linear(), "worst", 4, 0.3).sample(obs, start)


def test_actor_probe_moves_the_actor_alone_and_appends_what_it_measured(monkeypatch, fakes, fake_run, tmp_path):
    seen = []
    update = rldt_furniture.update_actor
    monkeypatch.setattr(rldt_furniture, "update_actor", lambda *args: seen.append(args) or update(*args))
    base = rldt_furniture.load_policy(fake_run[0] / "base_policy.pt", "cpu")
    before, evaluated, evaluate = copied(base), [], rldt_furniture.evaluate
    monkeypatch.setattr(rldt_furniture, "evaluate", lambda policy, *rest: evaluated.append(policy) or evaluate(policy, *rest))
    for extra, lr in ("", 1e-3), ("--actor-lr 0.01 --kernel delta --actor-ema 0.5", 0.01):
        seen.clear()
        actor_probe_furniture.main(actor_probe_furniture.Args(fake_run[0], extra, steps=18, episodes=2, out=tmp_path / "probe.csv"))
        policy, reference, critic, optimizer, obs, obs_q, config = seen[-1]
        assert len(seen) == 18 and optimizer.param_groups[0]["lr"] == lr and config.kernel == ("delta" if "delta" in extra else "rbf")
        assert bool(changed(evaluated[-1], copied(policy))) == ("ema" in extra) and changed(evaluated[-1], before)
        assert not changed(reference, before) and changed(policy, before)
        assert not changed(critic, checkpoint(fake_run[0])["critic"])
        assert obs.shape == (4, 44) and obs_q.shape == (4, 45)
    rows = list(csv.DictReader((tmp_path / "probe.csv").open()))
    assert [row["extra"] for row in rows] == ["", "--actor-lr 0.01 --kernel delta --actor-ema 0.5"]
    assert rows[0]["steps"] == "18" and 0 <= float(rows[1]["stages_zero"]) <= 2
    assert float(rows[0]["constraint"]) < float(rows[1]["constraint"])  # it has gone further
    with pytest.raises(SystemExit, match="not a run directory"):
        actor_probe_furniture.main(actor_probe_furniture.Args(tmp_path))


def test_decision_probe_measures_every_input_on_the_rollouts_of_the_base_policy(copied_run, tmp_path):
    replay = torch.load(copied_run / "replay0.pt", weights_only=True)
    replay["reached"][:, 0] = 0  # so that there are failures beside successes
    for k in range(6):
        torch.save(replay, copied_run / f"replay{k}.pt")
    stored, saved = json.loads((copied_run / "args.json").read_text()), checkpoint(copied_run)
    def probe(**changes):
        (copied_run / "args.json").write_text(json.dumps(stored | changes))
        torch.save(saved | {"added": 6}, copied_run / "checkpoint.pt")
        decision_probe_furniture.main(decision_probe_furniture.Args(copied_run, bounds=(0, 1, 2), steps=5, networks=1, out=tmp_path / "probe.csv"))

    with pytest.raises(SystemExit, match="has 3 rollouts of the frozen base policy, 4 are needed"):
        probe(warmup_iterations=3, buffer_iterations=6)
    with pytest.raises(SystemExit, match="its first rollouts were overwritten"):
        probe(warmup_iterations=6, buffer_iterations=5)
    probe(warmup_iterations=6, buffer_iterations=6)
    rows = list(csv.DictReader((tmp_path / "probe.csv").open()))
    start = decision_probe_furniture.read_rows(copied_run, 6)
    start = {name: value[start["chunk"] == 0] for name, value in start.items()}
    assert [row["sees"] for row in rows if row["first_chunk"] == "0"] == [
        "state", "state, action", "next state", "state, relative", "state, action, relative", "next state, relative"]  # fmt: skip
    first = rows[0]
    assert int(first["episodes"]) == len(start["chunk"]) == 3 * int(first["rows"])  # 2 of 6 rollouts are held out
    assert float(first["success"]) == pytest.approx(start["success"].mean().item()) and 0 <= float(first["auc"]) <= 1
