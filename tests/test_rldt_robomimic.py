"""rldt_robomimic.py: encoders, updates, replay, rollouts, base policies and whole runs."""

import copy
import itertools
import math
import signal
import sys
import types
from collections import Counter

import numpy as np
import pytest
import test_furniture_base
import torch
import torch.nn.functional as F
import tyro
from conftest import metrics, parse
from fakes import (
    SHORT,
    FakeEnvs,
    Identity,
    QuadraticCritic,
    check_crash_and_resume,
    checkpoint,
    only_run,
    same,
    words,
)

import rldt_furniture
import rldt_gym
import rldt_robomimic
from common.runs import Run
from demos import make_robomimic_demos
from demos.dataset import Demonstrations
from rldt_robomimic import (
    Critic,
    Encoder,
    Policy,
    Replay,
    critic_target,
    random_shift,
    td_lambda,
    update_actor,
    update_critic,
)

SIZES = dict(chunk=4, euler_steps=4, width=16, depth=3, time_dim=8)


def arguments(**changes):
    """Arguments of the functions below main()."""
    fixed = dict(device="cpu", bf16=False, horizon=20, exploration_steps=2)
    return rldt_robomimic.Args(**fixed | changes)


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
    seen = []
    monkeypatch.setattr(rldt_robomimic, "random_shift", lambda rgb, n: seen.append((len(rgb), n)) or rgb)
    return seen


class Simulators(FakeEnvs):
    """Fake environments whose observations are robomimic's: dicts, some with images."""

    def __init__(self, *args, images=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.images = images

    def observation(self, seed, t):
        obs = {"state": super().observation(seed, t)}
        if self.images:
            rng = np.random.default_rng([seed, t])
            obs["rgb"] = rng.integers(256, size=(3, 96, 96), dtype=np.uint8)
        return obs

    @property
    def obs(self):
        each = [self.observation(seed, t) for seed, t in zip(self.seed, self.t, strict=True)]
        return {name: np.stack([obs[name] for obs in each]) for name in each[0]}


# ------------------------------------------------------------------------------------ networks
def test_spatial_embedding_weights_the_channels_of_projected_maps():
    embedding = rldt_robomimic.SpatialEmbedding(patches=5, dim=3, state_dim=2, out=4).double()
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
    vit = rldt_robomimic.ViT(dim=8, heads=2).double()
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
    (features + moved).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


# --------------------------------------------------------------------------------- augmentation
def test_random_shift_moves_each_image_by_its_own_shift_and_repeats_its_border():
    rgb, found = torch.arange(60 * 2 * 7 * 9).view(60, 2, 7, 9), set()  # a pixel is known by its value
    shifted = random_shift(rgb, 2)
    y, x = torch.meshgrid(torch.arange(7), torch.arange(9), indexing="ij")
    for before, after in zip(rgb, shifted, strict=True):
        shifts = []
        for dy, dx in itertools.product(range(-2, 3), repeat=2):
            if torch.equal(before[:, (y + dy).clamp(0, 6), (x + dx).clamp(0, 8)], after):
                shifts.append((dy, dx))
        assert len(shifts) == 1
        found.update(shifts)
    assert len(found) > 15  # of 25, in 60 images
    assert {dy for dy, _ in found} == {dx for _, dx in found} == {-2, -1, 0, 1, 2}


# -------------------------------------------------------------------------------------- critic
def test_td_lambda_is_that_of_furniture_with_one_stage():
    end = torch.randint(3, (6, 200))
    arrays = (end == 1).float(), (end > 0).float(), 0.5 + torch.randn(6, 200)
    for shares in (0.9, 0.0), (0.9, 0.5), (1.0, 1.0):
        assert torch.equal(td_lambda(*arrays, *shares), rldt_furniture.td_lambda(*arrays, *shares, 1))


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


@pytest.mark.parametrize("layer_norm", [False, True])
def test_critic_without_encoder_and_its_update_are_those_of_rldt_gym(layer_norm):
    results, policy = [], small_policy()
    for script in rldt_robomimic, rldt_gym:
        torch.manual_seed(3)
        critic = script.Critic(4, 4, layer_norm, width=16)
        target = copy.deepcopy(critic).requires_grad_(False)
        optimizer = torch.optim.SGD(critic.parameters(), 0.1)
        obs, rest = torch.randn(9, 4), (torch.randn(9, 4), torch.rand(9), arguments(target_momentum=0.9))
        if script == rldt_robomimic:
            measured = update_critic(critic, target, policy, optimizer, {"state": obs}, *rest)
        else:
            measured = script.update_critic(critic, target, optimizer, obs, *rest)
        results.append((measured, critic.state_dict(), target.state_dict()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# ----------------------------------------------------------------------- the encoder in updates
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


@pytest.mark.parametrize("mode", ["own", "shared"])
def test_images_are_shifted_once_per_update(unshifted, mode):
    for function, states in ("critic_target", 6), ("update_critic", 5), ("update_actor", 4):
        unshifted.clear()
        updates(function, arguments(n_particles=3), mode)
        assert unshifted == [(states, 4)]


@pytest.mark.parametrize("mode", ["own", "shared"])
def test_own_encoder_is_trained_by_the_critic_and_the_shared_one_by_the_actor(mode):
    policy = small_policy(cameras=1)
    critic = small_critic(policy, mode == "own")
    networks, names = (critic, policy), [name for name, _ in policy.named_parameters()]
    before = [copied(network) for network in networks]
    updates("update_critic", arguments(), mode, policy, critic)
    assert changed(critic, before[0]) == {name for name, _ in critic.named_parameters()}
    assert changed(policy, before[1]) == set()
    assert all(parameter.grad is None for parameter in policy.parameters())
    before = [copied(network) for network in networks]
    updates("update_actor", arguments(n_particles=2), mode, policy, critic)
    assert changed(critic, before[0]) == set()
    moved = names if mode == "shared" else [name for name in names if "velocity" in name]
    assert {*moved} <= changed(policy, before[1])


# --------------------------------------------------------------------------------------- actor
def test_exploration_is_the_same_in_all_scripts():
    trajectory = torch.randn(5, 50, 2)
    for steps in 0, 1, 3:
        actions = []
        for script in rldt_robomimic, rldt_furniture, rldt_gym:
            torch.manual_seed(1)
            actions.append(script.explore(trajectory, arguments(exploration_steps=steps)))
        assert torch.equal(actions[0], actions[2]) and torch.equal(actions[1], actions[2])


@pytest.mark.parametrize("kernel", ["rbf", "delta"])
@pytest.mark.parametrize("form", ["literal", "authors"])
@pytest.mark.parametrize("q_gradient", ["critic", "particles"])
def test_losses_and_step_of_the_actor_are_those_of_furniture(kernel, form, q_gradient):
    changes = dict(kernel=kernel, transport_loss=form, q_gradient=q_gradient, transport_scale=10.0)
    args, obs, results = arguments(alpha=0.3, n_particles=5, **changes), torch.randn(7, 5), []
    start, reference = small_policy(), small_policy()
    for script, seen in (rldt_robomimic, {"state": obs[:, :-1]}), (rldt_furniture, obs):
        policy = copy.deepcopy(start)
        optimizer = torch.optim.SGD(policy.parameters(), 0.1)
        torch.manual_seed(5)
        measured = script.update_actor(policy, reference, QuadraticCritic(), optimizer, seen, args)
        results.append((measured, policy.state_dict()))
    torch.testing.assert_close(*results)


def test_actor_reference_and_critic_see_their_own_features():
    seen = {}

    def velocity(name):
        return lambda x, t, cond: seen.update({name: cond}) or x

    def critic(cond, action):
        seen["critic"] = cond
        return action.sum(-1).expand(2, -1)

    B, P, D = 3, 5, 2
    conds, trajectory = torch.randn(3, B, 3), torch.randn(5, B, P, D)
    networks = velocity("actor"), velocity("reference"), critic
    rldt_robomimic.actor_losses(*networks, *conds, trajectory, arguments())
    for i, name in enumerate(("actor", "reference", "critic")):
        each = seen[name].reshape(-1, B, P, 3)
        assert torch.equal(each, conds[i][:, None].expand(len(each), -1, P, -1))


# -------------------------------------------------------------------------------------- replay
NAMES = {"state": "obs", "succeeded": "reached"}  # where furniture's replay has another name


@pytest.mark.parametrize("added", [1, 3, 5])
def test_draw_is_that_of_furniture(added):
    """Whose weights tests/test_rldt_furniture.py compares with their definition."""
    sizes = dict(buffer_iterations=3, num_envs=4)
    ours = Replay(arguments(rollout_chunks=30, **sizes), small_policy(state_dim=3, chunk=1))
    furniture = test_furniture_base.arguments(horizon=30, **sizes)
    theirs = rldt_furniture.Replay(furniture, test_furniture_base.small_policy(2, 2, chunk=1))
    for _ in range(added):
        other = theirs.next()
        for name, value in ours.next().items():
            value.normal_()
            if name in ("valid", "succeeded"):
                value.copy_(value > -0.5)
                value[0] = 1
            other[NAMES.get(name, name)].copy_(value)
    batches = []
    for replay in ours, theirs:
        torch.manual_seed(4)
        batches.append(replay.draw(500))
    batch, expected = batches
    assert torch.equal(batch.pop("next_obs")["state"], expected.pop("next_obs"))
    assert torch.equal(batch.pop("obs")["state"], expected.pop("obs"))
    assert torch.equal(batch.pop("succeeded"), expected.pop("reached"))
    torch.testing.assert_close(batch, expected, rtol=0, atol=0)


def test_replay_keeps_images_as_bytes_within_its_bound(monkeypatch, capsys):
    monkeypatch.setattr(rldt_robomimic, "REPLAY_GIB", 0.001)
    args = arguments(buffer_iterations=20, rollout_chunks=5, num_envs=2, encoder="own")
    replay = Replay(args, small_policy(1))
    assert replay.slots["rgb"].dtype == torch.uint8
    used = sum(value.nbytes for value in replay.slots.values())
    assert used <= 0.001 * 2**30 < used / replay.capacity * (replay.capacity + 1)
    assert f"keeps {replay.capacity} rollouts of 0.00031 GiB, not 20" in capsys.readouterr().out
    slot = replay.next()
    slot["valid"].fill_(1)
    slot["state"].copy_(torch.arange(6)[:, None, None].expand(6, 2, 4))  # the time
    slot["rgb"].copy_(slot["state"][..., :1, None, None].expand(-1, -1, 3, 96, 96))
    batch = replay.draw(3)
    for name, shift in ("obs", 0), ("next_obs", 1):
        obs = batch[name]
        assert (obs["state"] == torch.arange(5)[:, None, None] + shift).all()
        assert (obs["rgb"] == obs["state"][..., :1, None, None]).all()


# ------------------------------------------------------------------------------------- rollouts
def rollout(envs, **changes):
    """Collects one rollout from fake environments; returns policy, rollout, steps and successes."""
    args = arguments(**dict(num_envs=envs.num_envs, buffer_iterations=1, encoder="own") | changes)
    policy = small_policy(cameras=int(envs.images))
    replay = Replay(args, policy)
    for value in replay.slots.values():
        value.fill_(77)  # as if left from an older rollout
    steps, successes = rldt_robomimic.collect(policy, envs, replay.next(), 100, args)
    return policy, replay.newest(), steps, successes


def scripted(num_envs, lengths, solved, **kwargs):
    """Episodes of seeds 100, 101, ... of `lengths` chunks, solved from `solved` on (None: never)."""
    solves = lambda seed, t, chunk: solved[seed - 100] is not None and t >= solved[seed - 100]
    return Simulators(num_envs, lambda seed: lengths[seed - 100], solves, **kwargs)


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
def test_replay_holds_images_or_with_a_frozen_encoder_features(encoder):
    envs = scripted(2, [2, 9, 9], [None] * 3, images=True)
    policy, slot, *_ = rollout(envs, rollout_chunks=4, encoder=encoder)
    assert ("rgb" in slot) == (encoder != "frozen")
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


@pytest.mark.parametrize("fraction, count", [(0.0, 0), (0.5, 2), (1.0, 4)])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_rollout_explores_from_zero_in_a_share_of_the_environments(fraction, count, steps):
    changes = dict(rollout_chunks=7, exploration_steps=steps, zero_fraction=fraction)
    policy, slot, *_ = rollout(scripted(4, [20] * 4, [None] * 4), **changes)
    deterministic = policy.sample(slot["state"][:-1], torch.zeros(7, 4, 4))
    same = (slot["action"] - deterministic).abs().amax((0, 2)) < 1e-5
    count = 0 if steps == 4 else count  # steps before the last add noise
    assert same.tolist() == [True] * count + [False] * (4 - count)


# ------------------------------------------------------------------------------------ evaluation
@pytest.mark.parametrize("num_envs", [1, 4, 16])
@pytest.mark.parametrize("stop", [False, True])
def test_evaluation_is_that_of_furniture(num_envs, stop):
    solves = lambda seed, t, chunk: t == seed % 2 and seed % 3 == chunk.any()
    scores, executed, before = [], [], torch.get_rng_state()
    for script, make, args in (
        (rldt_robomimic, Simulators, arguments()),
        (rldt_furniture, FakeEnvs, test_furniture_base.arguments()),
    ):
        envs = make(num_envs, lambda seed: 2 + seed % 3, solves, stop=stop)
        scores.append(script.evaluate(Identity(), envs, args, episodes=7, seed=50))
        executed.append(envs.executed)
    ours, theirs = scores
    assert ours == {name: value for name, value in theirs.items() if "success" in name}
    assert (ours["eval_success"], ours["eval_success_sampled"]) == (2 / 7, 2 / 7)
    np.testing.assert_array_equal(*executed)
    assert torch.equal(torch.get_rng_state(), before)


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
    assert all(not p.requires_grad for p in policy.encoder.parameters()) if policy.cameras else True
    assert same(Policy.load(only_run(tmp_path) / "base.safetensors"), policy.state_dict())
    assert policy.info["validation_loss"] > 0


@pytest.mark.parametrize("obs", ["state", "image"])
def test_missing_demonstrations_are_made_by_commands_of_the_maker(monkeypatch, tmp_path, obs):
    made, module = [], rldt_robomimic.dataset

    def run(command, cwd):
        assert command[:3] == [sys.executable, "-m", "demos.make_robomimic_demos"]
        args = tyro.cli(make_robomimic_demos.Args, args=list(map(str, command[3:])))
        assert args.images_from is None or args.images_from.exists()
        made.append((args.task, args.out.name, args.images_from is None, args.fast_render))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("demonstrations")
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(module, "DEMOS", tmp_path)
    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "load", lambda *given: given)
    path = tmp_path / "lift" / ("image.hdf5" if obs == "image" else "low_dim.hdf5")
    for _ in range(2):  # the second time they are there
        given = module.get("lift", obs, None, False)
        assert given == (path, "lift", obs == "image", 0, None, False)
    both = ("lift", "low_dim.hdf5", True), ("lift", "image.hdf5", False)
    assert tuple(one[:3] for one in made) == both[: 1 + (obs == "image")]
    assert obs == "state" or made[-1][3] is False


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
    torch.manual_seed(0)
    return rldt_robomimic.pretrain(args, data, checkpoint, **settings)


def test_pretraining_on_states_is_that_of_rldt_gym_with_limits_that_include_zero():
    data = demonstrations()
    limits = dict(obs_min=[0] + [-40] * 18, obs_max=[39] + [0] * 18)
    limits |= dict(action_min=[0] * 7, action_max=[39, 3] + [41] * 5)
    arrays = data["state"], data["action"], data["episode_ends"]
    limits = {name: np.array(value, np.float32) for name, value in limits.items()}
    torch.manual_seed(0)
    args, other = rldt_gym.Args(device="cpu", bf16=False), Demonstrations(*arrays, normalization=limits)
    expected = rldt_gym.pretrain(args, other, None, epochs=60, batch=8, lr=1e-3, **SIZES)
    policy = pretrain(data, epochs=60)
    assert same(policy, expected.state_dict())
    assert policy.info["validation_loss"] == expected.info["validation_loss"]


def test_a_base_policy_is_made_with_a_checkpoint_that_is_gone_afterwards(monkeypatch, tmp_path):
    fit, checkpoints = rldt_robomimic.fit, []
    settings = dict(epochs=1, batch=8, lr=1e-3, head_steps=0) | SIZES
    settings.pop("chunk")  # the task's
    monkeypatch.setitem(rldt_robomimic.PRETRAINING, "laptop", {"state": settings})
    monkeypatch.setattr(rldt_robomimic, "fit", lambda *args: checkpoints.append(args[-1]) or fit(*args))
    monkeypatch.setattr(rldt_robomimic.dataset, "get", lambda *args: demonstrations())
    policy, run = get_base(None, tmp_path, pretrain=True), only_run(tmp_path)
    assert checkpoints == [run / "pretraining.pt"]
    assert {path.name for path in run.iterdir()} == {"args.json", "base.safetensors"}
    assert (policy.chunk, policy.info["obs"], policy.info["fast_render"]) == (4, "state", True)


def test_pretraining_on_images_trains_the_encoder_on_shifted_images(unshifted):
    torch.manual_seed(0)
    first = copied(Policy(9, 7, cameras=1, **SIZES))
    policy = pretrain(demonstrations((8, 30), images=True))
    assert {name for name, _ in policy.named_parameters()} <= changed(policy, first)
    assert {pixels for _, pixels in unshifted} == {4}


def test_head_steps_pretrain_the_velocity_network_alone(monkeypatch):
    monkeypatch.setattr(rldt_robomimic, "COPIES", 3)
    data = demonstrations((30, 30), images=True)
    first, more = (pretrain(data, head_steps=steps).state_dict() for steps in (0, 300))
    for name, value in more.items():
        assert torch.equal(value, first[name]) != name.startswith("velocity."), name


# ----------------------------------------------------------------------------------- settings
def main(argv):
    return rldt_robomimic.main(parse(rldt_robomimic, argv))


TASK_SETTINGS = {  # horizon, iterations, chunks of a rollout, steps of the exploration
    "lift": (300, 40, 200, 2), "can": (300, 120, 400, 2),
    "square": (400, 120, 400, 2), "transport": (800, 120, 400, 0),
}  # fmt: skip


@pytest.mark.parametrize("task", list(TASK_SETTINGS))
def test_the_task_decides_what_is_not_given(monkeypatch, task):
    def settled(*flags):
        """What main settles before its run."""
        taken = []
        monkeypatch.setattr(rldt_robomimic, "Run", lambda args, name: taken.append(args) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([f"--task={task}", *flags])
        names = "horizon", "iterations", "rollout_chunks", "exploration_steps"
        return tuple(getattr(taken[0], name) for name in names)

    assert settled() == TASK_SETTINGS[task]
    flags = ["--horizon=8", "--iterations=3", "--rollout-chunks=50", "--exploration-steps=1"]
    assert settled(*flags) == (8, 3, 50, 1)
    assert settled("--preset=paper")[1:] == (200, 200, 2)
    assert settled("--wall-budget-s=60")[1] == 0


def test_gradient_of_the_particles_needs_two_of_them():
    with pytest.raises(SystemExit, match="--q-gradient particles needs --n-particles"):
        main(["--q-gradient=particles", "--n-particles=1"])


# ------------------------------------------------------------------- whole runs without simulators
def flags(base, runs, **changes):
    """Flags of a run of four iterations, the first and the last of which evaluate."""
    own = dict(task="lift", base=base, runs=runs, device="cpu", horizon=40, rollout_chunks=13)
    return words(SHORT | own | changes)


def use_fakes(patch):
    """Has main() run on fake environments, which it returns, and on short segments."""
    made = []

    def make_envs(args, policy):
        """Episodes of 3 to 5 chunks; the actions decide whether one succeeds."""
        solves = lambda seed, t, chunk: t >= 1 and math.sin(100 * chunk.sum()) > 0.6
        form = dict(stop=args.stop_on_success, action_dim=7, obs_dim=policy.obs_dim)
        length = lambda seed: 3 + seed % 3
        made.append(Simulators(args.num_envs, length, solves, images=args.obs == "image", **form))
        return made[-1]

    patch.setattr(rldt_robomimic, "make_envs", make_envs)
    patch.setattr(rldt_robomimic, "SEGMENT", 3)
    return made


@pytest.fixture
def fakes(monkeypatch):
    return use_fakes(monkeypatch)


@pytest.fixture(scope="module")
def fake_run(bases, tmp_path_factory):
    """A complete run on fake environments, these and the actor's step sizes; read it only."""
    rates, runs, handler = [], tmp_path_factory.mktemp("fake"), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        fakes = use_fakes(patch)
        recorded = lambda *args: rates.append(args[3].param_groups[0]["lr"]) or update_actor(*args)
        patch.setattr(rldt_robomimic, "update_actor", recorded)
        patch.setattr(rldt_robomimic, "ACTOR_WARMUP", 3)
        main(flags(bases["state"], runs, actor_lr_end=0.5))
    signal.signal(signal.SIGINT, handler)
    return only_run(runs), fakes[0], rates


def test_training_follows_its_schedules(fake_run):
    run, envs, rates = fake_run
    decay = [1 - 0.5 * iteration / 4 for iteration in (2, 2, 3, 3)]
    rises = 1 / 3, 2 / 3, 1, 1
    assert rates == pytest.approx([1e-3 * d * rise for d, rise in zip(decay, rises, strict=True)])
    rows = metrics(run)
    for i, row in enumerate(rows):
        assert (row["eval_success"] != "") == (i in (0, 4))
        assert (row["losses/critic"] != "") == (i in (1, 2, 3))
        assert (row["losses/transport"] != "") == (i in (2, 3))
    assert float(rows[1]["diagnostics/base_distance"]) == 0
    assert float(rows[3]["diagnostics/base_distance"]) > 0
    trained = {seed: steps for seed, steps in envs.steps.items() if seed // 1_000_000 != 4}
    assert int(rows[-1]["env_steps"]) == sum(trained.values())
    assert {seed // 10_000 for seed in trained} == {40_001, 40_002, 40_003}
    assert {Counter(envs.begun)[seed] for seed in trained} == {1}
    assert {400_010_000, 400_020_000, 400_030_000} <= set(trained)


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
    own, slot = encoder == "own", checkpoint(run, "checkpoint.replay0")
    steps = [group["lr"] for group in saved["critic_optimizer"]["param_groups"]]
    assert steps == [5e-4, 4e-5][: 1 + own]
    assert ("encoder.vits.0.position" in saved["critic"]) == own
    assert ("rgb" in slot) == (encoder != "frozen")
    assert slot["state"].shape == (14, 2, {"state": 19, "image": 9 + 128 * (encoder == "frozen")}[obs])
    assert all(envs.closed for envs in fakes)


def test_states_after_success_reach_neither_update(fakes, bases, tmp_path, monkeypatch):
    used = []
    for name in ("update_critic", "update_actor"):
        update = getattr(rldt_robomimic, name)
        recorded = lambda *args, update=update: used.append(args[4]["state"]) or update(*args)
        monkeypatch.setattr(rldt_robomimic, name, recorded)
    main(flags(bases["state"], tmp_path, segments=40, stop_on_success=False))
    (envs,) = fakes
    valid = {seed % 100_000: chunks for seed, chunks in envs.valid.items() if seed >= 100_000_000}
    left = [valid[round(s[0].item() * 100_000)] - 1 - round(s[1].item() * 10) for s in torch.cat(used)]
    assert min(left) == 0  # the state in which the task is solved, or before the limit, but none after
    assert any(chunks < 3 for chunks in valid.values())  # an episode is at least so long


def test_best_policy_is_measured_again_on_other_episodes(fakes, bases, tmp_path, scripted_evaluations):
    shares = [0.25, 0.75, 0.25, 0.5]  # base, middle, final, best again
    episodes, policies = scripted_evaluations(rldt_robomimic, shares, "eval_success")
    result = main(flags(bases["state"], tmp_path, eval_every=2, eval_episodes=3, final_eval_episodes=4))
    assert [len(some) for some in episodes] == [8, 6, 8, 8]
    assert not any(episodes[-1] & others for others in episodes[:-1])
    assert same(policies[-1], policies[1].state_dict())
    assert [result[f"{name}_success"] for name in ("base", "final", "best")] == [0.25, 0.25, 0.5]


def test_run_that_crashed_and_is_resumed_equals_one_that_did_not(
    monkeypatch, fakes, fake_run, bases, tmp_path
):
    monkeypatch.setattr(rldt_robomimic, "ACTOR_WARMUP", 3)
    argv = flags(bases["state"], tmp_path, actor_lr_end=0.5)
    check_crash_and_resume(rldt_robomimic, argv, tmp_path, fake_run[0])


# ---------------------------------------------------------------------- whole runs on robosuite
def test_run_on_robosuite_is_evaluated_again_to_the_same_numbers(bases, tmp_path):
    result = main(flags(bases["state"], tmp_path, iterations=3, final_eval_episodes=2))
    run = only_run(tmp_path)
    assert (result["task"], result["env_steps"]) == ("lift-state", 2 * 2 * 13 * 4)
    slot = checkpoint(run, "checkpoint.replay1")  # of the second iteration
    assert slot["state"].shape == (14, 2, 19)
    assert slot["terminated"].tolist() == [[0, 0]] * 9 + [[1, 1]] + [[0, 0]] * 3  # chunks of 40 steps
    assert (slot["state"][1:] != slot["state"][:-1]).any(-1).all()
    scores = main(["--evaluate", run])
    assert scores == {name: result[name.replace("eval", "final")] for name in scores}


def test_run_on_robosuite_with_images_and_a_video(bases, tmp_path):
    changes = dict(
        task="square", obs="image", encoder="own", iterations=2, horizon=8, rollout_chunks=3,
        final_eval_episodes=1, rounds=1, warmup_iterations=0, segments=2, critic_batch=2, actor_batch=2,
        capture_video=True,
    )  # fmt: skip
    result = main(flags(bases["image"], tmp_path, **changes))
    run = only_run(tmp_path)
    slot = checkpoint(run, "checkpoint.replay0")
    assert slot["terminated"].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert (result["task"], result["env_steps"]) == ("square-image", 2 * 3 * 4)
    assert slot["rgb"].shape == (4, 2, 3, 96, 96)
    assert slot["rgb"].float().std((2, 3, 4)).min() > 10  # a picture in every row
    assert (run / "videos" / "episode.mp4").stat().st_size > 1000
