import copy
import csv
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import WALL_COLUMNS
from hypothesis import given
from hypothesis import strategies as st

import rldt_gym
import rldt_robomimic
from common.flow import VelocityMLP, expected_target, sample
from common.runs import Run
from common.settings import parse_args
from common.svgd import particle_gradient, transport_field
from demos import make_robomimic_demos
from envs.interface import Step
from rldt_robomimic import (
    Args,
    Critic,
    Encoder,
    Policy,
    Replay,
    SpatialEmbedding,
    ViT,
    actor_losses,
    collect,
    critic_target,
    evaluate,
    random_shift,
    summary,
    td_lambda,
    update_actor,
    update_critic,
)

SIZES = dict(chunk=4, euler_steps=4, width=16, depth=3, time_dim=8)


def arguments(**changes):
    """Arguments of the functions below main()."""
    return Args(**dict(device="cpu", bf16=False, horizon=20, exploration_steps=2) | changes)


def small_policy(cameras=0, state_dim=4, action_dim=2, **sizes):
    return Policy(state_dim, action_dim, cameras=cameras, **SIZES | dict(chunk=2) | sizes)


def small_critic(policy, own=False):
    encoder = Encoder(policy.cameras, policy.obs_dim) if own else None
    return Critic(policy.cond_dim, policy.action_size, True, encoder, 16, 2)


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


@pytest.fixture
def unshifted(monkeypatch):
    """Images are not shifted; the list holds how many would have been, and by how much."""
    shifts = []
    shift = lambda rgb, pixels: shifts.append((len(rgb), pixels)) or rgb
    monkeypatch.setattr(rldt_robomimic, "random_shift", shift)
    return shifts


@pytest.fixture
def encoded(monkeypatch):
    """How many images encoders have seen, a number for each pass."""
    encode, images = Encoder.forward, []
    counted = lambda self, obs: images.append(len(obs["rgb"])) or encode(self, obs)
    monkeypatch.setattr(Encoder, "forward", counted)
    return images


class FakeEnvs:
    """Scripted episodes in place of simulators, with the interface of RobomimicVectorEnv.

    An episode lasts length(seed) chunks and is solved in chunk t where solves(seed, t, chunk) says so. A
    step that ends an episode takes one environment step, any other as many as the chunk has.
    """

    action_dim = 2

    def __init__(self, num_envs, length, solves, images=False, stop=True, action_dim=2, state_dim=4):
        self.num_envs, self.length, self.solves = num_envs, length, solves
        self.images, self.stop, self.action_dim, self.state_dim = images, stop, action_dim, state_dim
        self.seed, self.t, self.score, self.episode = np.zeros((4, num_envs), int)
        self.begun, self.executed, self.closed = [], [], False
        self.steps, self.valid = Counter(), Counter()  # by seed: steps, chunks until success or the end

    def observation(self, seed, t):
        """What is seen in chunk t of a seed's episode: its last five digits, t, and noise of its own."""
        rng = np.random.default_rng([seed, t])
        noise = rng.normal(size=self.state_dim - 2)
        obs = {"state": np.r_[seed % 100_000 / 100_000, t / 10, noise].astype(np.float32)}
        if self.images:
            obs["rgb"] = rng.integers(256, size=(3, 96, 96), dtype=np.uint8)
        return obs

    @property
    def obs(self):
        each = [self.observation(seed, t) for seed, t in zip(self.seed, self.t, strict=True)]
        return {name: np.stack([obs[name] for obs in each]) for name in each[0]}

    def reset(self, seeds):
        self.seeds, self.started = itertools.count(seeds) if isinstance(seeds, int) else seeds, 0
        for i in range(self.num_envs):
            self.start(i)

    def start(self, i):
        seed = next(self.seeds, None)
        self.episode[i], self.t[i], self.score[i] = -1, 0, 0
        if seed is not None:
            self.begun.append(seed)
            self.seed[i], self.episode[i] = seed, self.started
            self.started += 1

    def step(self, chunks, active=None):
        running = np.flatnonzero(self.episode >= 0)
        self.executed.append(chunks.copy())
        reward, length = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for i in running:
            seed, t = self.seed[i], self.t[i]
            reward[i] = self.solves(seed, t, chunks[i])
            self.valid[seed] += not self.score[i]
            self.score[i] |= reward[i] > 0
            terminated[i] = reward[i] and self.stop
            truncated[i] = t + 1 == self.length(seed) and not terminated[i]
            length[i] = 1 if terminated[i] or truncated[i] else chunks.shape[1]
            self.steps[seed] += length[i]
            self.t[i] += 1
        next_obs, score = self.obs, self.score.copy()
        for i in np.flatnonzero(terminated | truncated):
            self.start(i)
        return Step(next_obs, reward, terminated, truncated, length, score)

    def close(self):
        self.closed = True


# -------------------------------------------------------------------------------- TD(lambda)
@st.composite
def segments(draw):
    """Rewards, ends and next values (T, L) of segments, gamma and lambda; ends succeed or fail."""
    T, L = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    value = 0.5 + torch.randn(T, L, dtype=torch.float64, generator=generator)  # some outside [0, 1]
    kinds = st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=T * L, max_size=T * L)
    end = torch.tensor(draw(kinds)).view(T, L)
    return (end == 1).double(), (end > 0).double(), value, draw(st.floats(0, 1)), draw(st.floats(0, 1))


def recursive(t, r, terminated, value, gamma, lam):
    """y_t as it is defined, for one segment of plain numbers."""
    if terminated[t]:
        y = r[t]
    elif t == len(r) - 1:
        y = r[t] + gamma * value[t]
    else:
        later = recursive(t + 1, r, terminated, value, gamma, lam)
        y = r[t] + gamma * ((1 - lam) * value[t] + lam * later)
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
def test_target_of_success_is_one_and_of_failure_zero_whatever_the_values_are(value, lam):
    reward, terminated = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[0.0], [1.0], [1.0]])
    y = td_lambda(reward, terminated, torch.full((3, 1), value), 0.9, lam)
    assert y[1:].flatten().tolist() == [1, 0]
    assert 0 <= y[0] <= 1
    if value == 0.3:
        assert y[0].item() == pytest.approx(0.9 * ((1 - lam) * 0.3 + lam))


# ------------------------------------------------------------------------------------ networks
def test_spatial_embedding_weights_the_channels_of_projected_maps():
    embedding = SpatialEmbedding(patches=5, dim=3, state_dim=2, out=4).double()
    x, state = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    linear, norm, _ = embedding.project
    for b in range(2):
        expected = torch.zeros(4, dtype=torch.float64)
        for channel in range(3):
            projected = linear.weight @ torch.cat([x[b, :, channel], state[b]]) + linear.bias
            normed = F.layer_norm(projected, (4,), norm.weight, norm.bias)
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
    policy = Policy(2, 2, cameras=1, **SIZES | dict(chunk=3))
    policy.set_limits(obs_min=[-2.0, 0.0], obs_max=[4.0, 10.0])
    policy.set_limits(action_min=[-0.5, -1.0], action_max=[0.5, 3.0])
    state, rgb = np.array([[-2, 0], [4, 10], [1, 5]], np.float32), np.full((3, 3, 96, 96), 7, np.uint8)
    obs = policy.observe({"state": state, "rgb": rgb})
    np.testing.assert_allclose(obs["state"], [[-1, -1], [1, 1], [0, 0]], atol=1e-6)
    assert obs["rgb"].dtype == torch.uint8
    action = torch.tensor([[-1.0, -1, 1, 1, 0, 0]])  # three actions, one after the other
    np.testing.assert_allclose(policy.to_env(action), [[[-0.5, -1], [0.5, 3], [0, 1]]], atol=2e-6)


@pytest.mark.parametrize("cameras", [0, 2])
def test_policy_file_round_trip_with_its_encoder(tmp_path, cameras):
    policy = small_policy(cameras)
    policy.save(tmp_path / "policy.safetensors", fast_render=False)
    loaded = Policy.load(tmp_path / "policy.safetensors")
    assert (loaded.config, loaded.info) == (policy.config, {"fast_render": False})
    assert changed(loaded, policy.state_dict()) == set()


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


def test_augment_shifts_images_and_leaves_states_and_its_input():
    obs, state = observations(4, 1), observations(3)
    before = obs["rgb"].clone()
    new = rldt_robomimic.augment(obs)
    assert new["state"] is obs["state"]
    assert new["rgb"].dtype == torch.uint8
    assert not torch.equal(new["rgb"], before)
    assert torch.equal(obs["rgb"], before)
    assert rldt_robomimic.augment(state) == state


# --------------------------------------------------------------------------------- critic's updates
def random_batch(T=3, L=2, **kwargs):
    obs = observations(T * L, **kwargs)
    next_obs = {name: value.view(T, L, *value.shape[1:]) for name, value in obs.items()}
    batch = {"next_obs": next_obs, "reward": torch.zeros(T, L), "terminated": torch.zeros(T, L)}
    batch["reward"][1, 0] = batch["terminated"][1, 0] = 1
    return batch


@pytest.mark.parametrize("mode", ["state", "shared", "own"])
def test_critic_target_is_the_smaller_value_of_the_target_networks_at_a_policy_action(unshifted, mode):
    args = arguments(td_lambda=0.4, gamma=0.9)
    policy = small_policy(cameras=mode != "state")
    target = small_critic(policy, own=mode == "own")
    target.biases[-1].data.fill_(0.5)  # values inside [0, 1]
    T, L = (3, 2) if mode == "state" else (2, 2)
    batch = random_batch(T, L, cameras=mode != "state")
    torch.manual_seed(1)
    y = critic_target(policy, target, batch, args)
    torch.manual_seed(1)
    noise, value = torch.randn(T * L, policy.action_size).view(T, L, -1), torch.empty(T, L)
    for t, column in itertools.product(range(T), range(L)):
        following = {name: value[t, column][None] for name, value in batch["next_obs"].items()}
        cond = policy.encode(following)
        action = policy.sample(cond, noise[t, column][None])
        first, second = target(target.encoder(following) if mode == "own" else cond, action)
        value[t, column] = min(first.item(), second.item())
    expected = td_lambda(batch["reward"], batch["terminated"], value, 0.9, 0.4)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert y[1, 0].item() == 1
    assert not y.requires_grad


def test_images_are_augmented_in_every_update(unshifted):
    for function, states in ("critic_target", 6), ("update_critic", 5), ("update_actor", 4):
        unshifted.clear()
        updates(function, arguments(n_particles=2), "own")
        assert unshifted == [(states, 4)]


def updates(function, args, mode, policy=None, critic=None):
    """Runs one update on random images: 6 of critic_target, 5 of update_critic, 4 of update_actor."""
    policy = policy or small_policy(cameras=1)
    critic = critic or small_critic(policy, own=mode == "own")
    target = copy.deepcopy(critic).requires_grad_(False)
    if function == "critic_target":
        critic_target(policy, target, random_batch(3, 2, cameras=1), args)
    elif function == "update_critic":
        optimizer, batch = torch.optim.SGD(critic.parameters(), 0.1), (torch.randn(5, 4), torch.rand(5))
        update_critic(critic, target, policy, optimizer, observations(5, 1), *batch, args)
    else:
        reference = copy.deepcopy(policy).requires_grad_(False)
        optimizer = torch.optim.SGD(policy.parameters(), 0.1)
        update_actor(policy, reference, critic, optimizer, observations(4, 1), args)


ENCODERS = {  # that see every state once
    "own": {"critic_target": 2, "update_critic": 1, "update_actor": 3},
    "shared": {"critic_target": 1, "update_critic": 1, "update_actor": 2},
}


@pytest.mark.parametrize("mode", ["own", "shared"])
@pytest.mark.parametrize("n_particles, euler_steps", [(4, 8), (1, 2)])
def test_a_state_is_encoded_once_per_update_and_encoder(monkeypatch, mode, n_particles, euler_steps):
    encode, images = Encoder.forward, Counter()

    def counted(self, obs):
        images[id(self)] += len(obs["rgb"])
        return encode(self, obs)

    monkeypatch.setattr(Encoder, "forward", counted)
    policy = small_policy(cameras=1, euler_steps=euler_steps)
    for function, states in ("critic_target", 6), ("update_critic", 5), ("update_actor", 4):
        images.clear()
        updates(function, arguments(n_particles=n_particles), mode, policy)
        assert list(images.values()) == [states] * ENCODERS[mode][function]


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
def test_update_critic_descends_both_squared_errors_and_moves_the_target(unshifted, own, momentum):
    policy = small_policy(cameras=int(own))
    critic, args = small_critic(policy, own), arguments(target_momentum=momentum)
    target = copy.deepcopy(critic).requires_grad_(False)
    for parameter in target.parameters():
        parameter.add_(1.0)
    obs, action, y = observations(3, int(own)), torch.randn(3, 4), torch.rand(3)
    old_target = copied(target)
    q = critic(critic.encode(obs, policy), action)
    loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
    gradient = torch.autograd.grad(loss, list(critic.parameters()))
    expected = [p.detach() - 0.1 * g for p, g in zip(critic.parameters(), gradient, strict=True)]
    optimizer = torch.optim.SGD(critic.parameters(), 0.1)
    metrics = update_critic(critic, target, policy, optimizer, obs, action, y, args)
    torch.testing.assert_close([p.detach() for p in critic.parameters()], expected, rtol=1e-4, atol=1e-5)
    for key, new in critic.state_dict().items():
        expected = momentum * old_target[key] + (1 - momentum) * new
        torch.testing.assert_close(target.state_dict()[key], expected)
    assert metrics["losses/critic"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["diagnostics/q"].item() == pytest.approx(q.mean().item(), rel=1e-5)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_critic_without_encoder_is_that_of_rldt_gym(layer_norm):
    networks = []
    for script in (rldt_robomimic, rldt_gym):
        torch.manual_seed(1)
        networks.append(script.Critic(5, 3, layer_norm))
    cond, action = torch.randn(7, 5), torch.randn(7, 3)
    assert changed(networks[0], networks[1].state_dict()) == set()
    assert torch.equal(networks[0](cond, action), networks[1](cond, action))


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
    args = arguments(**dict(alpha=0.3, transport_scale=1.0, transport_loss="literal") | changes)
    k = torch.randint(K, (B, P))
    result = actor_losses(velocity, reference, critic or QuadraticCritic(), *conds, trajectory, args, k)
    x = trajectory[k, torch.arange(B)[:, None], torch.arange(P)]
    return velocity, reference, conds, trajectory, x, k / K, args, result


def gradients(velocity, scalar):
    return torch.autograd.grad(scalar, list(velocity.parameters()), retain_graph=True)


@pytest.mark.parametrize("kernel", ["rbf", "delta"])
@pytest.mark.parametrize("form", ["literal", "authors"])
def test_losses_are_those_of_rldt_gym(kernel, form):
    velocity, reference, conds, trajectory, *_, args, _ = losses(kernel=kernel, transport_loss=form)
    velocity, reference, cond = velocity.float(), reference.float(), conds[0].float()
    trajectory = trajectory.float()
    args.zero_fraction, k, results = 0.0, torch.randint(K, (B, P)), []
    for function, seen in (actor_losses, (cond, cond, cond)), (rldt_gym.actor_losses, (cond,)):
        torch.manual_seed(5)
        *three, metrics = function(velocity, reference, QuadraticCritic(), *seen, trajectory, args, k)
        results.append((three, metrics, [gradients(velocity, loss) for loss in three]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kernel", ["rbf", "delta"])
def test_transport_loss_can_take_the_gradient_from_the_particles(kernel):
    changes = dict(kernel=kernel, transport_scale=3.0, q_gradient="particles")
    velocity, _, conds, trajectory, x, t, args, (transport, *_) = losses(**changes)
    v = velocity(x, t, conds[0][:, None].expand(-1, P, -1))
    query = expected_target(x, t, v).detach()
    particles = query if kernel == "delta" else trajectory[-1]
    q = -0.75 * (particles - 1).square().sum(-1)
    phi = transport_field(query, particles, 3 * particle_gradient(q, particles), args.alpha, kernel)
    weight = -2 / K * (1 - t)
    expected = torch.autograd.grad(v, list(velocity.parameters()), weight[..., None] * phi / (B * P))
    torch.testing.assert_close(gradients(velocity, transport), expected)


def test_transport_scale_multiplies_the_gradient_of_q_and_not_the_other_losses():
    one, ten = (losses(kernel="delta", transport_scale=scale)[-1] for scale in (1.0, 10.0))
    torch.testing.assert_close(ten[0], 100 * one[0])
    torch.testing.assert_close(ten[1:3], one[1:3])
    for name in ("phi_norm", "grad_q_norm"):
        torch.testing.assert_close(ten[3][f"diagnostics/{name}"], 10 * one[3][f"diagnostics/{name}"])
    torch.testing.assert_close(ten[3]["diagnostics/q_policy"], one[3]["diagnostics/q_policy"])


@pytest.mark.parametrize("zero_fraction", [0.0, 1.0])
def test_constraint_is_taken_between_the_actions_and_the_noise_that_particles_start_from(zero_fraction):
    seen = {}

    def reference(x, t, cond):
        seen.update(x=x, t=t)
        return x

    trajectory, conds = torch.randn(K + 1, B, P, D), torch.zeros(3, B, 3)
    args = arguments(zero_fraction=zero_fraction)
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
    trajectory = torch.randn(K + 1, B, P, D)
    actor_losses(velocity("actor"), velocity("reference"), critic, *conds, trajectory, arguments())
    for i, name in enumerate(("actor", "reference", "critic")):
        each = seen[name].reshape(-1, B, P, 3)
        assert torch.equal(each, conds[i][:, None].expand(len(each), -1, P, -1))


@pytest.mark.parametrize("zero_fraction", [0.0, 0.5, 1.0])
def test_update_actor_steps_along_the_weighted_sum_of_its_losses(monkeypatch, zero_fraction):
    policy, seen = small_policy(), []
    bias = policy.velocity.trunk[0].bias

    def fake_losses(velocity, reference, critic, cond, cond_ref, cond_q, trajectory, args):
        seen.append(trajectory)
        nothing = sum(0 * p.sum() for p in policy.parameters())
        return nothing + bias.sum(), 10 * bias.sum(), 100 * bias.sum(), {}

    monkeypatch.setattr(rldt_robomimic, "actor_losses", fake_losses)
    weights = dict(consistency_weight=0.7, constraint_weight=0.2)
    args = arguments(n_particles=6, zero_fraction=zero_fraction, **weights)
    before, obs = bias.detach().clone(), observations(50)
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    metrics = update_actor(policy, copy.deepcopy(policy), small_critic(policy), optimizer, obs, args)
    torch.testing.assert_close(bias.detach(), before - 0.1 * (1 + 0.7 * 10 + 0.2 * 100))
    assert metrics["diagnostics/actor_grad_norm"].item() == pytest.approx(28 * 4)  # of 16 equal numbers
    (trajectory,) = seen
    assert trajectory.shape == (5, 50, 6, 4)
    assert not trajectory.requires_grad
    zero = (trajectory[0] == 0).all(-1).float()
    assert zero.mean().item() == pytest.approx(zero_fraction, abs=0.1)
    some = (zero.mean(1) > 0).float().mean().item()  # of the states: zeros are drawn per particle
    assert some == pytest.approx(1 - (1 - zero_fraction) ** 6, abs=0.1)
    bias.data.copy_(before)
    with torch.no_grad():
        again = policy.sample(obs["state"][:, None].expand(-1, 6, -1), trajectory[0], trajectory=True)
    torch.testing.assert_close(trajectory, again)


# -------------------------------------------------------------------------------------- replay
CAPACITY, T, N = 3, 10, 4


def numbered(added, valid=None, succeeded=None):
    """A replay whose rows encode where they lie: 1000 rollout + 100 environment + time."""
    args = arguments(buffer_iterations=CAPACITY, rollout_chunks=T, num_envs=N)
    replay = Replay(args, small_policy(state_dim=2))
    for rollout in range(added):
        slot = replay.next()
        code = 1000.0 * rollout + 100 * torch.arange(N) + torch.arange(T + 1)[:, None]
        slot["state"].copy_(code[..., None].expand(-1, -1, 2))
        slot["action"].copy_(code[:-1, :, None].expand(-1, -1, 4))
        slot["reward"].copy_(code[:-1])
        slot["valid"].copy_(torch.ones(T, N) if valid is None else valid)
        slot["succeeded"].copy_(torch.zeros(T, N) if succeeded is None else succeeded)
    return replay


@given(added=st.integers(1, 7), length=st.integers(1, T + 3), count=st.integers(1, 40))
def test_segments_are_consecutive_rows_of_one_environment_that_begin_validly(added, length, count):
    valid, succeeded = (torch.rand(T, N) < 0.7).float(), (torch.rand(T, N) < 0.3).float()
    valid[0] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rldt_robomimic, "SEGMENT", length)
        batch = numbered(added, valid, succeeded).draw(count)
    length = min(length, T)
    assert batch["action"].shape == (length, count, 4)
    first = batch["reward"][0]
    codes = first + torch.arange(length)[:, None]
    assert torch.equal(batch["reward"], codes)
    assert torch.equal(batch["action"], codes[..., None].expand(-1, -1, 4))
    assert torch.equal(batch["obs"]["state"], codes[..., None].expand(-1, -1, 2))
    assert torch.equal(batch["next_obs"]["state"], 1 + codes[..., None].expand(-1, -1, 2))
    assert (batch["valid"][0] == 1).all()
    assert (first // 1000 >= max(0, added - CAPACITY)).all()
    time, column = (codes % 100).long(), (first // 100 % 10).long().expand(length, -1)
    assert torch.equal(batch["valid"], valid[time, column])
    assert torch.equal(batch["succeeded"], succeeded[time, column])


@pytest.mark.parametrize("count", [1, 7, 24])
def test_half_of_the_segments_begin_in_successful_episodes_where_there_are_both_kinds(count):
    succeeded = torch.zeros(T, N)
    succeeded[2:5, 1] = 1  # few of them
    starts = numbered(4, succeeded=succeeded).starts(count, 2)
    good = succeeded[starts[:, 1], starts[:, 2]]
    assert good.sum() == -(-count // 2)


def test_a_success_that_cannot_begin_a_segment_does_not_count():
    succeeded = torch.zeros(T, N)
    succeeded[8:] = 1  # two rows, and segments of three
    assert (numbered(1, succeeded=succeeded).starts(8, 3)[:, 1] < 8).all()


@given(added=st.integers(1, 7), count=st.integers(1, 60))
def test_at_least_a_third_comes_from_the_newest_rollout(added, count):
    replay = numbered(added)
    assert (replay.starts(count, 2)[:, 0] == replay.slot).sum() >= 0.33 * count - 1e-9


def test_every_kept_rollout_environment_and_start_is_drawn():
    slot, time, column = (set(x.tolist()) for x in numbered(5).starts(20_000, 3).T)
    assert (slot, time, column) == ({0, 1, 2}, set(range(T - 2)), set(range(N)))


def test_replay_keeps_images_as_bytes_within_its_bound(monkeypatch, capsys):
    monkeypatch.setattr(rldt_robomimic, "REPLAY_GIB", 0.001)
    args = arguments(buffer_iterations=20, rollout_chunks=5, num_envs=2, encoder="own")
    replay = Replay(args, small_policy(1))
    assert replay.slots["rgb"].dtype == torch.uint8
    used = sum(value.nbytes for value in replay.slots.values())
    assert used <= 0.001 * 2**30 < used / replay.capacity * (replay.capacity + 1)
    assert f"keeps {replay.capacity} rollouts of 0.00031 GiB, not 20" in capsys.readouterr().out
    Replay(arguments(buffer_iterations=3, rollout_chunks=5, num_envs=2), small_policy())
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------- rollouts
def rollout(envs, policy=None, **changes):
    """Collects one rollout from fake environments; returns policy, rollout, steps and successes."""
    args = arguments(**dict(num_envs=envs.num_envs, buffer_iterations=1, encoder="own") | changes)
    policy = policy or small_policy(cameras=int(envs.images))
    replay = Replay(args, policy)
    for value in replay.slots.values():
        value.fill_(77)  # as if left from an older rollout
    torch.manual_seed(2)
    steps, successes = collect(policy, envs, replay.next(), 100, args)
    return policy, replay.newest(), steps, successes


def scripted(num_envs, lengths, solved, **kwargs):
    """Episodes of seeds 100, 101, ... of `lengths` chunks, solved from `solved` on (None: never)."""
    solves = lambda seed, t, chunk: solved[seed - 100] is not None and t >= solved[seed - 100]
    return FakeEnvs(num_envs, lambda seed: lengths[seed - 100], solves, **kwargs)


# Three environments, seven rows each. Episode 100 is solved in its second chunk, 101 does not end within
# the rollout, 102 meets the time limit after three chunks. Then come 103 (time limit after three) and
# 104 (solved in its third); 105 and 106 are still running at the end.
LENGTHS, SOLVED = [5, 20, 3, 3, 5, 9, 9], [1, None, None, None, 2, None, None]
ROWS = [[(100, 0), (100, 1), (103, 0), (103, 1), (103, 2), (105, 0), (105, 1), (105, 2)],
        [(101, t) for t in range(8)],
        [(102, 0), (102, 1), (102, 2), (104, 0), (104, 1), (104, 2), (106, 0), (106, 1)]]  # fmt: skip
SUCCESS = [[0, 1, 0, 0, 0, 0, 0], [0] * 7, [0, 0, 0, 0, 0, 1, 0]]
LIMIT = [[0, 0, 0, 0, 1, 0, 0], [0] * 7, [0, 0, 1, 0, 0, 0, 0]]
SUCCEEDED = [[1, 1, 0, 0, 0, 0, 0], [0] * 7, [0, 0, 0, 1, 1, 1, 0]]


def table(*parts):
    """Sum of tables with a list per environment -> (rows, environments)."""
    return np.sum([np.array(part, float) for part in parts], 0).T.tolist()


def test_rollout_of_scripted_episodes():
    envs = scripted(3, LENGTHS, SOLVED)
    policy, slot, steps, successes = rollout(envs, rollout_chunks=7)
    assert envs.begun == [100, 101, 102, 103, 104, 105, 106]
    assert (slot["valid"] == 1).all()
    assert slot["reward"].tolist() == table(SUCCESS)
    assert slot["terminated"].tolist() == table(SUCCESS, LIMIT)
    assert slot["succeeded"].tolist() == table(SUCCEEDED)
    for column, rows in enumerate(ROWS):
        for row, episode in enumerate(rows):
            seen = policy.observe(envs.observation(*episode))
            assert torch.equal(slot["state"][row, column], seen["state"])
    assert successes == [1, 0, 0, 1]
    assert steps == sum(envs.steps.values()) == 2 * 7 * 3 - 4  # an episode's last chunk is one step here
    for row, chunks in zip(slot["action"], envs.executed, strict=True):
        np.testing.assert_array_equal(policy.to_env(row), chunks)


def test_episodes_that_go_on_after_success_are_masked_there():
    # 100 is solved in chunk 1 of 4, 101 never; 102, after 100, is solved at once and does not end
    envs = scripted(2, [4, 20, 9], [1, None, 0], stop=False)
    _, slot, steps, successes = rollout(envs, rollout_chunks=8, stop_on_success=False)
    assert slot["valid"][:, 0].tolist() == [1, 1, 0, 0, 1, 0, 0, 0]
    assert slot["reward"][:, 0].tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
    ended = (slot["terminated"] * slot["valid"])[:, 0].tolist()
    assert ended == [0, 1, 0, 0, 1, 0, 0, 0]
    assert slot["succeeded"][:, 0].tolist() == [1] * 8
    assert slot["succeeded"][:, 1].tolist() == [0] * 8
    assert steps == 2 * 16 - 1
    assert successes == [1]


def test_success_at_the_time_limit_is_a_success():
    envs = scripted(1, [2, 2, 2, 2], [1, 1, 1, 1], stop=False)
    _, slot, _, successes = rollout(envs, rollout_chunks=6, stop_on_success=False)
    assert slot["reward"][:, 0].tolist() == slot["terminated"][:, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert slot["succeeded"][:, 0].tolist() == [1] * 6
    assert successes == [1, 1, 1]


@pytest.mark.parametrize("encoder", ["frozen", "shared", "own"])
def test_replay_holds_images_or_with_a_frozen_encoder_features(encoded, encoder):
    envs = scripted(2, [2, 9, 9], [None] * 3, images=True)
    policy, slot, *_ = rollout(envs, rollout_chunks=4, encoder=encoder)
    assert ("rgb" in slot) == (encoder != "frozen")
    assert sum(encoded) == 2 * (5 if encoder == "frozen" else 4)  # frozen: never again
    for column, rows in enumerate([[(100, 0), (100, 1), (102, 0)], [(101, t) for t in range(5)]]):
        for row, episode in enumerate(rows):
            raw = {name: value[None] for name, value in envs.observation(*episode).items()}
            obs = policy.observe(raw)
            if encoder == "frozen":
                expected = policy.encode(obs)[0].detach()
                torch.testing.assert_close(slot["state"][row, column], expected, rtol=1e-3, atol=1e-4)
            else:
                assert torch.equal(slot["state"][row, column], obs["state"][0])
                assert torch.equal(slot["rgb"][row, column], obs["rgb"][0])


@pytest.mark.parametrize("exploration_steps, noisy", [(0, False), (1, False), (4, True)])
def test_exploration_adds_noise_only_from_steps_before_the_last(exploration_steps, noisy):
    changes = dict(rollout_chunks=3, exploration_steps=exploration_steps, zero_fraction=0.0)
    policy, slot, *_ = rollout(scripted(4, [20] * 4, [None] * 4), **changes)
    torch.manual_seed(2)
    clean = policy.sample(slot["state"][0])
    assert torch.allclose(slot["action"][0], clean, atol=1e-5) != noisy


@pytest.mark.parametrize("fraction, count", [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_share_of_the_environments_acts_from_zero(fraction, count):
    changes = dict(rollout_chunks=7, exploration_steps=0, zero_fraction=fraction)
    policy, slot, *_ = rollout(scripted(4, [20] * 4, [None] * 4), **changes)
    deterministic = policy.sample(slot["state"][:-1], torch.zeros(7, 4, 4))
    same = (slot["action"] - deterministic).abs().amax((0, 2)) < 1e-5
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
@pytest.mark.parametrize("stop", [False, True])
def test_evaluation_runs_every_initial_state_once_from_zero_and_once_from_noise(num_envs, stop):
    starts = {}

    def solves(seed, t, chunk):
        zero = not chunk.any()
        starts.setdefault((seed, zero), []).append(t)
        return t == seed % 2 and seed % 3 == (0 if zero else 1)

    envs = FakeEnvs(num_envs, lambda seed: 2 + seed % 3, solves, stop=stop)
    scores = evaluate(Identity(), envs, arguments(), episodes=7, seed=50)
    zero, noise = (np.array([(50 + j) % 3 == rest for j in range(7)]) for rest in (0, 1))
    assert scores == summary(zero, "eval_success") | summary(noise, "eval_success_sampled")
    assert Counter(envs.begun) == {50 + j: 2 for j in range(7)}
    for (seed, zero), times in starts.items():  # from start to end, from x_0 of one kind
        solved = stop and seed % 3 == (0 if zero else 1)
        assert times == list(range(1 + seed % 2 if solved else 2 + seed % 3))


def test_evaluation_draws_its_own_noise():
    seen = []
    envs = FakeEnvs(2, lambda seed: 3, lambda seed, t, chunk: seen.append(chunk.copy()) or False)
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
def test_summary_is_the_mean_with_wilsons_interval(k, n):
    z, p = 1.959963984540054, k / n
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    expected = {"x": p, "x_low": center - half, "x_high": center + half}
    assert summary(np.arange(n) < k, "x") == pytest.approx(expected, abs=1e-9)


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
        policy.save(paths[obs], task="lift")
    return paths


def get_base(path, runs, **changes):
    args = arguments(**dict(task="lift", runs=runs, seed=1) | changes)
    args.base = path
    return rldt_robomimic.get_base(args, Run(args, "base"))


@pytest.mark.parametrize("kind, task, obs", [
    ("state", "square", "state"), ("state", "transport", "state"), ("state", "lift", "image"),
    ("image", "lift", "state"), ("image", "transport", "image"),
])  # fmt: skip
def test_base_policy_that_does_not_fit_stops_in_one_line(bases, tmp_path, kind, task, obs):
    message = rf"{kind}\.safetensors: not a policy for {task} with --obs {obs}"
    with pytest.raises(SystemExit, match=message):
        get_base(bases[kind], tmp_path, task=task, obs=obs)


@pytest.mark.parametrize("task", ["lift", "square", "transport"])
@pytest.mark.parametrize("obs", ["state", "image"])
def test_shipped_base_policy_fits_its_task_and_is_kept_by_the_run(tmp_path, task, obs):
    policy = get_base(None, tmp_path, task=task, obs=obs)
    assert policy.chunk == rldt_robomimic.TASKS[task].chunk
    assert all(value.isfinite().all() for value in policy.state_dict().values())
    assert all(not p.requires_grad for p in policy.encoder.parameters()) if policy.cameras else True
    kept = Policy.load(only_run(tmp_path) / "base.safetensors")
    assert changed(kept, policy.state_dict()) == set()
    assert kept.info["validation_loss"] > 0


@pytest.mark.parametrize("obs", ["state", "image"])
def test_missing_demonstrations_are_made_by_commands_of_the_maker(monkeypatch, tmp_path, obs):
    made = []

    def run(command, cwd):
        assert command[:3] == [sys.executable, "-m", "demos.make_robomimic_demos"]
        args = tyro.cli(make_robomimic_demos.Args, args=list(map(str, command[3:])))
        assert args.images_from is None or args.images_from.exists()
        made.append(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("demonstrations")
        return types.SimpleNamespace(returncode=0)

    module = rldt_robomimic.dataset
    monkeypatch.setattr(module, "DEMOS", tmp_path)
    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "load", lambda *args, **kwargs: (args, kwargs))
    name = "image.hdf5" if obs == "image" else "low_dim.hdf5"
    expected = (tmp_path / "lift" / name, "lift", obs == "image"), {"fast_render": False}
    for _ in range(2):  # the second time they are there
        assert module.get("lift", obs, None, False) == expected
    files = [(args.task, args.out.name, args.images_from is None) for args in made]
    assert files == [("lift", "low_dim.hdf5", True), ("lift", "image.hdf5", False)][: len(files)]
    assert len(files) == 1 + (obs == "image")
    assert not made[-1].fast_render or obs == "state"


def demonstrations(lengths=(3, 17, 20), images=False):
    """Episodes whose first state and action are the step number, whose second action is the episode."""
    ends = np.cumsum(lengths)
    steps = np.arange(ends[-1], dtype=np.float32)
    action = np.stack([steps, 1 + np.digitize(steps, ends)] + [steps + 2] * 5, 1).astype(np.float32)
    state = np.stack([steps] + [-1 - steps] * (8 if images else 18), 1)
    data = {"state": state, "action": action, "episode_ends": ends, "meta": {}}
    if images:
        shape = len(steps), 3, 96, 96
        data["rgb"] = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    return data


def pretrain(data, checkpoint=None, **changes):
    settings = dict(epochs=1, batch=8, lr=1e-3, head_steps=0) | SIZES | changes
    args = arguments(task="lift", obs="image" if "rgb" in data else "state")
    return rldt_robomimic.pretrain(args, data, checkpoint, **settings)


def test_pretraining_chunks_are_consecutive_and_stay_inside_an_episode(monkeypatch):
    seen, loss = [], rldt_robomimic.flow_matching_loss
    recorded = lambda v, a, o: seen.append((a, o)) or loss(v, a, o)
    monkeypatch.setattr(rldt_robomimic, "flow_matching_loss", recorded)
    policy = pretrain(demonstrations(), epochs=60)
    chunk, obs = torch.cat([a for a, _ in seen]).view(-1, 4, 7), torch.cat([o for _, o in seen])
    raw = torch.as_tensor(policy.to_env(chunk.flatten(1))).round()
    assert (raw[:, 1:, 0] - raw[:, :-1, 0] == 1).all()
    assert (raw[:, :, 1] == raw[:, :1, 1]).all()
    assert ((obs[:, 0] + 1) / 2 * 39).round().tolist() == raw[:, 0, 0].tolist()
    assert set(raw[:, 0, 0].int().tolist()) == {*range(3, 17), *range(20, 37)}


def test_scaling_is_the_range_of_the_demonstrations_and_zero():
    policy = pretrain(demonstrations())
    limits = policy.obs_min[0], policy.obs_max[0], policy.obs_min[1], policy.obs_max[1]
    assert limits == (0, 39, -40, 0)
    assert (policy.action_min[1], policy.action_max[1], policy.action_max[2]) == (0, 3, 41)


def test_pretraining_on_images_trains_the_encoder_on_shifted_images(unshifted):
    torch.manual_seed(0)
    first = copied(Policy(9, 7, cameras=1, **SIZES))
    torch.manual_seed(0)
    policy = pretrain(demonstrations((8, 30), images=True))
    assert {name for name, _ in policy.named_parameters()} <= changed(policy, first)
    assert {pixels for _, pixels in unshifted} == {4}


def test_pretraining_goes_on_where_it_was_cut_off_unless_its_settings_changed(monkeypatch, tmp_path):
    def run(path, stop_at=math.inf):
        """The policy, None if cut off, and the number of losses computed here."""
        loss, calls = rldt_robomimic.flow_matching_loss, []

        def counted(*args):
            calls.append(1)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return loss(*args)

        torch.manual_seed(3)
        with monkeypatch.context() as patch:
            patch.setattr(rldt_robomimic, "flow_matching_loss", counted)
            try:
                return pretrain(demonstrations(), path, epochs=170), len(calls)
            except KeyboardInterrupt:
                return None, len(calls)

    whole, steps = run(None)
    assert run(tmp_path / "unfinished", stop_at=550) == (None, 550)
    continued, rest = run(tmp_path / "unfinished")
    assert rest == steps - 500
    assert continued.info == whole.info
    assert changed(continued, whole.state_dict()) == set()
    with pytest.raises(SystemExit, match=r"unfinished: cannot be resumed .*other settings or data"):
        pretrain(demonstrations(), tmp_path / "unfinished", epochs=170, lr=2e-3)


def test_velocity_network_is_pretrained_further_on_images_encoded_once(monkeypatch, encoded, unshifted):
    monkeypatch.setattr(rldt_robomimic, "COPIES", 3)
    policies, images, data = [], [], demonstrations((30, 30), images=True)
    for head_steps in (0, 300):
        encoded.clear()
        unshifted.clear()
        torch.manual_seed(0)
        policies.append(pretrain(data, head_steps=head_steps))
        images.append(sum(encoded))
    chunks = 2 * (30 - 4 + 1)
    held_out = chunks // 20
    assert images[1] == images[0] + 3 * (chunks - held_out)  # whatever the number of steps
    first, more = (policy.state_dict() for policy in policies)
    for name, value in more.items():
        assert torch.equal(value, first[name]) != name.startswith("velocity."), name


# ----------------------------------------------------------------------------------- arguments
def resolved(*argv):
    args = parse_args(Args, rldt_robomimic.PRESETS, "", list(argv))
    rldt_robomimic.resolve(args)
    return args


TASK_SETTINGS = {  # horizon, iterations, chunks of a rollout, steps of the exploration
    "lift": (300, 40, 200, 2), "can": (300, 120, 400, 2),
    "square": (400, 120, 400, 2), "transport": (800, 120, 400, 0),
}  # fmt: skip


@pytest.mark.parametrize("task", list(TASK_SETTINGS))
def test_the_task_decides_what_is_not_given(task):
    names = "horizon", "iterations", "rollout_chunks", "exploration_steps"
    values = lambda args: tuple(getattr(args, name) for name in names)
    assert values(resolved("--task", task)) == TASK_SETTINGS[task]
    flags = ["--horizon=8", "--iterations=3", "--rollout-chunks=50", "--exploration-steps=1"]
    assert values(resolved("--task", task, *flags)) == (8, 3, 50, 1)
    assert values(resolved("--task", task, "--preset=paper"))[1:] == (200, 200, 2)
    assert resolved("--task", task, "--wall-budget-s=60").iterations == 0


def test_gradient_of_the_particles_needs_two_of_them():
    assert resolved("--q-gradient=particles", "--n-particles=2").n_particles == 2
    with pytest.raises(SystemExit, match="--q-gradient particles needs --n-particles"):
        resolved("--q-gradient=particles", "--n-particles=1")


# ------------------------------------------------------------------- whole runs without simulators
def flags(base, runs, **changes):
    """Flags of a run of four iterations, the first and the last of which evaluate."""
    values = dict(
        task="lift", base=base, runs=runs, device="cpu", threads=1, seed=3, iterations=4, num_envs=2,
        horizon=40, rollout_chunks=13, buffer_iterations=2, eval_every=10, eval_episodes=2,
        final_eval_episodes=3, rounds=2, critic_steps=2, critic_batch=8, segments=6, warmup_iterations=1,
        actor_steps=1, actor_batch=4, n_particles=2, actor_lr=1e-3,
    ) | changes  # fmt: skip
    result = []
    for key, value in values.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{'' if value else 'no-'}{name}")
        else:
            result.append(f"--{name}={value}")
    return result


def only_run(runs):
    (run,) = runs.iterdir()
    return run


def metrics(run):
    """The rows of metrics.csv without the columns of wall time."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return [{key: value for key, value in row.items() if key not in WALL_COLUMNS} for row in rows]


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def assert_same_networks(run, other):
    for name in ("policy", "critic", "target", "reference"):
        expected = checkpoint(other)[name]
        for key, value in checkpoint(run)[name].items():
            assert torch.equal(value, expected[key]), (name, key)


def main(argv):
    return rldt_robomimic.main(parse_args(Args, rldt_robomimic.PRESETS, "", list(map(str, argv))))


@pytest.fixture(scope="module")
def _fakes():
    """Episodes of up to 5 chunks instead of simulators; the actions decide whether one succeeds."""
    made = []

    def make_envs(args, policy):
        solves = lambda seed, t, chunk: t >= 1 and math.sin(100 * chunk.sum()) > 0.6
        kwargs = dict(stop=args.stop_on_success, action_dim=7, state_dim=policy.obs_dim)
        length = lambda seed: 3 + seed % 3
        made.append(FakeEnvs(args.num_envs, length, solves, args.obs == "image", **kwargs))
        return made[-1]

    return made, make_envs


@pytest.fixture
def fakes(_fakes, monkeypatch):
    """Runs main() on fake environments, and short segments; the list holds those that were made."""
    monkeypatch.setattr(rldt_robomimic, "make_envs", _fakes[1])
    monkeypatch.setattr(rldt_robomimic, "SEGMENT", 3)
    _fakes[0].clear()
    return _fakes[0]


@pytest.mark.parametrize("changes", [
    dict(td_lambda=0.0, critic_layer_norm=False, exploration_steps=0),
    dict(transport_loss="literal", kernel="delta", reference_every=0, bf16=False, n_particles=1),
    dict(obs="image", encoder="shared", rounds=1),
    dict(obs="image", encoder="own", stop_on_success=False, rounds=1),
    dict(obs="image", encoder="frozen", reference_every=1),
])  # fmt: skip
def test_run_with_the_other_choices_trains_what_it_should(fakes, bases, tmp_path, changes):
    obs, encoder = changes.get("obs", "state"), changes.get("encoder", "frozen")
    given = dict(iterations=3, warmup_iterations=0, segments=3) | changes
    result = main(flags(bases[obs], tmp_path, **given))
    run = only_run(tmp_path)
    assert np.isfinite([result["final_success"], result["final_success_sampled"]]).all()
    rows, saved = metrics(run), checkpoint(run)
    assert any(row["train_success"] for row in rows)
    assert float(rows[2]["diagnostics/base_distance"]) > 0
    base = Policy.load(run / "base.safetensors").state_dict()
    differ = [key for key, value in saved["policy"].items() if not torch.equal(value, base[key])]
    moved = {key.split(".")[0] for key in differ}
    assert moved == ({"velocity"} if encoder == "frozen" else {"velocity", "encoder"})
    followed = all(torch.equal(value, saved["policy"][key]) for key, value in saved["reference"].items())
    assert followed == (changes.get("reference_every") == 1)
    own, slot = encoder == "own", torch.load(run / "checkpoint.replay0", weights_only=True)
    steps = [group["lr"] for group in saved["critic_optimizer"]["param_groups"]]
    assert steps == [5e-4, 4e-5][: 1 + own]
    assert ("encoder.vits.0.position" in saved["critic"]) == own
    assert ("rgb" in slot) == (encoder != "frozen")
    assert slot["state"].shape == (14, 2, {"state": 19, "image": 9 + 128 * (encoder == "frozen")}[obs])
    assert all(envs.closed for envs in fakes)


def test_training_follows_its_schedules(fakes, bases, tmp_path, monkeypatch):
    calls, critic, actor = {"critic": [], "actor": []}, update_critic, update_actor

    def count_critic(*args):
        calls["critic"].append(len(args[-2]))
        return critic(*args)

    def count_actor(*args):
        calls["actor"].append(args[3].param_groups[0]["lr"])
        return actor(*args)

    monkeypatch.setattr(rldt_robomimic, "update_critic", count_critic)
    monkeypatch.setattr(rldt_robomimic, "update_actor", count_actor)
    monkeypatch.setattr(rldt_robomimic, "ACTOR_WARMUP", 3)
    main(flags(bases["state"], tmp_path, actor_lr=0.01, actor_lr_end=0.5))
    assert calls["critic"] == [8] * 3 * 2 * 2  # iterations, rounds, steps
    decay = [1 - 0.5 * iteration / 4 for iteration in (2, 2, 3, 3)]
    rates = [0.01 * d * w for d, w in zip(decay, (1 / 3, 2 / 3, 1, 1), strict=True)]
    assert calls["actor"] == pytest.approx(rates)
    rows = metrics(only_run(tmp_path))
    for i, row in enumerate(rows):
        assert (row["eval_success"] != "") == (i in (0, 4))
        assert (row["losses/critic"] != "") == (i in (1, 2, 3))
        assert (row["losses/transport"] != "") == (i in (2, 3))
    assert float(rows[1]["diagnostics/base_distance"]) == 0
    assert float(rows[3]["diagnostics/base_distance"]) > 0
    (envs,) = fakes
    trained = [steps for seed, steps in envs.steps.items() if seed >= 100_000_000]
    assert int(rows[-1]["env_steps"]) == sum(trained)


def test_states_after_success_reach_neither_update(fakes, bases, tmp_path, monkeypatch):
    used = []
    for name in ("update_critic", "update_actor"):
        update = getattr(rldt_robomimic, name)
        recorded = lambda *args, update=update: used.append(args[4]["state"]) or update(*args)
        monkeypatch.setattr(rldt_robomimic, name, recorded)
    main(flags(bases["state"], tmp_path, segments=40, stop_on_success=False))
    (envs,) = fakes
    valid = {seed % 100_000: chunks for seed, chunks in envs.valid.items() if seed >= 100_000_000}
    last = []
    for state in torch.cat(used):
        seed, t = round(state[0].item() * 100_000), round(state[1].item() * 10)
        last.append(valid[seed] - 1 - t)
    assert min(last) == 0  # the state in which the task is solved, or before the limit, but none after
    assert any(chunks < 3 for chunks in valid.values())  # an episode is at least so long


def test_best_policy_is_measured_again_on_other_episodes(fakes, bases, tmp_path, monkeypatch):
    seen, shares = [], iter([0.25, 0.75, 0.25, 0.5])  # base, middle, final, best again

    def evaluated(policy, envs, args, episodes, seed):
        assert not envs.closed
        seen.append((episodes, seed))
        return {"eval_success": next(shares)}

    monkeypatch.setattr(rldt_robomimic, "evaluate", evaluated)
    result = main(flags(bases["state"], tmp_path, eval_every=2, eval_episodes=3, final_eval_episodes=4))
    assert seen == [(4, 4_000_000), (3, 4_000_000), (4, 4_000_000), (4, 4_500_000)]
    assert [result[f"{name}_success"] for name in ("base", "final", "best")] == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("pretrains", [False, True])
def test_run_that_crashed_and_is_resumed_gives_the_metrics_of_one_that_did_not(
    monkeypatch, fakes, bases, tmp_path, pretrains
):
    settings = dict(epochs=2, batch=32, lr=1e-3, head_steps=0) | SIZES
    settings.pop("chunk")  # the task's
    monkeypatch.setitem(rldt_robomimic.PRETRAINING, "laptop", {"state": settings})
    data = demonstrations((40,) * 4)
    monkeypatch.setattr(rldt_robomimic.dataset, "get", lambda *args: data)
    argv = flags(bases["state"], tmp_path / "whole")
    if pretrains:
        argv = ["--pretrain", *(flag for flag in argv if not flag.startswith("--base"))]
    main(argv)
    calls = []

    def crash(*args):
        calls.append(1)
        if len(calls) == 10:  # in the third training iteration
            raise RuntimeError("crash")
        return update_critic(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rldt_robomimic, "update_critic", crash)
        with pytest.raises(RuntimeError, match="crash"):
            main([*argv, f"--runs={tmp_path / 'parts'}"])  # the last flag counts
    whole, run = only_run(tmp_path / "whole"), only_run(tmp_path / "parts")
    assert checkpoint(run)["progress"]["iteration"] == 3
    monkeypatch.setattr(rldt_robomimic.dataset, "get", None)  # the run has its base
    main(["--resume", run])
    assert metrics(run) == metrics(whole)
    assert any(0 < float(row["train_success"] or 0) < 1 for row in metrics(run))  # it tests something
    assert_same_networks(run, whole)


# ---------------------------------------------------------------------- whole runs on robosuite
def test_run_on_robosuite_writes_its_files_and_after_ctrl_c_goes_on_as_if_never_stopped(
    monkeypatch, bases, tmp_path
):
    monkeypatch.setattr(rldt_robomimic, "SEGMENT", 3)
    returned = main(flags(bases["state"], tmp_path / "whole", final_eval_episodes=2))
    whole = only_run(tmp_path / "whole")
    assert whole.name.startswith("lift-state__rldt__3__")
    result, rows = json.loads((whole / "result.json").read_text()), metrics(whole)
    assert result == json.loads(json.dumps(returned))
    for name, row in ("base", rows[0]), ("final", rows[-1]):
        for end in ("success", "success_low", "success_high", "success_sampled", "success_sampled_low"):
            assert result[f"{name}_{end}"] == pytest.approx(float(row[f"eval_{end}"]))
    steps = np.diff([int(row["env_steps"]) for row in rows]).tolist()
    assert steps == [2 * 13 * 4] * 3 + [0]
    slot = torch.load(whole / "checkpoint.replay1", weights_only=True)  # of the second iteration
    assert slot["state"].shape == (14, 2, 19)
    assert slot["terminated"].tolist() == [[0, 0]] * 9 + [[1, 1]] + [[0, 0]] * 3  # chunks of 40 steps
    assert (slot["state"][1:] != slot["state"][:-1]).any(-1).all()
    scores = main(["--evaluate", whole])
    assert scores == {name: result[name.replace("eval", "final")] for name in scores}

    calls = []

    def pressed(*args):
        calls.append(1)
        if len(calls) == 5:  # a terminal sends it to every process
            for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
                os.kill(pid, signal.SIGINT)
        return update_critic(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rldt_robomimic, "update_critic", pressed)
        with pytest.raises(SystemExit, match="Continue with --resume"):
            main(flags(bases["state"], tmp_path / "parts", final_eval_episodes=2))
    assert len(calls) == 2 * 4  # the whole iteration
    run = only_run(tmp_path / "parts")
    main(["--resume", run])
    assert metrics(run) == metrics(whole)
    assert_same_networks(run, whole)


@pytest.mark.parametrize("encoder", ["frozen", "own"])
def test_run_on_robosuite_with_images_and_a_video(bases, tmp_path, encoder):
    changes = dict(
        task="square", obs="image", encoder=encoder, iterations=2, horizon=8, rollout_chunks=3,
        final_eval_episodes=1, rounds=1, warmup_iterations=0, segments=2, critic_batch=2, actor_batch=2,
        capture_video=encoder == "own",
    )  # fmt: skip
    result = main(flags(bases["image"], tmp_path, **changes))
    run = only_run(tmp_path)
    slot = torch.load(run / "checkpoint.replay0", weights_only=True)
    assert slot["terminated"].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert (result["task"], result["env_steps"]) == ("square-image", 2 * 3 * 4)
    if encoder == "own":
        assert slot["rgb"].shape == (4, 2, 3, 96, 96)
        assert slot["rgb"].float().std((2, 3, 4)).min() > 10  # a picture in every row
        assert (slot["rgb"][0] != slot["rgb"][1]).any()
        import imageio.v2 as imageio

        with imageio.get_reader(run / "videos" / "episode.mp4") as film:
            frames = list(film.iter_data())
        assert len(frames) == 8
        assert frames[0].std() > 10
    else:
        assert slot["state"].shape == (4, 2, 9 + 128)
