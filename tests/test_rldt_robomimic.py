import contextlib
import copy
import csv
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import sys
import types
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import WALL_COLUMNS, check_resumed_run_keeps_its_base
from hypothesis import given
from hypothesis import strategies as st
from pickle_bomb import LOADED, Bomb
from safetensors import safe_open
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pretrain_fm
import rldt_robomimic
from common.flow import VelocityMLP, expected_target, sample
from common.svgd import particle_gradient, transport_field
from demos import make_robomimic_demos
from rldt_robomimic import (
    Critic,
    Encoder,
    FlowPolicy,
    Replay,
    SpatialEmbedding,
    ViT,
    actor_losses,
    collect,
    critic_target,
    evaluate,
    random_shift,
    rate,
    td_lambda,
    update_actor,
    update_critic,
)


def arguments(**changes):
    """Arguments of the functions below main()."""
    return rldt_robomimic.Args(**dict(device="cpu", bf16=False, shift=0, chunk=2, euler_steps=4, horizon=20, bc_head_steps=0) | changes)


def small_policy(cameras=0, state_dim=4, action_dim=2, chunk=2, euler_steps=4):
    return FlowPolicy(state_dim, action_dim, cameras, chunk, euler_steps, width=16, depth=3, time_dim=8)


def small_critic(policy, own=False):
    encoder = Encoder(policy.config["cameras"], policy.config["state_dim"]) if own else None
    return Critic(policy.cond_dim, policy.action_size, 16, 2, True, "default", encoder)


def observations(n, cameras=0, state_dim=4):
    obs = {"state": torch.randn(n, state_dim)}
    if cameras:
        obs["rgb"] = torch.randint(256, (n, 3 * cameras, 96, 96), dtype=torch.uint8)
    return obs


def copied(module):
    return copy.deepcopy(module.state_dict())


def changed(module, before):
    """Names of the parameters that differ from `before`."""
    return {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}


class FakeEnvs:
    """Scripted episodes in place of simulators, with the interface of RobomimicVectorEnv.

    An episode lasts length(seed) chunks and is solved in chunk t where solves(seed, t, chunk) says so, from the actions.
    A step that ends an episode takes one environment step, any other as many as the chunk has.
    """

    def __init__(self, num_envs, length, solves, images=False, stop_on_success=True, chunk=2, action_dim=2, state_dim=4):
        self.num_envs, self.length, self.solves, self.images, self.stop_on_success = num_envs, length, solves, images, stop_on_success
        self.chunk, self.action_dim, self.state_dim, self.horizon = chunk, action_dim, state_dim, 20
        spaces = {"state": gym.spaces.Box(-np.inf, np.inf, (state_dim,), np.float32)}
        if images:
            spaces["rgb"] = gym.spaces.Box(0, 255, (3, 96, 96), np.uint8)
        self.observation_space = gym.spaces.Dict(spaces)
        self.seed, self.t, self.over = np.zeros(num_envs, int), np.zeros(num_envs, int), np.ones(num_envs, bool)
        self.solved = np.zeros(num_envs, bool)
        self.seeds, self.executed, self.active, self.closed = [], [], [], False
        self.steps, self.valid = Counter(), Counter()  # by seed: environment steps, and chunks until success or the end

    def observation(self, seed, t):
        """What is seen in chunk t of the episode of a seed: its last five digits, t, and noise of its own."""
        rng = np.random.default_rng([seed, t])
        obs = {"state": np.r_[seed % 100_000 / 100_000, t / 10, rng.normal(size=self.state_dim - 2)].astype(np.float32)}
        if self.images:
            obs["rgb"] = rng.integers(256, size=(3, 96, 96), dtype=np.uint8)
        return obs

    def observe(self):
        each = [self.observation(seed, t) for seed, t in zip(self.seed, self.t, strict=True)]
        return {name: np.stack([obs[name] for obs in each]) for name in each[0]}

    def reset(self, seeds, mask):
        assert len(seeds) == self.num_envs
        assert mask.any()
        for i in np.flatnonzero(mask):
            self.seeds.append(seeds[i])
            self.seed[i], self.t[i], self.over[i], self.solved[i] = seeds[i], 0, False, False
        return self.observe()

    def step(self, chunks, active):
        assert chunks.shape == (self.num_envs, self.chunk, self.action_dim)
        assert not (active & self.over).any()  # what has ended is not stepped
        self.executed.append(chunks.copy()), self.active.append(active.copy())
        reward, steps = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        terminated, truncated, success = np.zeros((3, self.num_envs), bool)
        for i in np.flatnonzero(active):
            seed, t = self.seed[i], self.t[i]
            success[i] = self.solves(seed, t, chunks[i])
            reward[i], terminated[i] = success[i], success[i] and self.stop_on_success
            truncated[i] = t + 1 == self.length(seed) and not terminated[i]
            self.over[i] = terminated[i] or truncated[i]
            self.t[i] += 1
            steps[i] = 1 if self.over[i] else self.chunk
            self.steps[seed] += steps[i]
            self.valid[seed] += not self.solved[i]
            self.solved[i] |= success[i]
        return self.observe(), reward, terminated, truncated, success, steps

    def close(self):
        self.closed = True


# -------------------------------------------------------------------------------- TD(lambda)
@st.composite
def segments(draw):
    """Rewards, ends and next values (T, L) of segments, gamma and lambda; an end is a success, a termination or a truncation."""
    T, L = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    value = 0.5 + torch.randn(T, L, dtype=torch.float64, generator=generator)  # some outside [0, 1]
    end = torch.tensor(draw(st.lists(st.sampled_from([0, 0, 0, 1, 2, 3]), min_size=T * L, max_size=T * L))).view(T, L)
    ends = [flag.double() for flag in (end == 1, (end == 1) | (end == 2), end == 3)]
    return *ends, value, draw(st.floats(0, 1)), draw(st.floats(0, 1))


def recursive(t, r, terminated, truncated, value, gamma, lam):
    """y_t as it is defined, for one segment of plain numbers."""
    if terminated[t]:
        y = r[t]
    elif truncated[t] or t == len(r) - 1:
        y = r[t] + gamma * value[t]
    else:
        y = r[t] + gamma * ((1 - lam) * value[t] + lam * recursive(t + 1, r, terminated, truncated, value, gamma, lam))
    return min(max(y, 0.0), 1.0)


@given(segments())
def test_td_lambda_equals_its_recursive_definition(segment):
    *arrays, gamma, lam = segment
    y = td_lambda(*arrays, gamma, lam)
    for column in range(y.shape[1]):
        one = [x[:, column].tolist() for x in arrays]
        expected = [recursive(t, *one, gamma, lam) for t in range(len(y))]
        assert y[:, column].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("value", [-1e6, 0.3, 1e6])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_target_of_success_is_one_whatever_the_values_are(value, lam):
    reward = terminated = torch.tensor([[0.0], [1.0], [0.0]])
    y = td_lambda(reward, terminated, torch.zeros(3, 1), torch.full((3, 1), value), 0.9, lam)
    assert y[1].item() == 1
    assert 0 <= y.min()
    assert y.max() <= 1
    if value == 0.3:
        assert y[0].item() == pytest.approx(0.9 * ((1 - lam) * 0.3 + lam))


def test_truncation_bootstraps_and_termination_without_success_is_worth_nothing():
    zero, first, value = torch.zeros(2, 1), torch.tensor([[1.0], [0.0]]), torch.tensor([[0.4], [0.8]])
    assert td_lambda(zero, zero, first, value, 0.5, 0.5)[0].item() == pytest.approx(0.5 * 0.4)
    assert td_lambda(zero, first, zero, value, 0.5, 0.5)[0].item() == 0


# ------------------------------------------------------------------------------------ networks
@pytest.mark.parametrize("depth", [1, 2])
def test_vit_gives_121_patches(depth):
    features = ViT(dim=32, heads=4, depth=depth)(torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8))
    assert features.shape == (2, 121, 32)


def test_spatial_embedding_weights_the_channels_of_projected_maps():
    embedding = SpatialEmbedding(patches=5, dim=3, state_dim=2, out=4).double()
    x, state = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    linear, norm, _ = embedding.project
    for b in range(2):
        expected = torch.zeros(4, dtype=torch.float64)
        for channel in range(3):
            projected = linear.weight @ torch.cat([x[b, :, channel], state[b]]) + linear.bias
            normed = (projected - projected.mean()) / (projected.var(correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
            expected += embedding.weight[channel] * normed.clamp_min(0)
        torch.testing.assert_close(embedding(x, state)[b], expected)


def test_patches_are_two_convolutions_of_the_scaled_image_and_a_position_each():
    vit = ViT(dim=8, heads=2).double()
    vit.transformer = torch.nn.Identity()
    rgb = torch.randint(256, (1, 3, 96, 96), dtype=torch.uint8)
    first, _, second = vit.patches.double()
    x = F.conv2d(rgb.double() / 255 - 0.5, first.weight, first.bias, stride=4).clamp_min(0)
    x = F.conv2d(x, second.weight, second.bias, stride=2)
    vit.float()  # images are scaled in single precision
    expected = torch.stack([x[0, :, i // 11, i % 11] for i in range(121)]).float() + vit.position
    torch.testing.assert_close(vit(rgb)[0], expected, rtol=1e-4, atol=1e-5)


def test_vit_layer_is_pre_norm_attention_and_a_gelu_mlp():
    vit = ViT(dim=16, heads=4, depth=1).double()
    (layer,) = vit.transformer.layers
    for parameter in vit.transformer.parameters():  # norms are ones and biases zero as they are made
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 9, 16, dtype=torch.float64)

    def norm(x, parameters):
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return scaled * parameters.weight + parameters.bias

    attention = layer.self_attn
    y = norm(x, layer.norm1) @ attention.in_proj_weight.T + attention.in_proj_bias
    query, key, value = (part.view(2, 9, 4, 4).transpose(1, 2) for part in y.split(16, -1))  # (B, heads, patches, 4)
    weights = (query @ key.transpose(2, 3) / math.sqrt(4)).softmax(-1)
    mixed = (weights @ value).transpose(1, 2).reshape(2, 9, 16)
    x1 = x + mixed @ attention.out_proj.weight.T + attention.out_proj.bias
    hidden = norm(x1, layer.norm2) @ layer.linear1.weight.T + layer.linear1.bias
    assert hidden.shape[-1] == 64
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    x2 = x1 + gelu @ layer.linear2.weight.T + layer.linear2.bias
    torch.testing.assert_close(vit.transformer(x), norm(x2, vit.transformer.norm))


@pytest.mark.parametrize("cameras", [1, 2])
def test_encoder_sees_every_camera_and_proprioception(cameras):
    encoder, obs = Encoder(cameras, state_dim=4), observations(2, cameras)
    features = encoder(obs)
    assert features.shape == (2, 128 * cameras + 4)
    assert torch.equal(features[:, -4:], obs["state"])
    for camera in range(cameras):
        darker = obs["rgb"].clone()
        darker[:, 3 * camera : 3 * camera + 3] //= 2
        difference = (encoder(obs | {"rgb": darker}) - features).abs().view(2, -1)
        touched = [difference[:, 128 * i : 128 * (i + 1)].max() > 0 for i in range(cameras)]
        assert touched == [i == camera for i in range(cameras)]
    moved = encoder(obs | {"state": obs["state"] + 1})
    assert ((moved - features)[:, : 128 * cameras].abs().amax(1) > 1e-3).all()


def test_gradient_reaches_every_parameter_of_the_encoder():
    encoder = Encoder(2, state_dim=4)
    encoder(observations(3, 2)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_policy_scales_observations_and_actions_by_the_demonstrations():
    policy = FlowPolicy(2, 2, 1, chunk=3, euler_steps=4, width=8, depth=3, time_dim=4)
    policy.obs_min.copy_(torch.tensor([-2.0, 0.0])), policy.obs_max.copy_(torch.tensor([4.0, 10.0]))
    policy.action_min.copy_(torch.tensor([-0.5, -1.0])), policy.action_max.copy_(torch.tensor([0.5, 3.0]))
    raw = {"state": np.array([[-2, 0], [4, 10], [1, 5]], np.float32), "rgb": np.full((3, 3, 96, 96), 7, np.uint8)}
    kept = raw["state"].copy()
    obs = policy.observe(raw)
    torch.testing.assert_close(obs["state"], torch.tensor([[-1.0, -1], [1, 1], [0, 0]]), atol=1e-6, rtol=0)
    assert obs["rgb"].dtype == torch.uint8
    np.testing.assert_array_equal(raw["state"], kept)
    action = torch.tensor([[-1.0, -1, 1, 1, 0, 0]])  # three actions of two dimensions, one after the other
    np.testing.assert_allclose(policy.to_env(action), [[[-0.5, -1], [0.5, 3], [0, 1]]], atol=2e-6)


# --------------------------------------------------------------------------------- augmentation
def brute_force_shift(image, dy, dx):
    """(C, H, W) whose pixel (y, x) is that at (y + dy, x + dx), or the nearest one on the border."""
    result, (_, H, W) = torch.empty_like(image), image.shape
    for y in range(H):
        for x in range(W):
            result[:, y, x] = image[:, min(max(y + dy, 0), H - 1), min(max(x + dx, 0), W - 1)]
    return result


def test_random_shift_moves_each_image_by_its_own_shift_and_repeats_its_border():
    B, C, H, W, pixels = 60, 2, 7, 9, 2
    rgb = torch.arange(B * C * H * W).view(B, C, H, W)  # every pixel is known by its value
    out, found = random_shift(rgb, pixels), []
    shifts = list(itertools.product(range(-pixels, pixels + 1), repeat=2))
    for image, shifted in zip(rgb, out, strict=True):
        matching = [shift for shift in shifts if torch.equal(brute_force_shift(image, *shift), shifted)]
        assert len(matching) == 1
        found += matching
    assert len(set(found)) > 15  # of 25, in 60 images
    for axis in range(2):
        assert {shift[axis] for shift in found} == {-2, -1, 0, 1, 2}
    assert any(dy != dx for dy, dx in found)


def test_random_shift_by_zero_pixels_is_the_identity():
    rgb = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(random_shift(rgb, 0), rgb)


def test_cameras_of_a_state_are_shifted_alike():
    view = torch.arange(6 * 96 * 96).view(6, 1, 96, 96).expand(-1, 3, -1, -1)
    out = random_shift(torch.cat([view, view], 1), 4)
    assert torch.equal(out[:, :3], out[:, 3:])
    assert not torch.equal(out[:, :3], view)


@pytest.mark.parametrize("shift", [0, 4])
def test_augment_shifts_images_and_leaves_states_and_its_input(shift):
    obs = observations(4, 1)
    before, state = obs["rgb"].clone(), observations(3)
    new = rldt_robomimic.augment(obs, arguments(shift=shift))
    assert new["state"] is obs["state"]
    assert new["rgb"].dtype == torch.uint8
    assert torch.equal(new["rgb"], before) == (shift == 0)
    assert torch.equal(obs["rgb"], before)
    assert rldt_robomimic.augment(state, arguments(shift=shift)) == state


# --------------------------------------------------------------------------------- critic's updates
def random_batch(T=3, L=2, **kwargs):
    obs = observations((T + 1) * L, **kwargs)
    batch = {name: value.view(T + 1, L, *value.shape[1:]) for name, value in obs.items()}
    flags = torch.zeros(T, L)
    batch |= {"reward": flags.clone(), "terminated": flags.clone(), "truncated": flags.clone()}
    batch["reward"][1, 0] = batch["terminated"][1, 0] = batch["truncated"][0, 1] = 1
    return batch


@pytest.mark.parametrize("mode", ["state", "shared", "own"])
def test_critic_target_averages_the_smaller_value_of_the_target_networks_over_policy_actions(mode):
    args = arguments(value_samples=3, td_lambda=0.4, gamma=0.9)
    policy = small_policy(cameras=mode != "state")
    target = small_critic(policy, own=mode == "own")
    target.biases[-1].data.fill_(0.5)  # values inside [0, 1]
    T, L = (3, 2) if mode == "state" else (2, 2)
    batch = random_batch(T, L, cameras=mode != "state")
    torch.manual_seed(1)
    y = critic_target(policy, target, batch, args)
    torch.manual_seed(1)
    noise, values = torch.randn(3 * T * L, policy.action_size).view(3, T, L, -1), []
    for n in range(3):
        value = torch.empty(T, L)
        for t, column in itertools.product(range(T), range(L)):
            following = {name: batch[name][t + 1, column][None] for name in ("state", "rgb") if name in batch}
            cond = policy.encode(following)
            action = policy.sample(cond, noise[n, t, column][None])
            first, second = target(target.encoder(following) if mode == "own" else cond, action)
            value[t, column] = min(first.item(), second.item())
        values.append(value)
    assert len({v[0, 0].item() for v in values}) == 3
    expected = td_lambda(batch["reward"], batch["terminated"], batch["truncated"], torch.stack(values).mean(0), 0.9, 0.4)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert y[1, 0].item() == 1
    assert not y.requires_grad


def test_critic_target_takes_another_lambda():
    args, policy, batch = arguments(td_lambda=0.1), small_policy(), random_batch()
    target = small_critic(policy)
    target.biases[-1].data.fill_(0.4)  # values inside [0, 1], so that no clipping hides lambda
    results = []
    for lam in (None, 0.1, 0.9):
        torch.manual_seed(1)
        results.append(critic_target(policy, target, batch, args, lam))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@pytest.mark.parametrize("function", ["critic_target", "update_critic", "update_actor"])
def test_images_are_augmented_in_every_update(monkeypatch, function):
    shifted = []
    monkeypatch.setattr(rldt_robomimic, "random_shift", lambda rgb, pixels: shifted.append((len(rgb), pixels)) or rgb)
    updates(function, arguments(shift=3, n_particles=2), "own")
    assert shifted == [({"critic_target": 6, "update_critic": 5, "update_actor": 4}[function], 3)]


def updates(function, args, mode, policy=None, critic=None):
    """Runs one update function on random images: 6 states of critic_target, 5 of update_critic, 4 of update_actor."""
    policy = policy or small_policy(cameras=1)
    critic = critic or small_critic(policy, own=mode == "own")
    target = copy.deepcopy(critic).requires_grad_(False)
    if function == "critic_target":
        critic_target(policy, target, random_batch(3, 2, cameras=1), args)
    elif function == "update_critic":
        optimizer = torch.optim.SGD(critic.parameters(), 0.1)
        update_critic(critic, target, policy, optimizer, observations(5, 1), torch.randn(5, policy.action_size), torch.rand(5), args)
    else:
        reference = copy.deepcopy(policy).requires_grad_(False)
        update_actor(policy, reference, critic, torch.optim.SGD(policy.parameters(), 0.1), observations(4, 1), args)


@pytest.mark.parametrize("mode, encoders", [("own", {"critic_target": 2, "update_critic": 1, "update_actor": 3}),
                                            ("shared", {"critic_target": 1, "update_critic": 1, "update_actor": 2})])  # fmt: skip
@pytest.mark.parametrize("n_particles, euler_steps, value_samples", [(4, 8, 3), (1, 2, 1)])
def test_a_state_is_encoded_once_per_update_and_encoder(monkeypatch, mode, encoders, n_particles, euler_steps, value_samples):
    encode, images = Encoder.forward, Counter()

    def counted(self, obs):
        images[id(self)] += len(obs["rgb"])
        return encode(self, obs)

    monkeypatch.setattr(Encoder, "forward", counted)
    args = arguments(n_particles=n_particles, euler_steps=euler_steps, value_samples=value_samples)
    policy = small_policy(cameras=1, euler_steps=euler_steps)
    for function, states in ("critic_target", 6), ("update_critic", 5), ("update_actor", 4):
        images.clear()
        updates(function, args, mode, policy)
        assert list(images.values()) == [states] * encoders[function]


def test_shared_encoder_gets_no_gradient_from_the_critic_and_one_from_the_actor():
    policy = small_policy(cameras=1)
    before = copied(policy)
    updates("update_critic", arguments(), "shared", policy)
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert changed(policy, before) == set()
    updates("update_actor", arguments(n_particles=2), "shared", policy)
    assert changed(policy, before) == {name for name, _ in policy.named_parameters()}


def test_own_encoder_is_trained_by_the_critic_only():
    policy = small_policy(cameras=1)
    critic = small_critic(policy, own=True)
    before, actor = copied(critic), copied(policy)
    updates("update_critic", arguments(), "own", policy, critic)
    assert changed(critic, before) == {name for name, _ in critic.named_parameters()}
    assert changed(policy, actor) == set()
    before = copied(critic)
    updates("update_actor", arguments(n_particles=2), "own", policy, critic)
    assert changed(critic, before) == set()


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("own", [False, True])
def test_update_critic_descends_the_squared_error_of_both_networks_and_moves_the_target(own, momentum):
    policy = small_policy(cameras=int(own))
    critic, args = small_critic(policy, own), arguments(target_momentum=momentum)
    target = copy.deepcopy(critic).requires_grad_(False)
    for parameter in target.parameters():
        parameter.add_(1.0)
    obs, action, y, old_target = observations(3, int(own)), torch.randn(3, 4), torch.rand(3), copied(target)
    q = critic(critic.encode(obs, policy), action)
    loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
    gradient = torch.autograd.grad(loss, list(critic.parameters()))
    expected = [p.detach() - 0.1 * g for p, g in zip(critic.parameters(), gradient, strict=True)]
    metrics = update_critic(critic, target, policy, torch.optim.SGD(critic.parameters(), 0.1), obs, action, y, args)
    torch.testing.assert_close([p.detach() for p in critic.parameters()], expected, rtol=1e-4, atol=1e-5)
    for key, new in critic.state_dict().items():
        torch.testing.assert_close(target.state_dict()[key], momentum * old_target[key] + (1 - momentum) * new)
    assert metrics["losses/critic"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["diagnostics/q"].item() == pytest.approx(q.mean().item(), rel=1e-5)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_batched_critics_equal_two_networks_with_the_same_weights(layer_norm):
    critic = Critic(5, 3, 16, 2, layer_norm, "default")
    cond, action = torch.randn(7, 5), torch.randn(7, 3)
    q = critic(cond, action)
    assert q.shape == (2, 7)
    for member in range(2):
        x = torch.cat([cond, action], 1)
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


# ----------------------------------------------------------------------------------- actor's updates
K, B, P, D = 4, 3, 5, 2


class QuadraticCritic:
    """Q = -0.75 |a - 1|^2 from both networks."""

    def __call__(self, cond, action):
        return -0.75 * (action - 1).square().sum(-1).expand(2, -1)


def losses(seed=0, critic=None, **changes):
    """Networks, the three losses and what they were computed from, in double precision."""
    torch.manual_seed(seed)
    velocity, reference = (VelocityMLP(D, 3, 16, 3, 8).double() for _ in range(2))
    conds = torch.randn(3, B, 3, dtype=torch.float64)  # of the actor, the reference and the critic
    start = torch.randn(B, P, D, dtype=torch.float64)
    trajectory = sample(velocity, conds[0][:, None].expand(-1, P, -1), start, K, trajectory=True)
    args = arguments(**dict(euler_steps=K, alpha=0.3, transport_scale=1.0, transport_loss="literal") | changes)
    k = torch.randint(K, (B, P))
    result = actor_losses(velocity, reference, critic or QuadraticCritic(), *conds, trajectory, args, k)
    x = trajectory[k, torch.arange(B)[:, None], torch.arange(P)]
    return velocity, reference, conds, trajectory, x, k / K, args, result


def field(velocity, conds, trajectory, x, t, args, scale=1.0):
    query = expected_target(x, t, velocity(x, t, conds[0][:, None].expand(-1, P, -1))).detach()
    particles = query if args.kernel == "delta" else trajectory[-1]
    return transport_field(query, particles, scale * 1.5 * (1 - particles), args.alpha, args.kernel)


def gradients(velocity, scalar):
    return torch.autograd.grad(scalar, list(velocity.parameters()), retain_graph=True)


@pytest.mark.parametrize("kernel", ["rbf", "delta"])
@pytest.mark.parametrize("form", ["literal", "authors"])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_gradient_of_the_transport_loss_is_the_field_times_the_jacobian(kernel, form, scale):
    velocity, _, conds, trajectory, x, t, args, (transport, *_) = losses(kernel=kernel, transport_loss=form, transport_scale=scale)
    phi = field(velocity, conds, trajectory, x, t, args, scale)
    weight = -2 / K * (1 - t) if form == "literal" else -1 / (K * (1 - t))
    v = velocity(x, t, conds[0][:, None].expand(-1, P, -1))
    expected = torch.autograd.grad(v, list(velocity.parameters()), weight[..., None] * phi / (B * P))
    torch.testing.assert_close(gradients(velocity, transport), expected)


@pytest.mark.parametrize("kernel", ["rbf", "delta"])
def test_transport_loss_can_take_the_gradient_from_the_particles(kernel):
    velocity, _, conds, trajectory, x, t, args, (transport, *_) = losses(kernel=kernel, transport_scale=3.0, q_gradient="particles")
    v = velocity(x, t, conds[0][:, None].expand(-1, P, -1))
    query = expected_target(x, t, v).detach()
    particles = query if kernel == "delta" else trajectory[-1]
    q = -0.75 * (particles - 1).square().sum(-1)
    phi = transport_field(query, particles, 3 * particle_gradient(q, particles), args.alpha, kernel)
    expected = torch.autograd.grad(v, list(velocity.parameters()), (-2 / K * (1 - t))[..., None] * phi / (B * P))
    torch.testing.assert_close(gradients(velocity, transport), expected)


@pytest.mark.parametrize("argv, steps", [("--task square", 2), ("--task transport", 0), ("--task transport --exploration-steps 1", 1), ("--task transport --preset paper", 2)])
def test_transport_explores_by_the_policys_own_noise(argv, steps):
    assert rldt_robomimic.resolve(rldt_robomimic.parse_args(argv.split())).exploration_steps == steps


def test_gradient_of_the_particles_needs_two_of_them():
    assert rldt_robomimic.resolve(rldt_robomimic.parse_args(["--q-gradient", "particles", "--n-particles", "2"])).n_particles == 2
    with pytest.raises(SystemExit, match="--q-gradient particles needs --n-particles"):
        rldt_robomimic.resolve(rldt_robomimic.parse_args(["--q-gradient", "particles", "--n-particles", "1"]))


def test_transport_scale_multiplies_the_gradient_of_q_and_not_the_other_losses():
    one, ten = (losses(kernel="delta", transport_scale=scale)[-1] for scale in (1.0, 10.0))
    torch.testing.assert_close(ten[0], 100 * one[0])
    torch.testing.assert_close(ten[1:3], one[1:3])
    for name in ("phi_norm", "grad_q_norm"):
        torch.testing.assert_close(ten[3][f"diagnostics/{name}"], 10 * one[3][f"diagnostics/{name}"])
    torch.testing.assert_close(ten[3]["diagnostics/q_policy"], one[3]["diagnostics/q_policy"])


def test_consistency_loss_has_the_value_and_gradient_of_eq_14():
    velocity, _, conds, trajectory, x, t, _, (_, consistency, *_) = losses()
    a_dagger = x + (1 - t)[..., None] * velocity(x, t, conds[0][:, None].expand(-1, P, -1))
    expected = ((a_dagger - trajectory[-1]).square().sum(-1) / (K * (1 - t)).square()).mean()
    torch.testing.assert_close(consistency, expected)
    torch.testing.assert_close(gradients(velocity, consistency), gradients(velocity, expected))


def test_constraint_loss_is_the_squared_distance_of_the_velocities_at_one_point():
    fast = lambda x, t, cond: 3 * x + cond.mean()
    slow = lambda x, t, cond: 3 * x - 1 + cond.mean()
    trajectory, conds = torch.randn(K + 1, B, P, D), torch.full((3, B, 3), 0.5)
    result = actor_losses(fast, slow, QuadraticCritic(), *conds, trajectory, arguments(euler_steps=K))
    assert result[2].item() == pytest.approx(D, rel=1e-4)


@pytest.mark.parametrize("zero_fraction", [0.0, 1.0])
def test_constraint_is_taken_between_the_actions_and_the_noise_that_particles_start_from(zero_fraction):
    seen = {}

    def reference(x, t, cond):
        seen.update(x=x, t=t)
        return x

    trajectory, conds = torch.randn(K + 1, B, P, D), torch.zeros(3, B, 3)
    args = arguments(euler_steps=K, zero_fraction=zero_fraction)
    actor_losses(lambda x, t, cond: x, reference, QuadraticCritic(), *conds, trajectory, args)
    x0 = seen["x"] - seen["t"][..., None] * trajectory[-1]  # (1 - t) x_0
    assert (x0.abs() < 1e-5).all() == (zero_fraction == 1)
    if zero_fraction == 0:
        assert (x0.abs() > 1e-5).any(-1).all()


def test_actor_reference_and_critic_see_their_own_features():
    seen = {}

    def velocity(name):
        return lambda x, t, cond: seen.update({name: cond}) or x

    def critic(cond, action):
        seen["critic"] = cond
        return action.sum(-1).expand(2, -1)

    conds = torch.randn(3, B, 3)
    actor_losses(velocity("actor"), velocity("reference"), critic, *conds, torch.randn(K + 1, B, P, D), arguments(euler_steps=K))
    for i, name in enumerate(("actor", "reference", "critic")):
        each = seen[name].reshape(-1, B, P, 3)
        assert torch.equal(each, conds[i][:, None].expand(len(each), -1, P, -1))


@pytest.mark.parametrize("zero_fraction", [0.0, 0.5, 1.0])
def test_update_actor_steps_along_the_weighted_sum_of_the_losses_of_its_particles(monkeypatch, zero_fraction):
    policy, seen = small_policy(), []
    bias = policy.velocity.trunk[0].bias

    def fake_losses(velocity, reference, critic, cond, cond_ref, cond_q, trajectory, args):
        seen.append(trajectory)
        return bias.sum(), 10 * bias.sum(), 100 * bias.sum(), {"losses/transport": torch.zeros(())}

    monkeypatch.setattr(rldt_robomimic, "actor_losses", fake_losses)
    args = arguments(n_particles=6, zero_fraction=zero_fraction, consistency_weight=0.7, constraint_weight=0.2)
    before, obs = bias.detach().clone(), observations(50)
    metrics = update_actor(policy, copy.deepcopy(policy), small_critic(policy), torch.optim.SGD(policy.parameters(), 0.1), obs, args)
    torch.testing.assert_close(bias.detach(), before - 0.1 * (1 + 0.7 * 10 + 0.2 * 100))
    assert metrics["diagnostics/actor_grad_norm"].item() == pytest.approx(28 * 4)  # of 16 equal numbers
    (trajectory,) = seen
    assert trajectory.shape == (5, 50, 6, 4)
    assert not trajectory.requires_grad
    zero = (trajectory[0] == 0).all(-1).float()
    assert zero.mean().item() == pytest.approx(zero_fraction, abs=0.1)
    assert (zero.mean(1) > 0).float().mean().item() == pytest.approx(1 - (1 - zero_fraction) ** 6, abs=0.1)  # drawn per particle
    bias.data.copy_(before)
    with torch.no_grad():
        again = policy.sample(obs["state"][:, None].expand(-1, 6, -1), trajectory[0], trajectory=True)
    torch.testing.assert_close(trajectory, again)


# -------------------------------------------------------------------------------------- replay
CAPACITY, T, N = 3, 10, 4


def numbered(added, valid=None, succeeded=None):
    """A replay whose states and actions encode rollout, environment and time: 1000 rollout + 100 environment + time."""
    replay = Replay(arguments(buffer_iterations=CAPACITY, rollout_chunks=T, num_envs=N), {"state": torch.zeros(1, 2)}, 3)
    for rollout in range(added):
        slot = replay.rollout()
        code = 1000.0 * rollout + 100 * torch.arange(N) + torch.arange(T)[:, None]
        slot["state"].copy_(code[..., None].expand(-1, -1, 2)), slot["action"].copy_(code[..., None].expand(-1, -1, 3))
        slot["reward"].copy_(code)
        slot["valid"].copy_(torch.ones(T, N) if valid is None else valid)
        slot["succeeded"].copy_(torch.zeros(T, N) if succeeded is None else succeeded)
    return replay


@given(added=st.integers(1, 7), length=st.integers(1, T - 1), count=st.integers(1, 40), seed=st.integers(0, 1000), balanced=st.booleans())
def test_segments_are_consecutive_rows_of_one_environment_in_one_rollout_that_begin_validly(added, length, count, seed, balanced):
    torch.manual_seed(seed)
    valid, succeeded = (torch.rand(T, N) < 0.7).float(), (torch.rand(T, N) < 0.3).float()
    valid[0] = 1
    batch = numbered(added, valid, succeeded).draw(count, length, 0.3, balanced)
    assert batch["state"].shape == (length + 1, count, 2)
    assert batch["action"].shape == (length, count, 3)
    first = batch["state"][0, :, 0]
    codes = first + torch.arange(length + 1)[:, None]
    assert torch.equal(batch["state"], codes[..., None].expand(-1, -1, 2))
    assert torch.equal(batch["action"], codes[:-1, :, None].expand(-1, -1, 3))
    assert torch.equal(batch["reward"], codes[:-1])
    assert (first % 100 + length <= T - 1).all()  # the next state of the last step is a row too
    assert (batch["valid"][0] == 1).all()
    assert (first // 1000 >= max(0, added - CAPACITY)).all()
    time, column = (codes[:-1] % 100).long(), (first // 100 % 10).long().expand(length, -1)
    assert torch.equal(batch["valid"], valid[time, column])
    assert torch.equal(batch["succeeded"], succeeded[time, column])


@pytest.mark.parametrize("fraction", [0.0, 0.33, 1.0])
@pytest.mark.parametrize("count", [1, 7, 24])
def test_half_of_the_segments_begin_in_successful_episodes_where_there_are_both_kinds(fraction, count):
    succeeded = torch.zeros(T, N)
    succeeded[2:5, 1] = 1  # few of them
    begins = numbered(4, succeeded=succeeded).draw(count, 2, fraction, balanced=True)["succeeded"][0]
    assert begins.sum() == -(-count // 2)


@pytest.mark.parametrize("kind", [0.0, 1.0])
def test_all_segments_come_from_the_one_kind_of_episodes_that_there_is(kind):
    begins = numbered(2, succeeded=torch.full((T, N), kind)).draw(9, 2, 0.33, balanced=True)["succeeded"][0]
    assert (begins == kind).all()
    assert len(begins) == 9


def test_a_success_that_cannot_begin_a_segment_does_not_count():
    succeeded = torch.zeros(T, N)
    succeeded[8:] = 1  # two rows, and segments of three
    assert (numbered(1, succeeded=succeeded).draw(8, 3, 0.33, balanced=True)["succeeded"][0] == 0).all()


def test_unbalanced_segments_are_drawn_by_their_number():
    succeeded = torch.zeros(T, N)
    succeeded[:, 0] = 1
    begins = numbered(2, succeeded=succeeded).draw(4000, 2, 0.33, balanced=False)["succeeded"][0]
    assert begins.mean().item() == pytest.approx(1 / N, abs=0.04)


@given(added=st.integers(1, 7), count=st.integers(1, 60), fraction=st.floats(0, 1), balanced=st.booleans())
def test_at_least_the_fresh_fraction_comes_from_the_newest_rollout(added, count, fraction, balanced):
    succeeded = torch.zeros(T, N)
    succeeded[:5] = 1
    rollout = numbered(added, succeeded=succeeded).draw(count, 2, fraction, balanced)["state"][0, :, 0] // 1000
    assert (rollout == added - 1).sum() >= fraction * count - 1e-9


def test_every_kept_rollout_environment_and_start_is_drawn():
    first = numbered(5).draw(20_000, 3, 0.33, balanced=True)["state"][0, :, 0].long()
    assert set((first // 1000).tolist()) == {2, 3, 4}
    assert set((first // 100 % 10).tolist()) == set(range(N))
    assert set((first % 100).tolist()) == set(range(T - 3))


def test_fresh_segments_come_from_wherever_there_are_some():
    replay = numbered(2)
    replay.data["succeeded"][0] = 1  # successes in the old rollout only
    begins = replay.draw(10, 2, 1.0, balanced=True)
    assert begins["succeeded"][0].sum() == 5
    assert (begins["state"][0, :, 0] // 1000).tolist().count(1) == 5


def test_a_new_rollout_starts_without_what_its_slot_held():
    replay = numbered(CAPACITY, succeeded=torch.ones(T, N))
    slot = replay.rollout()
    assert replay.slot() == 0
    for name in ("reward", "terminated", "truncated", "valid", "succeeded"):
        assert (slot[name] == 0).all()
        assert (replay.data[name][0] == 0).all()
    assert (replay.data["valid"][1:] == 1).all()


IMAGE_ROW = {"state": torch.zeros(1, 9), "rgb": torch.zeros(1, 3, 96, 96, dtype=torch.uint8)}


def test_replay_keeps_images_as_bytes_within_its_bound(capsys):
    args = arguments(buffer_iterations=20, rollout_chunks=5, num_envs=2, replay_gib=0.001)
    replay = Replay(args, IMAGE_ROW, 28)
    assert replay.data["rgb"].dtype == torch.uint8
    used = sum(value.numel() * value.element_size() for value in replay.data.values())
    slots = len(replay.data["reward"])
    assert used <= 0.001 * 2**30 < used / slots * (slots + 1)
    assert capsys.readouterr().out == f"--replay-gib 0.001 keeps {slots} rollouts, not 20.\n"


def test_replay_within_its_bound_says_nothing(capsys):
    assert len(Replay(arguments(buffer_iterations=3, rollout_chunks=5, num_envs=2), IMAGE_ROW, 28).data["reward"]) == 3
    assert capsys.readouterr().out == ""


def test_rollout_larger_than_the_bound_stops_in_one_line():
    with pytest.raises(SystemExit, match=r"more than --replay-gib 0\.001: raise it") as stop:
        Replay(arguments(rollout_chunks=50, num_envs=4, replay_gib=0.001), IMAGE_ROW, 28)
    assert "\n" not in str(stop.value)


def test_replay_larger_than_the_free_memory_stops_in_one_line(monkeypatch):
    monkeypatch.setattr(rldt_robomimic.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=2**20))
    with pytest.raises(SystemExit, match=r"0\.0 GiB are free: lower --replay-gib") as stop:
        Replay(arguments(rollout_chunks=20, num_envs=2, buffer_iterations=2), IMAGE_ROW, 28)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(("num_envs", "fits"), [(2, True), (16, False)])
def test_simulators_larger_than_the_free_memory_stop_before_they_are_built(monkeypatch, num_envs, fits):
    monkeypatch.setattr(rldt_robomimic.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=4 * 2**30))
    args = arguments(rollout_chunks=20, num_envs=num_envs, buffer_iterations=2)
    with contextlib.nullcontext() if fits else pytest.raises(SystemExit, match=r"16 simulators about 8\.0, and 4\.0 GiB are free: lower --replay-gib or --num-envs"):
        Replay(args, IMAGE_ROW, 28)


def test_free_memory_is_that_of_the_container(monkeypatch):
    limit = 3 * 2**30 + int(rldt_robomimic.memory_gib() * 2**30)
    monkeypatch.setattr(rldt_robomimic.Path, "exists", lambda path: str(path).endswith("memory.max"))
    for text, expected in (f"{limit}\n", pytest.approx(3, abs=0.2)), ("max\n", rldt_robomimic.psutil.virtual_memory().available / 2**30):
        monkeypatch.setattr(rldt_robomimic.Path, "read_text", lambda path, text=text: text)
        assert rldt_robomimic.free_gib() == (expected if text.strip() != "max" else pytest.approx(expected, rel=0.2))


# ------------------------------------------------------------------------------------- rollouts
def rollout(envs, policy=None, slots=1, **changes):
    """Collects one rollout from fake environments; returns policy, slot, env steps and successes."""
    args = arguments(**dict(num_envs=envs.num_envs, buffer_iterations=slots, encoder="own", time_limit="bootstrap") | changes)
    policy = policy or small_policy(cameras=int(envs.images))
    replay = Replay(args, rldt_robomimic.observe(policy, envs.observe(), args), policy.action_size)
    for value in replay.data.values():
        value.fill_(77)  # as if left from an older rollout
    torch.manual_seed(2)
    steps, finished = collect(policy, envs, replay.rollout(), itertools.count(100), args)
    return policy, replay.newest(), steps, finished.tolist()


def scripted(num_envs, lengths, solved, **kwargs):
    """Episodes of seeds 100, 101, ... of `lengths` chunks that are solved in chunks `solved` (None: never) and all after them."""
    return FakeEnvs(num_envs, lambda seed: lengths[seed - 100], lambda seed, t, chunk: solved[seed - 100] is not None and t >= solved[seed - 100], **kwargs)


# Three environments, eight rows each. Episodes: 100 is solved in its second chunk, 101 does not end within the rollout,
# 102 runs into the time limit after three chunks. Then the first two to end begin 103 (time limit) and 104 (solved).
LENGTHS, SOLVED = [5, 20, 3, 3, 5, 5], [1, None, None, None, 2, 0]
ROWS = [[(100, 0), (100, 1), None, (103, 0), (103, 1), (103, 2), (103, 3), None],
        [(101, t) for t in range(8)],
        [(102, 0), (102, 1), (102, 2), (102, 3), (104, 0), (104, 1), (104, 2), None]]  # fmt: skip
VALID = [[1, 1, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1, 0]]
SUCCESS = [[0, 1, 0, 0, 0, 0, 0, 0], [0] * 8, [0, 0, 0, 0, 0, 0, 1, 0]]
LIMIT = [[0, 0, 0, 0, 0, 1, 0, 0], [0] * 8, [0, 0, 1, 0, 0, 0, 0, 0]]
CUT = [[0] * 8, [0, 0, 0, 0, 0, 0, 1, 0], [0] * 8]
SUCCEEDED = [[1, 1, 1, 0, 0, 0, 0, 0], [0] * 8, [0, 0, 0, 0, 1, 1, 1, 1]]


def table(*parts):
    """Sum of tables with a list per environment -> (rows, environments)."""
    return np.sum([np.array(part, float) for part in parts], 0).T.tolist()


@pytest.mark.parametrize("time_limit", ["bootstrap", "terminal"])
def test_rollout_of_scripted_episodes(time_limit):
    envs = scripted(3, LENGTHS, SOLVED)
    policy, slot, steps, finished = rollout(envs, rollout_chunks=8, time_limit=time_limit)
    assert envs.seeds == [100, 101, 102, 103, 104]
    assert slot["valid"].tolist() == table(VALID)
    assert slot["reward"].tolist() == table(SUCCESS)
    assert slot["terminated"].tolist() == (table(SUCCESS) if time_limit == "bootstrap" else table(SUCCESS, LIMIT))
    assert slot["truncated"].tolist() == (table(LIMIT, CUT) if time_limit == "bootstrap" else table(CUT))
    assert slot["succeeded"].tolist() == table(SUCCEEDED)
    for column, rows in enumerate(ROWS):
        for row, episode in enumerate(rows):
            if episode:  # None: what follows a success is never looked at
                expected = policy.observe({"state": envs.observation(*episode)["state"]})["state"]
                assert torch.equal(slot["state"][row, column], expected), (row, column)
    assert finished == [True, False, False, True]
    assert steps == sum(envs.steps.values()) == 2 * (2 + 7 + 3 + 3 + 3) - 4  # an episode's last step is one environment step


def test_rollout_stores_the_actions_that_were_executed():
    envs = scripted(3, LENGTHS, SOLVED)
    policy, slot, *_ = rollout(envs, rollout_chunks=8)
    row = np.zeros(3, int)
    for chunks, active in zip(envs.executed, envs.active, strict=True):
        for i in np.flatnonzero(active):
            while not slot["valid"][row[i], i]:
                row[i] += 1
            np.testing.assert_array_equal(chunks[i], policy.to_env(slot["action"][row[i], i][None])[0])
            row[i] += 1
    assert row.tolist() == [6, 7, 7]


def test_episodes_that_go_on_after_success_are_masked_there():
    # 100 is solved in chunk 1 of 4, 101 is never, 102 (after 100) is solved in its first chunk and still runs at the end
    envs = scripted(2, [4, 20, 9], [1, None, 0], stop_on_success=False)
    policy, slot, steps, finished = rollout(envs, rollout_chunks=9, stop_on_success=False)
    assert envs.seeds == [100, 101, 102]
    assert slot["valid"][:, 0].tolist() == [1, 1, 0, 0, 0, 1, 0, 0, 0]
    assert slot["reward"][:, 0].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert slot["terminated"][:, 0].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert slot["succeeded"][:, 0].tolist() == [1] * 9
    assert slot["truncated"][7, 0] == 0
    assert slot["truncated"][:, 1].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0]
    for row, episode in enumerate([(100, 0), (100, 1), (100, 2), (100, 3), (100, 4), (102, 0), (102, 1), (102, 2), (102, 3)]):
        assert torch.equal(slot["state"][row, 0], policy.observe({"state": envs.observation(*episode)["state"]})["state"])
    assert steps == 2 * (4 + 8 + 3) - 1
    assert finished[0] is True


def test_success_at_the_time_limit_is_a_success():
    envs = scripted(1, [2, 2, 2], [1, 1, 1], stop_on_success=False)
    _, slot, _, finished = rollout(envs, rollout_chunks=6, stop_on_success=False, time_limit="terminal")
    assert slot["reward"][:, 0].tolist() == slot["terminated"][:, 0].tolist() == [0, 1, 0, 0, 1, 0]
    assert slot["succeeded"][:, 0].tolist() == [1] * 6
    assert finished == [True, True]


@pytest.mark.parametrize("encoder", ["frozen", "shared", "own"])
def test_replay_holds_images_or_with_a_frozen_encoder_features(encoder):
    envs = scripted(2, [2, 9, 9], [None] * 3, images=True)
    policy, slot, *_ = rollout(envs, rollout_chunks=4, encoder=encoder)
    rows = [[(100, 0), (100, 1), (100, 2)], [(101, 0), (101, 1), (101, 2), (101, 3)]]
    assert ("rgb" in slot) == (encoder != "frozen")
    for column, episodes in enumerate(rows):
        for row, episode in enumerate(episodes):
            raw = envs.observation(*episode)
            obs = policy.observe({name: value[None] for name, value in raw.items()})
            if encoder == "frozen":
                torch.testing.assert_close(slot["state"][row, column], policy.encode(obs)[0].detach(), rtol=1e-3, atol=1e-4)
            else:
                assert torch.equal(slot["state"][row, column], obs["state"][0])
                assert torch.equal(slot["rgb"][row, column], obs["rgb"][0])
    if encoder != "frozen":
        assert slot["rgb"].dtype == torch.uint8


def test_frozen_encoder_sees_an_image_once(monkeypatch):
    envs, images, encode = scripted(2, [20, 20], [None, None], images=True), [], Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, obs: images.append(len(obs["rgb"])) or encode(self, obs))
    rollout(envs, rollout_chunks=5, encoder="frozen")
    assert sum(images[1:]) == 2 * 5  # the first is of the replay's making


def test_exploration_scale_is_a_factor_on_the_noise():
    policy, actions = None, []
    for scale in 0.0, 1.0, 0.5:
        policy, slot, *_ = rollout(scripted(4, [20] * 4, [None] * 4), policy, rollout_chunks=2, exploration_steps=4, exploration_scale=scale, zero_fraction=0.0)
        actions.append(slot["action"][0].clone())
    quiet, loud, half = actions
    assert (loud - quiet).abs().max() > 0.01
    torch.testing.assert_close(half - quiet, (loud - quiet) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exploration_steps, noisy", [(0, False), (1, False), (4, True)])
def test_exploration_adds_noise_only_from_steps_before_the_last(exploration_steps, noisy):
    envs = scripted(4, [20] * 4, [None] * 4)
    policy, slot, *_ = rollout(envs, rollout_chunks=3, exploration_steps=exploration_steps, zero_fraction=0.0)
    torch.manual_seed(2)
    with torch.no_grad():
        clean = policy.sample(slot["state"][0])
    assert torch.allclose(slot["action"][0], clean, atol=1e-5) != noisy


@pytest.mark.parametrize("fraction, count", [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_share_of_the_environments_acts_from_zero(fraction, count):
    envs = scripted(4, [20] * 4, [None] * 4)
    policy, slot, *_ = rollout(envs, rollout_chunks=7, exploration_steps=0, zero_fraction=fraction)
    with torch.no_grad():
        deterministic = policy.sample(slot["state"], torch.zeros(7, 4, 4))
    same = (slot["action"] - deterministic)[:-1].abs().amax((0, 2)) < 1e-5
    assert same.tolist() == [True] * count + [False] * (4 - count)


# ------------------------------------------------------------------------------------ evaluation
class Identity:
    """A policy whose actions are its x_0."""

    action_size = 4
    observe = staticmethod(lambda obs: obs)
    encode = staticmethod(lambda obs: obs["state"])
    sample = staticmethod(lambda cond, x0: x0)
    to_env = staticmethod(lambda action: action.view(len(action), 2, 2).numpy())


@pytest.mark.parametrize("num_envs", [1, 3, 4, 16])
@pytest.mark.parametrize("stop_on_success", [False, True])
def test_evaluation_runs_every_initial_state_once_from_zero_and_once_from_noise(num_envs, stop_on_success):
    starts = {}

    def solves(seed, t, chunk):
        zero = not chunk.any()
        starts.setdefault((seed, zero), []).append(t)
        return t == seed % 2 and seed % 3 == (0 if zero else 1)

    envs = FakeEnvs(num_envs, lambda seed: 2 + seed % 3, solves, stop_on_success=stop_on_success)
    scores = evaluate(Identity(), envs, arguments(), episodes=7, seed=50)
    assert scores["zero"].tolist() == [(50 + j) % 3 == 0 for j in range(7)]
    assert scores["noise"].tolist() == [(50 + j) % 3 == 1 for j in range(7)]
    assert Counter(envs.seeds[:14] if num_envs == 16 else envs.seeds) == {50 + j: 2 for j in range(7)}
    for (seed, zero), times in starts.items():  # from start to end, success or time limit, from x_0 of one kind
        solved = seed % 3 == (0 if zero else 1)
        assert times == list(range(1 + seed % 2 if solved else 2 + seed % 3))


def test_evaluation_draws_its_own_noise():
    seen = []
    envs = FakeEnvs(2, lambda seed: 3, lambda seed, t, chunk: seen.append(chunk) or False)
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


# -------------------------------------------------------------------------------- base policies
@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Files of small random policies of Lift: {obs: path}."""
    paths = {}
    for obs, (state_dim, cameras) in {"state": (19, 0), "image": (9, 1)}.items():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            policy = small_policy(cameras, state_dim, action_dim=7, chunk=4)
        paths[obs] = tmp_path_factory.mktemp("base") / f"{obs}.safetensors"
        rldt_robomimic.save_base(policy, paths[obs], task="lift")
    return paths


def base_args(obs="state", **changes):
    return arguments(**dict(task="lift", obs=obs, chunk=4, actor_width=16, time_dim=8) | changes)


@pytest.mark.parametrize("obs", ["state", "image"])
def test_base_policy_round_trip_in_half_precision(tmp_path, obs):
    policy = small_policy(int(obs == "image"), 9 if obs == "image" else 19, 7, chunk=4)
    policy.obs_min.uniform_(-3, -2), policy.action_max.uniform_(2, 3)
    path = tmp_path / "deeper" / "b.safetensors"
    rldt_robomimic.save_base(policy, path, task="lift")
    loaded = rldt_robomimic.load_base(path, base_args(obs))
    assert loaded.config == policy.config
    for key, value in policy.state_dict().items():
        new = loaded.state_dict()[key]
        assert new.dtype == torch.float32
        assert torch.equal(new, value if key in FlowPolicy.SCALING else value.half().float()), key
        torch.testing.assert_close(new, value, rtol=1e-3, atol=1e-6)
    weights = sum(value.numel() for value in policy.state_dict().values())
    assert path.stat().st_size < 2 * weights + 10_000


@pytest.mark.parametrize("changes", [
    dict(task="square"), dict(task="transport"), dict(obs="image"), dict(chunk=8), dict(actor_width=32), dict(actor_depth=5),
    dict(time_dim=16), dict(euler_steps=8),
])  # fmt: skip
def test_base_policy_that_does_not_fit_stops_in_one_line(bases, changes):
    with pytest.raises(SystemExit, match=r"state\.safetensors: has \w+ .*, the run wants ") as stop:
        rldt_robomimic.load_base(bases["state"], base_args(**changes))
    assert "\n" not in str(stop.value)


def test_image_policy_for_a_run_on_states_stops(bases):
    with pytest.raises(SystemExit, match=r"image\.safetensors: has \w+ \d+, the run wants \d+"):
        rldt_robomimic.load_base(bases["image"], base_args("state"))


def test_base_policy_of_other_images_stops_in_one_line(tmp_path):
    path = tmp_path / "b.safetensors"
    rldt_robomimic.save_base(small_policy(1, 9, 7, chunk=4), path, task="lift", fast_render=True)
    rldt_robomimic.load_base(path, base_args("image", fast_render=True))
    with pytest.raises(SystemExit, match="cloned from images with --fast-render; use the same, or --pretrain"):
        rldt_robomimic.load_base(path, base_args("image", fast_render=False))


@pytest.mark.parametrize("path", sorted(rldt_robomimic.DEMOS.glob("*/base_*.safetensors")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_base_policy_fits_the_defaults_of_its_task(path, tmp_path):
    obs = path.stem.removeprefix("base_")
    if obs not in ("state", "image"):  # of a furniture task
        return
    args = rldt_robomimic.resolve(rldt_robomimic.Args(task=path.parent.name, obs=obs, device="cpu"))
    policy = rldt_robomimic.get_base(args, tmp_path)
    assert policy.config["action_dim"] == 7 * rldt_robomimic.TASKS[args.task].robots
    assert all(value.isfinite().all() for value in policy.state_dict().values())


@pytest.mark.parametrize("obs", ["state", "image"])
def test_missing_demonstrations_are_made_by_commands_that_the_maker_understands(monkeypatch, tmp_path, obs):
    made = []

    def run(command, cwd):
        args = tyro.cli(make_robomimic_demos.Args, args=command[3:])
        assert command[:3] == [sys.executable, "-m", "demos.make_robomimic_demos"]
        assert args.images_from is None or args.images_from.exists()
        made.append(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("demonstrations")
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(rldt_robomimic, "DEMOS", tmp_path)
    monkeypatch.setattr(rldt_robomimic.subprocess, "run", run)
    monkeypatch.setattr(rldt_robomimic.dataset, "load", lambda *args: args)
    args = base_args(obs, bc_episodes=5, bc_split="valid", fast_render=False)
    loaded = rldt_robomimic.get_demonstrations(args)
    name = "image.hdf5" if obs == "image" else "low_dim.hdf5"
    assert loaded == (tmp_path / "lift" / name, "lift", obs == "image", 5, "valid", False)
    assert [(a.task, a.out.name, a.images_from is None) for a in made] == [("lift", "low_dim.hdf5", True), ("lift", "image.hdf5", False)][: 1 + (obs == "image")]
    assert not made[-1].fast_render or obs == "state"
    rldt_robomimic.get_demonstrations(args)  # now they are there
    assert len(made) == 1 + (obs == "image")


def test_demonstrations_that_cannot_be_made_stop(monkeypatch, tmp_path):
    monkeypatch.setattr(rldt_robomimic, "DEMOS", tmp_path)
    monkeypatch.setattr(rldt_robomimic.subprocess, "run", lambda *args, **kwargs: types.SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match="could not be made"):
        rldt_robomimic.get_demonstrations(base_args())


@pytest.mark.parametrize("content", [b"", b"garbage that is no safetensors file", "half", "pickle", None])
def test_damaged_or_missing_base_policy_stops_in_one_line(bases, tmp_path, content):
    path = tmp_path / "mine.safetensors"
    if content == "half":
        content = bases["state"].read_bytes()[:2000]
    elif content == "pickle":
        content = pickle.dumps(Bomb())
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=r"mine\.safetensors: not a base policy") as stop:
        rldt_robomimic.load_base(path, base_args())
    assert "\n" not in str(stop.value)
    assert LOADED == []


@pytest.mark.parametrize("config", ["{", "[]", '{"state_dim": 19}', {"width": 32}, {"depth": 4}, None])
def test_base_policy_with_a_damaged_config_stops_in_one_line(bases, tmp_path, config):
    path = tmp_path / "mine.safetensors"
    with safe_open(bases["state"], "pt") as file:
        state, stored = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])
    config = json.dumps(stored | config) if isinstance(config, dict) else config
    save_file(state, path, metadata=config and {"config": config})
    with pytest.raises(SystemExit, match=r"mine\.safetensors: not a base policy") as stop:
        rldt_robomimic.load_base(path, base_args())
    assert "\n" not in str(stop.value)


def test_policy_file_round_trip(tmp_path):
    policy = small_policy(1)
    rldt_robomimic.save_policy(policy, tmp_path / "policy.pt")
    loaded = rldt_robomimic.load_policy(tmp_path / "policy.pt", "cpu")
    assert loaded.config == policy.config
    assert changed(loaded, policy.state_dict()) == set()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps(Bomb())])
def test_policy_file_that_is_damaged_or_a_pickle_stops_with_its_name(tmp_path, content):
    (tmp_path / "policy.pt").write_bytes(content)
    with pytest.raises(SystemExit, match=r"policy\.pt: cannot be loaded"):
        rldt_robomimic.load_policy(tmp_path / "policy.pt", "cpu")
    torch.save(Bomb(), tmp_path / "policy.pt")
    with pytest.raises(SystemExit, match=r"policy\.pt: cannot be loaded"):
        rldt_robomimic.load_policy(tmp_path / "policy.pt", "cpu")
    assert LOADED == []


def demonstrations(lengths=(3, 17, 20), images=False):
    """Episodes whose first state and action are the step number, whose second action is the episode; actions are positive."""
    ends = np.cumsum(lengths)
    steps = np.arange(ends[-1], dtype=np.float32)
    action = np.stack([steps, 1 + np.digitize(steps, ends)] + [steps + 2] * 5, 1).astype(np.float32)
    state = np.stack([steps] + [-1 - steps] * (8 if images else 18), 1)
    data = {"state": state, "action": action, "episode_ends": ends, "meta": {}}
    if images:
        data["rgb"] = np.random.default_rng(0).integers(256, size=(len(steps), 3, 96, 96), dtype=np.uint8)
    return data


def pretrain(data, checkpoint=None, **changes):
    return rldt_robomimic.pretrain(base_args(**dict(bc_epochs=1, bc_batch=8) | changes), data, log=lambda line: None, checkpoint=checkpoint)


def test_pretraining_chunks_are_consecutive_and_stay_inside_an_episode(monkeypatch):
    seen, loss = [], rldt_robomimic.flow_matching_loss
    monkeypatch.setattr(rldt_robomimic, "flow_matching_loss", lambda v, a, o: seen.append((a, o)) or loss(v, a, o))
    policy = pretrain(demonstrations(), bc_epochs=60)
    chunk, obs = torch.cat([a for a, _ in seen]).view(-1, 4, 7), torch.cat([o for _, o in seen])
    raw = ((chunk + 1) / 2 * (policy.action_max - policy.action_min + 1e-6) + policy.action_min).round()
    assert (raw[:, 1:, 0] - raw[:, :-1, 0] == 1).all()
    assert (raw[:, :, 1] == raw[:, :1, 1]).all()
    assert ((obs[:, 0] + 1) / 2 * 39).round().tolist() == raw[:, 0, 0].tolist()
    assert set(raw[:, 0, 0].int().tolist()) == {*range(3, 17), *range(20, 37)}  # every start but those too late


def test_scaling_is_the_range_of_the_demonstrations_and_zero():
    policy = pretrain(demonstrations())
    assert (policy.obs_min[0], policy.obs_max[0], policy.obs_min[1], policy.obs_max[1]) == (0, 39, -40, 0)
    assert (policy.action_min[1], policy.action_max[1], policy.action_max[2]) == (0, 3, 41)


def test_noise_of_particles_is_zero_for_the_share_that_evaluation_starts_from():
    torch.manual_seed(0)
    noise = rldt_robomimic.start_noise((4000, 3, 7), rldt_robomimic.Args(zero_fraction=0.25, device="cpu"))
    zero = (noise == 0).all(-1)
    assert zero.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert zero.any(1).float().mean().item() == pytest.approx(1 - 0.75**3, abs=0.03)  # particles of a state differ
    assert noise[~zero].std().item() == pytest.approx(1, abs=0.01)
    assert (rldt_robomimic.start_noise((50, 7), rldt_robomimic.Args(zero_fraction=0.0, device="cpu")) != 0).all()


def test_pretraining_lowers_the_validation_loss():
    short, long = (pretrain(demonstrations((40,) * 8), bc_epochs=epochs, bc_batch=32, bc_lr=5e-3, bc_ema=0.9).validation_loss for epochs in (1, 60))
    assert long < 0.5 * short


def test_pretraining_on_images_trains_the_encoder_on_shifted_images(monkeypatch):
    shifted = []
    monkeypatch.setattr(rldt_robomimic, "random_shift", lambda rgb, pixels: shifted.append(pixels) or rgb)
    torch.manual_seed(0)
    first = copied(FlowPolicy(9, 7, 1, 4, 4, 16, 3, 8))
    torch.manual_seed(0)
    policy = pretrain(demonstrations((8, 30), images=True), obs="image", shift=3, bc_ema=0.5)
    assert {name for name, _ in policy.named_parameters()} <= changed(policy, first)
    assert set(shifted) == {3}


def test_pretraining_goes_on_where_it_was_cut_off(monkeypatch, tmp_path):
    def run(path, stop_at=math.inf):
        """The policy, None if cut off, and the number of steps made here."""
        loss, calls = rldt_robomimic.flow_matching_loss, []

        def counted(v, a, o):
            calls.append(torch.is_grad_enabled())
            if sum(calls) == stop_at:
                raise KeyboardInterrupt
            return loss(v, a, o)

        with monkeypatch.context() as patch:
            patch.setattr(rldt_robomimic, "flow_matching_loss", counted)
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


def test_velocity_network_is_pretrained_further_on_images_encoded_once(monkeypatch):
    encoded, encode = [], Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, obs: encoded.append(len(obs["rgb"])) or encode(self, obs))
    torch.manual_seed(0)
    first = pretrain(demonstrations((30, 30), images=True), obs="image", bc_ema=0.9)
    images, shifts = sum(encoded), []
    encoded.clear()
    monkeypatch.setattr(rldt_robomimic, "random_shift", lambda rgb, pixels: shifts.append(len(rgb)) or rgb)
    torch.manual_seed(0)
    data = demonstrations((30, 30), images=True)
    more = pretrain(data, obs="image", shift=2, bc_head_steps=300, bc_copies=3, bc_ema=0.9)
    chunks = 2 * (30 - 4 + 1)
    held_out = chunks // 20
    assert sum(encoded) == images + 3 * (chunks - held_out) + held_out  # whatever the number of steps
    assert sum(shifts[-3:]) == 3 * (chunks - held_out)  # what validates is not shifted
    for name, value in more.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]) != name.startswith("velocity."), name

    rows = torch.as_tensor(np.r_[0:27, 30:57])
    action = torch.as_tensor(data["action"])[rows[:, None] + torch.arange(4)]
    action = (2 * (action - first.action_min) / (first.action_max - first.action_min + 1e-6) - 1).flatten(1)
    losses = []
    for policy in first, more:
        torch.manual_seed(1)
        cond = policy.encode({name: value[rows] for name, value in policy.observe({name: data[name] for name in ("state", "rgb")}).items()})
        losses.append(rldt_robomimic.flow_matching_loss(policy.velocity, action.repeat(50, 1), cond.repeat(50, 1)).item())
    assert losses[1] < 0.7 * losses[0]


def test_demonstrations_shorter_than_a_chunk_stop():
    with pytest.raises(SystemExit, match=r"as long as a chunk \(4 steps\)"):
        pretrain(demonstrations((3, 2)))


# ----------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize("task, horizon, chunk", [("lift", 300, 4), ("can", 300, 4), ("square", 400, 4), ("transport", 800, 8)])
@pytest.mark.parametrize("obs, width", [("state", 512), ("image", 768)])
def test_resolve_fills_in_the_settings_of_the_task(task, horizon, chunk, obs, width):
    args = rldt_robomimic.resolve(rldt_robomimic.Args(task=task, obs=obs, encoder="own"))
    assert (args.horizon, args.chunk, args.actor_width) == (horizon, chunk, width)
    assert args.encoder == ("own" if obs == "image" else "frozen")
    assert args.device in ("cpu", "cuda")
    args = rldt_robomimic.resolve(rldt_robomimic.Args(task=task, obs=obs, horizon=48, chunk=6, actor_width=64))
    assert (args.horizon, args.chunk, args.actor_width) == (48, 6, 64)


@pytest.mark.parametrize("name", [
    "euler_steps", "n_particles", "num_envs", "rounds", "segments", "value_samples", "eval_every", "eval_episodes", "final_eval_episodes", "critic_steps",
    "critic_batch", "actor_steps", "actor_batch", "bc_batch", "threads",
])  # fmt: skip
def test_numbers_below_one_stop_with_the_flag(name):
    with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} must be at least 1, got 0"):
        rldt_robomimic.resolve(rldt_robomimic.Args(**{name: 0}))


@pytest.mark.parametrize("changes, message", [
    (dict(segment_chunks=20, rollout_chunks=20), r"--segment-chunks 20 .*--rollout-chunks 20"), (dict(segment_chunks=0), "--segment-chunks 0"),
    (dict(exploration_steps=-1), "--exploration-steps"), (dict(exploration_scale=-0.1), "--exploration-scale"), (dict(exploration_steps=9, euler_steps=8), "--exploration-steps"),
    (dict(horizon=10, chunk=4), r"--horizon 10 .*--chunk 4"), (dict(chunk=-1), "--chunk"), (dict(horizon=-4), "--horizon"),
    (dict(iterations=-1), "--iterations"), (dict(rollout_chunks=-1), "--rollout-chunks"), (dict(bc_epochs=-1), "--bc-epochs"),
    (dict(actor_depth=4), "--actor-depth must be odd and at least 3"), (dict(actor_depth=1), "--actor-depth must be odd and at least 3"),
])  # fmt: skip
def test_values_out_of_range_stop_in_one_line(changes, message):
    with pytest.raises(SystemExit, match=message) as stop:
        rldt_robomimic.resolve(rldt_robomimic.Args(**changes))
    assert "\n" not in str(stop.value)


def test_limits_of_the_ranges_are_allowed():
    args = rldt_robomimic.resolve(rldt_robomimic.Args(segment_chunks=19, rollout_chunks=20, exploration_steps=8, euler_steps=8, n_particles=1))
    assert args.segment_chunks == 19


def test_cuda_without_a_cuda_device_stops(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        rldt_robomimic.resolve(rldt_robomimic.Args(device="cuda"))
    assert rldt_robomimic.resolve(rldt_robomimic.Args()).device == "cpu"


@pytest.mark.parametrize("argv", [["--preset", "paper"], ["--preset=paper"]])
def test_paper_preset_sets_the_values_of_the_paper(argv):
    args = rldt_robomimic.resolve(rldt_robomimic.parse_args([*argv, "--obs", "image"]))
    paper = dict(
        preset="paper", iterations=200, num_envs=64, rollout_chunks=202, buffer_iterations=10, euler_steps=8, actor_width=768, actor_depth=3,
        time_dim=32, chunk=4, horizon=400, bc_batch=256, bc_lr=1e-4, bc_lr_end=1e-5, gamma=0.999, target_momentum=0.995, critic_steps=32,
        critic_lr=1e-3, critic_encoder_lr=4e-5, critic_width=256, critic_depth=3, encoder="own", warmup_iterations=2, n_particles=8,
        kernel="rbf", alpha=1e-3, consistency_weight=0.5, constraint_weight=0.2, actor_lr=2e-5, actor_warmup=32, transport_scale=1.0,
        td_lambda=0.5, warmup_lambda=0.5, warmup_factor=1, value_samples=2, rounds=16, actor_steps=2, eval_every=10, stop_on_success=False,
        time_limit="terminal", critic_layer_norm=False, critic_init="normal", fresh_fraction=0.33, zero_fraction=0.0, actor_lr_end=1.0,
        exploration_steps=2, balanced=True, fast_render=False, shift=4,
    )  # fmt: skip
    assert {key: getattr(args, key) for key in paper} == paper
    assert 2000 <= args.bc_epochs <= 8000


@pytest.mark.parametrize(("task", "obs", "iterations", "chunks"), [
    ("lift", "state", 40, 200), ("lift", "image", 40, 200), ("square", "state", 120, 400), ("square", "image", 120, 400), ("transport", "state", 120, 400),
])  # fmt: skip
def test_length_of_a_run_is_that_of_the_task_unless_given(task, obs, iterations, chunks):
    args = rldt_robomimic.resolve(rldt_robomimic.Args(task=task, obs=obs))
    assert (args.iterations, args.rollout_chunks) == (iterations, chunks)
    args = rldt_robomimic.resolve(rldt_robomimic.Args(task=task, obs=obs, iterations=3, rollout_chunks=50))
    assert (args.iterations, args.rollout_chunks) == (3, 50)


def test_explicit_flags_win_over_the_preset():
    args = rldt_robomimic.parse_args(["--n-particles", "5", "--preset", "paper", "--critic-batch=64"])
    assert (args.n_particles, args.critic_batch, args.rounds) == (5, 64, 16)


def test_no_flags_give_the_defaults():
    assert rldt_robomimic.parse_args([]) == rldt_robomimic.parse_args(["--preset", "laptop"]) == rldt_robomimic.Args()


@pytest.mark.parametrize("argv", [["rldt_robomimic.py"], ["pretrain_fm.py", "robomimic"]])
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
    for field in dataclasses.fields(rldt_robomimic.Args):
        flag = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"{flag}(?![\w-])", text), flag
    assert ("--out" in text) == ("robomimic" in argv)


# ------------------------------------------------------------------- whole runs without simulators
def flags(base, runs, **changes):
    """Flags of a run of four iterations, the first and the last of which evaluate."""
    values = dict(
        task="lift", base=base, runs=runs, euler_steps=4, actor_width=16, time_dim=8, device="cpu", threads=1, seed=3, iterations=4, num_envs=2,
        horizon=40, rollout_chunks=13, buffer_iterations=2, eval_every=10, eval_episodes=2, final_eval_episodes=3, rounds=2, critic_steps=2,
        critic_batch=8, critic_width=16, segments=6, segment_chunks=3, warmup_iterations=1, warmup_factor=1, actor_steps=1, actor_batch=4,
        n_particles=2, actor_lr=1e-3, actor_warmup=2,
    ) | changes  # fmt: skip
    return [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]


def only_run(runs):
    (run,) = runs.iterdir()
    return run


def metrics(run):
    """The rows of metrics.csv without the columns of wall time and memory."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return [{key: value for key, value in row.items() if key not in (*WALL_COLUMNS, "diagnostics/memory_gib")} for row in rows]


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def assert_same_networks(run, other):
    for name in ("policy", "critic", "target", "reference"):
        expected = checkpoint(other)[name]
        for key, value in checkpoint(run)[name].items():
            assert torch.equal(value, expected[key]), (name, key)


def main(argv):
    return rldt_robomimic.main(rldt_robomimic.parse_args(list(map(str, argv))))


@pytest.fixture(scope="module")
def _fakes():
    """Scripted episodes of up to 5 chunks instead of simulators; a chunk's actions decide whether it solves the task."""
    made = []

    def make_envs(args, num_envs, record=False, stop_on_success=True):
        solves = lambda seed, t, chunk: t >= 1 and math.sin(100 * chunk.sum()) > 0.6
        made.append(FakeEnvs(num_envs, lambda seed: 3 + seed % 3, solves, args.obs == "image", stop_on_success, 4, 7, 9 if args.obs == "image" else 19))
        return made[-1]

    return made, make_envs


@pytest.fixture
def fakes(_fakes, monkeypatch):
    """Runs main() on fake environments; the list holds those that were made."""
    monkeypatch.setattr(rldt_robomimic, "make_envs", _fakes[1])
    monkeypatch.setattr(rldt_robomimic, "choose_renderer", lambda: "none")
    _fakes[0].clear()
    return _fakes[0]


@pytest.fixture(scope="module")
def fake_run(_fakes, bases, tmp_path_factory):
    """Directory and result of a complete run on fake environments; read it, do not write to it."""
    runs = tmp_path_factory.mktemp("fake")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rldt_robomimic, "make_envs", _fakes[1])
        result = main(flags(bases["state"], runs))
    signal.signal(signal.SIGINT, handler)
    return only_run(runs), result


@pytest.fixture
def copied_run(fake_run, tmp_path):
    return shutil.copytree(fake_run[0], tmp_path / "copy")


def test_run_succeeds_and_fails_in_turn_so_that_it_tests_something(fake_run):
    rows = metrics(fake_run[0])
    assert any(0 < float(row["train_success"]) < 1 for row in rows[1:4])
    replay = torch.load(fake_run[0] / "replay0.pt", weights_only=True)
    assert 0 < replay["succeeded"][replay["valid"] > 0].mean() < 1


@pytest.mark.parametrize("changes", [
    dict(td_lambda=0.0, critic_layer_norm=False, critic_init="normal", exploration_steps=0, time_limit="terminal", value_samples=2),
    dict(transport_loss="literal", kernel="delta", reference="pretrained", bf16=False, n_particles=1, balanced=False),
    dict(obs="image", encoder="shared", rounds=1), dict(obs="image", encoder="own", stop_on_success=False, rounds=1),
    dict(obs="image", encoder="frozen", reference_every=1),
])  # fmt: skip
def test_run_with_the_other_choices_ends_with_finite_numbers(fakes, bases, tmp_path, changes):
    argv = flags(bases[changes.get("obs", "state")], tmp_path, **dict(iterations=3, warmup_iterations=0, segments=3) | changes)
    argv = [re.sub(r"--(\w[\w-]*)=(True|False)$", lambda m: f"--{'' if m[2] == 'True' else 'no-'}{m[1]}", flag) for flag in argv]
    result = main(argv)
    run = only_run(tmp_path)
    assert np.isfinite([result["final_success"], result["final_success_sampled"]]).all()
    rows, saved = metrics(run), checkpoint(run)
    assert float(rows[2]["diagnostics/base_distance"]) > 0
    start = rldt_robomimic.load_policy(run / "base_policy.pt", "cpu").state_dict()
    moved = {key for key, value in saved["policy"].items() if not torch.equal(value, start[key])}
    followed = all(torch.equal(value, saved["policy"][key]) for key, value in saved["reference"].items())
    assert followed == (changes.get("reference_every") == 1)
    encoder = {key for key in start if key.startswith("encoder.")}
    assert {key.split(".")[0] for key in moved} == ({"velocity"} if changes.get("encoder", "frozen") == "frozen" else {"velocity", "encoder"})
    assert bool(encoder) == ("obs" in changes)
    slot = torch.load(run / "replay0.pt", weights_only=True)
    own, args = changes.get("encoder") == "own", json.loads((run / "args.json").read_text())
    assert [group["lr"] for group in saved["critic_optimizer"]["param_groups"]] == [args["critic_lr"], args["critic_encoder_lr"]][: 1 + own]
    assert ("encoder.vits.0.position" in saved["critic"]) == own
    assert ("rgb" in slot) == (changes.get("encoder", "frozen") != "frozen")
    assert slot["state"].shape[-1] == {"state": 19, "image": 9}[changes.get("obs", "state")] + 128 * ("obs" in changes and "rgb" not in slot)
    assert all(envs.closed for envs in fakes)


def test_the_critics_own_encoder_moves_with_its_own_step_size(fakes, bases, tmp_path, monkeypatch):
    update, moves = rldt_robomimic.update_critic, []

    def recorded(critic, *args):
        before = copied(critic)
        result = update(critic, *args)
        if not moves:  # Adam's first step is as long as its step size
            moves.append({key: (value - before[key]).abs().max().item() for key, value in critic.state_dict().items()})
        return result

    monkeypatch.setattr(rldt_robomimic, "update_critic", recorded)
    main(flags(bases["image"], tmp_path, obs="image", encoder="own", iterations=2, segments=2, rounds=1, critic_lr=2e-3, critic_encoder_lr=1e-4))
    for key, distance in moves[0].items():
        assert distance == pytest.approx(1e-4 if key.startswith("encoder.") else 2e-3, rel=0.1), key


def in_training(counter):
    """Without the seeds of the evaluations of a run with seed 3."""
    assert {4_000_000, 4_000_001, 4_000_002} <= set(counter)
    return {seed: value for seed, value in counter.items() if seed // 1_000_000 != 4}


def test_training_follows_its_schedules(fakes, bases, tmp_path, monkeypatch):
    calls = {"lambda": [], "critic": [], "actor": []}
    target, critic, actor = rldt_robomimic.critic_target, rldt_robomimic.update_critic, rldt_robomimic.update_actor
    monkeypatch.setattr(rldt_robomimic, "critic_target", lambda *args: calls["lambda"].append(args[-1]) or target(*args))
    monkeypatch.setattr(rldt_robomimic, "update_critic", lambda *args: calls["critic"].append(len(args[-2])) or critic(*args))
    monkeypatch.setattr(rldt_robomimic, "update_actor", lambda *args: calls["actor"].append(args[3].param_groups[0]["lr"]) or actor(*args))
    main(flags(bases["state"], tmp_path, warmup_factor=3, warmup_lambda=0.9, td_lambda=0.3, actor_lr=0.01, actor_lr_end=0.5, actor_warmup=3))
    assert calls["lambda"] == [0.9] * 2 + [0.3] * 4  # two rounds an iteration, one iteration before the actor starts
    assert len(calls["critic"]) == 2 * 6 + 4 * 2
    assert max(calls["critic"]) == 8
    decay = [1 - 0.5 * iteration / 4 for iteration in (2, 2, 3, 3)]
    assert calls["actor"] == pytest.approx([0.01 * d * w for d, w in zip(decay, (1 / 3, 2 / 3, 1, 1), strict=True)])
    rows = metrics(only_run(tmp_path))
    for i, row in enumerate(rows):
        assert (row["eval_success"] != "") == (i in (0, 4))
        assert (row["losses/critic"] != "") == (i in (1, 2, 3))
        assert (row["losses/transport"] != "") == (i in (2, 3))
    assert float(rows[1]["diagnostics/base_distance"]) == 0
    assert float(rows[3]["diagnostics/base_distance"]) > 0
    (envs,) = fakes
    steps = np.diff([int(row["env_steps"]) for row in rows]).tolist()
    assert steps[3] == 0
    assert sum(steps) == sum(in_training(envs.steps).values())


def test_states_after_success_reach_neither_update(fakes, bases, tmp_path, monkeypatch):
    used = []
    for name in ("update_critic", "update_actor"):
        update, position = getattr(rldt_robomimic, name), 4
        monkeypatch.setattr(rldt_robomimic, name, lambda *args, u=update: used.append(args[position]["state"]) or u(*args))
    main([*flags(bases["state"], tmp_path, segments=40), "--no-stop-on-success"])
    (envs,) = fakes
    valid = {seed % 100_000: chunks for seed, chunks in in_training(envs.valid).items()}
    assert len(valid) == len(in_training(envs.valid))  # no two seeds with the same last digits
    last = [valid[round(state[0].item() * 100_000)] - 1 - round(state[1].item() * 10) for state in torch.cat(used)]
    assert min(last) == 0  # the state in which the task is solved, or before the time limit, but none after it
    assert any(chunks < 3 for chunks in valid.values())  # an episode is at least so long


def test_evaluating_a_run_gives_the_rates_of_its_last_evaluation(fakes, fake_run, capsys):
    run, result = fake_run
    scores = main(["--evaluate", run, "--final-eval-episodes=3", "--seed=3", "--num-envs=2", "--threads=1", "--device=cpu"])
    assert scores == {"zero": result["final_success"], "noise": result["final_success_sampled"]}
    printed = capsys.readouterr().out
    assert f"3 episodes from x_0 = 0: success {100 * scores['zero']:.0f} %" in printed
    assert all(envs.closed for envs in fakes)


def test_best_policy_is_measured_again_on_other_episodes(fakes, bases, tmp_path, monkeypatch):
    seen = []

    def evaluated(policy, envs, args, episodes, seed):
        seen.append((episodes, seed))
        success = np.arange(episodes) < {0: 1, 1: 2, 2: 1, 3: 3}[len(seen) - 1]  # base, middle, final, best again
        return {"zero": success, "noise": ~success}

    monkeypatch.setattr(rldt_robomimic, "evaluate", evaluated)
    result = main(flags(bases["state"], tmp_path, eval_every=2, iterations=4, eval_episodes=3, final_eval_episodes=4))
    assert seen == [(4, 4_000_000), (3, 4_000_000), (4, 4_000_000), (4, 4_500_000)]
    assert (result["base_success"], result["final_success"], result["best_success"], result["best_success_sampled"]) == (0.25, 0.25, 0.75, 0.25)
    best, last = (rldt_robomimic.load_policy(only_run(tmp_path) / name, "cpu").state_dict() for name in ("best_policy.pt", "policy.pt"))
    assert not all(torch.equal(value, last[key]) for key, value in best.items())


def test_progress_bar_ends_at_the_number_of_iterations(fakes, bases, tmp_path, capsys):
    main(flags(bases["state"], tmp_path))
    assert re.findall(r"(\d+(?:/\d+|it)) \[", capsys.readouterr().err)[-1] == "4/4"


@pytest.mark.parametrize("at, saved", [("training", 3), ("saving", 3)])
def test_run_that_crashed_and_is_resumed_gives_the_metrics_of_one_that_did_not(monkeypatch, fakes, fake_run, bases, tmp_path, at, saved):
    update, save, calls = rldt_robomimic.update_critic, torch.save, Counter()

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
        patch.setattr(rldt_robomimic, "update_critic", crash)
        patch.setattr(torch, "save", full)
        with pytest.raises((RuntimeError, SystemExit), match=r"crash|Cannot write .*checkpoint\.pt.*No space left.*disk full"):
            main(flags(bases["state"], tmp_path))
    run = only_run(tmp_path)
    assert not list(run.glob("*.partial"))
    assert checkpoint(run)["state"]["iteration"] == saved
    result = main(["--resume", run])
    assert metrics(run) == metrics(fake_run[0])
    assert_same_networks(run, fake_run[0])
    for key in ("base_success", "final_success", "best_success", "best_success_sampled", "env_steps"):
        assert result[key] == fake_run[1][key]


def test_second_ctrl_c_stops_at_once(monkeypatch, fakes, bases, tmp_path):
    calls = []

    def pressed(*args):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    monkeypatch.setattr(rldt_robomimic, "update_critic", pressed)
    with pytest.raises(KeyboardInterrupt):
        main(flags(bases["state"], tmp_path))
    assert len(calls) == 2
    assert checkpoint(only_run(tmp_path))["state"]["iteration"] == 1


def test_nan_in_a_loss_stops_with_its_name_and_keeps_the_last_checkpoint(monkeypatch, fakes, fake_run, bases, tmp_path):
    update, calls = rldt_robomimic.update_critic, []

    def broken(*args):
        calls.append(1)
        return update(*args) | ({"losses/critic": torch.tensor(torch.nan)} if len(calls) == 6 else {})

    with monkeypatch.context() as patch:
        patch.setattr(rldt_robomimic, "update_critic", broken)
        with pytest.raises(FloatingPointError, match=r"losses/critic became nan in iteration 2.*checkpoint\.pt"):
            main(flags(bases["state"], tmp_path))
    run = only_run(tmp_path)
    assert checkpoint(run)["state"]["iteration"] == 2
    main(["--resume", run])
    assert metrics(run) == metrics(fake_run[0])


def test_run_that_pretrained_its_base_goes_on_from_the_same_base(monkeypatch, fakes, bases, tmp_path):
    data = demonstrations((40,) * 4)
    monkeypatch.setattr(rldt_robomimic, "get_demonstrations", lambda args: data)
    argv = [[*flags(bases["state"], tmp_path / name, warmup_iterations=2, bc_epochs=2, bc_batch=32), "--pretrain"] for name in ("whole", "parts")]
    main(argv[0])
    whole = only_run(tmp_path / "whole")
    assert (whole / "base.safetensors").exists()
    update, calls = rldt_robomimic.update_critic, []

    def crash(*args):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("crash")
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rldt_robomimic, "update_critic", crash)
        with pytest.raises(RuntimeError, match="crash"):
            main(argv[1])
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
    for key in ("base_success", "final_success", "best_success", "env_steps"):
        assert result[key] == fake_run[1][key]
    assert (copied_run / "policy.pt").exists()


def test_resuming_keeps_the_base_policy_that_the_run_started_from(fakes, copied_run):
    check_resumed_run_keeps_its_base(rldt_robomimic, copied_run)


def test_resuming_what_is_no_run_directory_or_has_damaged_arguments_says_so(fakes, copied_run, tmp_path):
    with pytest.raises(SystemExit, match="not a run directory"):
        main(["--resume", tmp_path])
    (copied_run / "args.json").write_text('{"task": "li')
    for flag in ("--resume", "--evaluate"):
        with pytest.raises(SystemExit, match=r"args\.json: cannot be read"):
            main([flag, copied_run])


def test_resume_takes_the_stored_arguments_and_says_which_flags_it_does_not_use(copied_run, capsys):
    args = rldt_robomimic.resolve(rldt_robomimic.parse_args(["--resume", str(copied_run), "--seed", "99"]))
    assert (args.seed, args.actor_width, args.task) == (3, 16, "lift")
    assert "not used: --seed\n" in capsys.readouterr().out
    rldt_robomimic.resolve(rldt_robomimic.parse_args(["--resume", str(copied_run)]))
    assert "not used" not in capsys.readouterr().out


def test_pretraining_alone_writes_a_base_policy_and_its_success(monkeypatch, fakes, tmp_path):
    data, out = demonstrations((40,) * 4), tmp_path / "new" / "base.safetensors"
    monkeypatch.setattr(rldt_robomimic, "get_demonstrations", lambda args: data)
    args = base_args(bc_epochs=1, bc_batch=32, num_envs=2, final_eval_episodes=3, threads=1)
    info = pretrain_fm.robomimic(args, out)
    rldt_robomimic.load_base(out, args)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["info"]) == info
    assert {"success_zero", "success_sampled", "validation_loss"} <= set(info)


# ---------------------------------------------------------------------- whole runs on robosuite
@pytest.fixture(scope="module")
def robosuite_lift(bases, tmp_path_factory):
    """Directory and result of a complete run on Lift with states; read it, do not write to it."""
    runs = tmp_path_factory.mktemp("lift")
    handler = signal.getsignal(signal.SIGINT)
    result = main(flags(bases["state"], runs, final_eval_episodes=2))
    signal.signal(signal.SIGINT, handler)
    return only_run(runs), result


def test_run_on_robosuite_writes_every_file(robosuite_lift):
    run, returned = robosuite_lift
    assert run.name.startswith("lift-state__rldt__3__")
    assert not list(run.glob("*.partial"))
    args = json.loads((run / "args.json").read_text())
    assert set(args) == {field.name for field in dataclasses.fields(rldt_robomimic.Args)}
    assert (args["seed"], args["horizon"]) == (3, 40)
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    saved = checkpoint(run)
    assert saved["state"]["iteration"] == 5
    assert changed(rldt_robomimic.load_policy(run / "policy.pt", "cpu"), saved["policy"]) == set()
    result, rows = json.loads((run / "result.json").read_text()), metrics(run)
    assert result == json.loads(json.dumps(returned))
    assert (result["task"], result["episodes"]) == ("lift-state", 2)
    for name, row in ("base", rows[0]), ("final", rows[-1]):
        for end in ("success", "success_low", "success_high", "success_sampled", "success_sampled_low", "success_sampled_high"):
            assert result[f"{name}_{end}"] == pytest.approx(float(row[f"eval_{end}"]))
    assert result["best_success"] >= result["final_success"]
    assert result["env_steps"] == int(rows[-1]["env_steps"])
    assert {"torch", "numpy", "mujoco", "python", "robosuite", "robomimic"} <= set(result["versions"])
    steps = np.diff([int(row["env_steps"]) for row in rows]).tolist()
    assert steps == [2 * 11 * 4] * 3 + [0]  # ten chunks, the row in which they ended, and one chunk of the next episode
    memory = [float(row["diagnostics/memory_gib"]) for row in csv.DictReader((run / "metrics.csv").open()) if row["diagnostics/memory_gib"]]
    assert all(0.1 < value < 10 for value in memory)


def test_tensorboard_holds_the_scalars_of_the_metrics(robosuite_lift):
    run, _ = robosuite_lift
    events = EventAccumulator(str(run))
    events.Reload()
    assert {"charts/eval_success", "charts/eval_success_sampled", "losses/critic", "losses/transport", "diagnostics/q"} <= set(events.Tags()["scalars"])
    expected = [(int(r["env_steps"]), float(r["losses/critic"])) for r in metrics(run) if r["losses/critic"]]
    assert [(e.step, e.value) for e in events.Scalars("losses/critic")] == [(s, pytest.approx(v)) for s, v in expected]


def test_replay_of_a_run_on_robosuite_holds_its_episodes(robosuite_lift):
    slot = torch.load(robosuite_lift[0] / "replay1.pt", weights_only=True)  # of the second training iteration
    assert slot["state"].shape == (13, 2, 19)
    assert slot["valid"].tolist() == [[1, 1]] * 10 + [[0, 0], [1, 1], [0, 0]]
    assert (slot["state"][1:11] != slot["state"][:10]).any(-1).all()
    assert not torch.equal(slot["state"][0], slot["state"][11])


def test_ctrl_c_finishes_the_iteration_and_the_resumed_run_equals_one_never_stopped(monkeypatch, robosuite_lift, bases, tmp_path):
    update, calls = rldt_robomimic.update_critic, []

    def pressed(*args):
        calls.append(1)
        if len(calls) == 5:  # a terminal sends it to every process
            for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
                os.kill(pid, signal.SIGINT)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rldt_robomimic, "update_critic", pressed)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
            main(flags(bases["state"], tmp_path, final_eval_episodes=2))
    run = only_run(tmp_path)
    assert stop.type is SystemExit
    assert str(stop.value).endswith(f"Continue with: python rldt_robomimic.py --resume {run}")
    assert "Stopped after iteration 2, saved" in str(stop.value)
    assert len(calls) == 2 * 4  # the whole iteration
    assert not multiprocessing.active_children()
    result = main(str(stop.value).split("rldt_robomimic.py ")[1].split())
    assert metrics(run) == metrics(robosuite_lift[0])
    assert_same_networks(run, robosuite_lift[0])
    for key in ("base_success", "final_success", "best_success", "env_steps"):
        assert result[key] == robosuite_lift[1][key]


def test_video_shows_both_policies_side_by_side(monkeypatch, bases, tmp_path, capsys):
    import imageio.v2 as imageio

    args = base_args("image", horizon=8, video_episodes=2, num_envs=1)
    policy = rldt_robomimic.load_base(bases["image"], args)
    seeds, reset = [], rldt_robomimic.RobomimicVectorEnv.reset
    monkeypatch.setattr(rldt_robomimic.RobomimicVectorEnv, "reset", lambda envs, seed, mask: (seeds.extend(seed), reset(envs, seed, mask))[1])
    rldt_robomimic.record_video({"base": policy, "finetuned": policy}, args, tmp_path / "film.mp4")
    start = 1_000_000 * (args.seed + 1)  # where no demonstration and no rollout starts
    assert seeds == 2 * [start, start + 1]
    assert "Video (base, finetuned from left to right)" in capsys.readouterr().out
    with imageio.get_reader(tmp_path / "film.mp4") as film:
        frames = [frame.astype(int) for frame in film]
    half = frames[0].shape[1] // 2
    assert len(frames) == 2 * (8 + 10)  # and the last one stays for half a second
    assert frames[0].std() > 10
    assert max(abs(frame[:, :half] - frame[:, half:]).mean() for frame in frames) < 3  # the same policy from the same start


def test_evaluating_a_run_on_robosuite(robosuite_lift, capsys):
    run, result = robosuite_lift
    scores = main(["--evaluate", run, "--final-eval-episodes=2", "--seed=3", "--num-envs=2", "--threads=1", "--device=cpu"])
    assert scores == {"zero": result["final_success"], "noise": result["final_success_sampled"]}
    assert "lift-state, 2 episodes from x_0 = 0" in capsys.readouterr().out


@pytest.mark.parametrize("encoder", ["frozen", "own"])
def test_run_on_robosuite_with_images(bases, tmp_path, encoder):
    changes = dict(task="square", obs="image", encoder=encoder, iterations=2, horizon=8, rollout_chunks=5, final_eval_episodes=1, rounds=1,
                   warmup_iterations=0, segments=2, segment_chunks=1, critic_batch=2, actor_batch=2)  # fmt: skip
    result = main(flags(bases["image"], tmp_path, **changes))
    run = only_run(tmp_path)
    saved, slot = checkpoint(run), torch.load(run / "replay0.pt", weights_only=True)
    start = rldt_robomimic.load_policy(run / "base_policy.pt", "cpu").state_dict()
    moved = {key.split(".")[0] for key, value in saved["policy"].items() if not torch.equal(value, start[key])}
    assert moved == ({"velocity"} if encoder == "frozen" else {"velocity", "encoder"})
    assert slot["valid"].tolist() == [[1, 1], [1, 1], [0, 0], [1, 1], [0, 0]]
    if encoder == "frozen":
        assert set(slot) == {"state", "action", "reward", "terminated", "truncated", "valid", "succeeded"}
        assert slot["state"].shape == (5, 2, 9 + 128)
    else:
        assert slot["rgb"].shape == (5, 2, 3, 96, 96)
        assert slot["rgb"].dtype == torch.uint8
        assert slot["rgb"].float().std((2, 3, 4)).min() > 10  # a picture in every row
        assert (slot["rgb"][0] != slot["rgb"][1]).any()
    assert result["task"] == "square-image"
    assert result["env_steps"] == 2 * 3 * 4
    assert all(math.isfinite(float(value)) for value in metrics(run)[1].values() if value)
