"""What a sparse reward adds to two scripts: demonstrations, cloning, ensembles and best of N."""

import copy

import fakes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import arguments, each_sparse, new_replay, observed, small_critic, small_policy
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import parameters_to_vector as flat

import rldt_furniture
import rldt_robomimic
from demos.dataset import as_rollouts, chunk_rows

STAGES = [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1]]  # of three episodes, before each step


# ------------------------------------------------------------------------------ demonstrations
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 5))
def test_episodes_are_cut_from_each_step_of_their_first_chunk(lengths, chunk):
    ends, expected = np.cumsum(lengths), []
    for end, length in zip(ends, lengths, strict=True):
        for offset in range(chunk):
            for first in range(end - length + offset, end, chunk):
                expected.append((first, end))
    first, end = chunk_rows(ends, chunk)
    assert list(zip(first, end, strict=True)) == expected
    assert sorted(first) == [*range(sum(lengths))]


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 4))
def test_rows_lie_one_after_another_in_rollouts(n, T, N):
    rows = {"reward": torch.arange(n), "action": torch.arange(2 * n).view(n, 2)}
    rollouts = as_rollouts(rows, {"obs": torch.arange(n)}, T, N)
    assert rollouts["obs"].shape[1:] == (T + 1, N)
    row = 0
    for slot, env, t in np.ndindex(len(rollouts["reward"]), N, T):
        assert rollouts["valid"][slot, t, env] == (row < n)
        if row < n:
            assert rollouts["reward"][slot, t, env] == row
            assert rollouts["action"][slot, t, env].tolist() == [2 * row, 2 * row + 1]
            assert rollouts["obs"][slot, t : t + 2, env].tolist() == [row, min(row + 1, n - 1)]
        row += 1
    assert row - n < T * N


def shown(script, monkeypatch):
    """A replay with three demonstrations, and they."""
    ends = np.cumsum([len(stages) for stages in STAGES])
    rng = np.random.default_rng(0)
    data = dict(state=rng.normal(size=(ends[-1], 4)).astype(np.float32), episode_ends=ends,
                action=rng.normal(size=(ends[-1], 2)).astype(np.float32))  # fmt: skip
    data["stage"] = np.concatenate(STAGES)
    data["solved"] = data["stage"] > 0  # of robomimic, where episodes go on after success
    monkeypatch.setattr(script.dataset, "get", lambda *which: data)
    policy, args = small_policy(script), arguments(script, demos=True, num_envs=2, buffer_iterations=3)
    return new_replay(script, args, policy, 5), data, policy


@each_sparse
def test_demonstrations_are_rollouts_that_end_well(script, monkeypatch):
    replay, data, policy = shown(script, monkeypatch)
    most = 1 if script is rldt_robomimic else 2
    name, ends_in = ("state", "succeeded") if script is rldt_robomimic else ("obs", "reached")
    slots = {key: value[3:].transpose(1, 2).flatten(0, 1) for key, value in replay.slots.items()}
    row = 0
    for stages, end in zip(STAGES, data["episode_ends"], strict=True):
        for offset in range(2):
            for i in range(offset, len(stages), 2):
                if script is rldt_robomimic and stages[i] > 0:
                    continue
                where, t = divmod(row, 5)
                steps = [end - len(stages) + min(i + j, len(stages) - 1) for j in range(2)]
                last = i + 2 >= len(stages)
                after = most if last else stages[i + 2]
                state = policy.normalize(data["state"][steps[0]])
                last |= script is rldt_robomimic and after > 0
                reward = float(last)
                if script is rldt_furniture:
                    state, reward = F.pad(state, (0, 1), value=stages[i] / 2), after - stages[i]
                assert torch.equal(slots[name][where, t], state)
                action = policy.from_env(data["action"][None, steps])[0]
                assert torch.equal(slots["action"][where, t], action)
                expected = dict(reward=reward, terminated=last, valid=1)
                for key, value in (expected | {ends_in: most}).items():
                    assert slots[key][where, t] == value, (key, row)
                row += 1
    assert replay.slots["valid"].sum() == row == (15 if script is rldt_furniture else 8)


@each_sparse
def test_demonstrations_stay_in_the_replay_and_are_drawn(script, monkeypatch):
    replay, *_ = shown(script, monkeypatch)
    kept = {name: value[3:].clone() for name, value in replay.slots.items()}
    for rollout in range(7):
        for value in replay.next().values():
            value.fill_(0)
        replay.newest()["valid"].fill_(1)
        replay.newest()["reward"].fill_(-rollout)
    assert all(torch.equal(value[3:], kept[name]) for name, value in replay.slots.items())
    monkeypatch.setattr(script, "SEGMENT", 3)
    reward = replay.draw(4000)["reward"][0]
    assert set((-reward[reward < 0]).tolist()) == {4, 5, 6}
    share = (reward >= 0).float().mean().item()  # they are all of their kind, that of success
    assert share == pytest.approx(0.5, abs=0.03)


# ------------------------------------------------------------------------------------ ensemble
@each_sparse
def test_target_is_the_minimum_of_a_random_two_of_the_networks(script, monkeypatch):
    args, policy = arguments(script, gamma=0.9, td_lambda=0.0), small_policy(script)
    values = torch.tensor([0.5, 0.2, 0.4, 0.3])

    class Target:
        encode = staticmethod(lambda obs: obs["state"])

        def __call__(self, cond, action):
            return values[:, None].expand(-1, len(cond))

    obs = observed(script, torch.randn(2, 3, 4))
    batch = {"reward": torch.zeros(2, 3), "terminated": torch.zeros(2, 3), "next_obs": obs}
    seen = [script.critic_target(policy, Target(), batch, args)[0, 0].item() / 0.9 for _ in range(300)]
    share = {value: np.isclose(seen, value).mean() for value in values.tolist()}
    expected = {0.5: 0, 0.2: 3 / 6, 0.4: 1 / 6, 0.3: 2 / 6}  # of the six pairs
    for value, found in share.items():
        assert found == pytest.approx(expected[round(value, 1)], abs=0.09)


# ------------------------------------------------------------------------------------- cloning
@each_sparse
def test_actor_clones_what_succeeded(script, monkeypatch):
    policy = small_policy(script)
    critic = small_critic(script, policy)
    obs, good, action = observed(script, torch.randn(8, 4)), torch.randn(5, 4), torch.randn(5, 4)
    loss = lambda velocity, action, cond: (velocity(action, torch.zeros(()), cond) - 3).square().mean()
    monkeypatch.setattr(script, "flow_matching_loss", loss)

    def weights_after_a_step(bc_weight, count):
        other = copy.deepcopy(policy)
        optimizer = torch.optim.SGD(other.velocity.parameters(), 0.1)
        torch.manual_seed(0)
        rows = obs, (observed(script, good[:count]), action[:count])
        args = arguments(script, bc_weight=bc_weight, n_particles=2)
        script.update_actor(other, policy, critic, optimizer, *rows, args)
        return flat(other.velocity.parameters()).detach()

    plain = weights_after_a_step(0.0, 5)
    assert torch.equal(plain, weights_after_a_step(0.3, 0))
    cloning = loss(policy.velocity, action, good)
    gradient = flat(torch.autograd.grad(cloning, [*policy.velocity.parameters()]))
    expected = plain - 0.1 * 0.3 * 4 * gradient  # D = 4
    torch.testing.assert_close(weights_after_a_step(0.3, 5), expected)


# ------------------------------------------------------------------------------------ best of N
@each_sparse
def test_best_of_is_the_mean_of_the_best_quarter(script):
    policy, obs = small_policy(script), observed(script, torch.randn(3, 4))
    sampled = []
    policy.sample = lambda cond: sampled.append(torch.randn(*cond.shape[:-1], 4)) or sampled[-1]

    class Critic:
        encode = staticmethod(lambda obs: obs["state"])

        def __call__(self, cond, action):
            return torch.stack([action[:, 0], action[:, 0] + 2 * action[:, 1]])

    result = script.best_of(policy, Critic(), obs, arguments(script, best_of=10))
    for i in range(3):
        ranked = sorted(sampled[0][i], key=lambda a: (a[0] + a[1]).item())
        torch.testing.assert_close(result[i], torch.stack(ranked[-3:]).mean(0))


@each_sparse
def test_half_of_the_environments_act_on_the_best_of_their_samples(script, monkeypatch):
    state = "state" if script is rldt_robomimic else "obs"
    first = lambda obs: (obs["state"] if script is rldt_robomimic else obs)[..., :1]  # by environment
    monkeypatch.setattr(script, "best_of", lambda policy, critic, obs, args: first(obs).expand(-1, 4))
    for critic, marked in (None, [0, 0, 0, 0]), (True, [0, 0, 1, 1]):
        envs = fakes.scripted(script, 4, [20] * 4, [()] * 4)
        _, rollout, _ = fakes.roll_out(script, envs, 3, critic=critic)
        equal = (rollout["action"] == rollout[state][:3, :, :1]).all(-1)
        assert equal.tolist() == 3 * [marked]
