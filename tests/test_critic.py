import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import rldt_gym
from rldt_gym import Critic, Replay, critic_target, td_lambda, update_critic


@st.composite
def segments(draw):
    """Rewards, ends and next values (T, L) of segments, and lambda; an end is a termination or a truncation."""
    T, L = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    reward, value = torch.randn(2, T, L, dtype=torch.float64, generator=generator)
    end = torch.tensor(draw(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=T * L, max_size=T * L))).view(T, L)
    return reward, (end == 1).double(), (end == 2).double(), value, draw(st.floats(0, 1)), draw(st.floats(0, 1))


def recursive(t, r, terminated, truncated, value, gamma, lam):
    """y_t as it is defined, for one segment of plain numbers."""
    if terminated[t]:
        return r[t]
    if truncated[t] or t == len(r) - 1:
        return r[t] + gamma * value[t]
    return r[t] + gamma * ((1 - lam) * value[t] + lam * recursive(t + 1, r, terminated, truncated, value, gamma, lam))


@given(segments())
def test_td_lambda_equals_its_recursive_definition(segment):
    *arrays, gamma, lam = segment
    y = td_lambda(*arrays, gamma, lam)
    T, L = y.shape
    for column in range(L):
        one = [x[:, column].tolist() for x in arrays]
        expected = [recursive(t, *one, gamma, lam) for t in range(T)]
        assert y[:, column].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(segments())
def test_lambda_zero_is_the_one_step_target(segment):
    reward, terminated, truncated, value, gamma, _ = segment
    y = td_lambda(reward, terminated, truncated, value, gamma, 0.0)
    torch.testing.assert_close(y, reward + gamma * (1 - terminated) * value)


@given(segments())
def test_lambda_one_without_bootstraps_is_the_discounted_sum_of_rewards(segment):
    reward, _, _, _, gamma, _ = segment
    T, zeros = len(reward), torch.zeros_like(reward)
    terminated = zeros.clone()
    terminated[-1] = 1
    y = td_lambda(reward, terminated, zeros, torch.full_like(reward, 1e6), gamma, 1.0)
    expected = torch.stack([sum(gamma ** (i - t) * reward[i] for i in range(t, T)) for t in range(T)])
    torch.testing.assert_close(y, expected)


def test_truncation_bootstraps_and_termination_does_not():
    one = torch.ones(2, 1)
    end = torch.tensor([[1.0], [0.0]])
    bootstrapped = td_lambda(one, 0 * one, end, 10 * one, 0.9, 0.5)
    assert bootstrapped[0].item() == pytest.approx(1 + 0.9 * 10)
    assert td_lambda(one, end, 0 * one, 10 * one, 0.9, 0.5)[0].item() == 1


def test_critic_target_averages_the_smaller_value_of_the_target_networks_over_policy_actions():
    args = rldt_gym.Args(device="cpu", bf16=False, value_samples=3, td_lambda=0.4, gamma=0.9)
    policy = rldt_gym.FlowPolicy(5, 3, chunk=2, euler_steps=4, width=8, depth=3, time_dim=4)
    target = Critic(5, 6, 8, 2, False, "default")
    shape = (4, 2)
    batch = dict(
        reward=torch.randn(shape),
        terminated=torch.zeros(shape),
        truncated=torch.zeros(shape),
        next_obs=torch.randn(4, 2, 5),
    )
    batch["terminated"][1, 0] = batch["truncated"][2, 1] = 1
    torch.manual_seed(1)
    y = critic_target(policy, target, batch, 2.5, args)
    torch.manual_seed(1)
    noise = torch.randn(3 * 4 * 2, 6).view(3, 4, 2, 6)
    values = []
    for n in range(3):
        action = policy.sample(batch["next_obs"], noise[n])
        values.append(target(batch["next_obs"].view(8, 5), action.view(8, 6)).min(0).values.view(4, 2))
    assert len({v[0, 0].item() for v in values}) == 3
    value = torch.stack(values).mean(0)
    expected = td_lambda(batch["reward"] / 2.5, batch["terminated"], batch["truncated"], value, 0.9, 0.4)
    torch.testing.assert_close(y, expected)
    assert not y.requires_grad


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_batched_critics_equal_two_networks_with_the_same_weights(layer_norm, depth):
    critic = Critic(5, 3, 16, depth, layer_norm, "default")
    obs, action = torch.randn(7, 5), torch.randn(7, 3)
    q = critic(obs, action)
    assert q.shape == (2, 7)
    for member in range(2):
        x = torch.cat([obs, action], 1)
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            x = F.linear(x, weight[member].T, bias[member, 0])
            if i < depth:
                x = F.silu(F.layer_norm(x, (16,)) if layer_norm else x)
        torch.testing.assert_close(q[member], x[:, 0])
    assert not torch.allclose(q[0], q[1])


def test_the_two_critics_do_not_share_gradients():
    critic = Critic(5, 3, 8, 2, True, "default")
    critic(torch.randn(7, 5), torch.randn(7, 3))[0].sum().backward()
    for parameter in critic.parameters():
        assert parameter.grad[0].abs().sum() > 0
        assert parameter.grad[1].abs().sum() == 0


def test_normal_initialisation_has_standard_deviation_a_tenth_and_no_bias():
    critic = Critic(50, 50, 256, 2, False, "normal")
    for weight in critic.weights[:2]:
        assert weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert all((bias == 0).all() for bias in critic.biases)


def test_default_initialisation_is_that_of_a_linear_layer():
    critic = Critic(50, 50, 256, 2, False, "default")
    for weight, bias, fan_in in zip(critic.weights, critic.biases, (100, 256, 256), strict=True):
        bound = 1 / math.sqrt(fan_in)
        assert 0.95 * bound < weight.abs().max() <= bound
        assert 0 < bias.abs().max() <= bound


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_update_critic_moves_the_target_by_the_polyak_momentum(momentum):
    args = rldt_gym.Args(device="cpu", bf16=False, target_momentum=momentum)
    critic = Critic(5, 3, 8, 2, True, "default")
    target = copy.deepcopy(critic).requires_grad_(False)
    for p in target.parameters():
        p.add_(1.0)
    old, old_target = copy.deepcopy(critic.state_dict()), copy.deepcopy(target.state_dict())
    optimizer = torch.optim.SGD(critic.parameters(), 0.1)
    update_critic(critic, target, optimizer, torch.randn(9, 5), torch.randn(9, 3), torch.randn(9), args)
    for key, new in critic.state_dict().items():
        assert not torch.equal(new, old[key])
        torch.testing.assert_close(target.state_dict()[key], momentum * old_target[key] + (1 - momentum) * new)


def test_update_critic_descends_the_squared_error_of_both_networks():
    args = rldt_gym.Args(device="cpu", bf16=False)
    critic = Critic(5, 3, 8, 2, True, "default")
    obs, action, y = torch.randn(9, 5), torch.randn(9, 3), torch.randn(9)
    q = critic(obs, action)
    loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
    expected = [
        p - 0.1 * g
        for p, g in zip(critic.parameters(), torch.autograd.grad(loss, list(critic.parameters())), strict=True)
    ]
    optimizer = torch.optim.SGD(critic.parameters(), 0.1)
    metrics = update_critic(critic, copy.deepcopy(critic).requires_grad_(False), optimizer, obs, action, y, args)
    torch.testing.assert_close([p.detach() for p in critic.parameters()], [p.detach() for p in expected])
    assert metrics["losses/critic"].item() == pytest.approx(loss.item())
    assert metrics["diagnostics/q"].item() == pytest.approx(q.mean().item())


def test_critic_learns_a_linear_value():
    args = rldt_gym.Args(device="cpu", bf16=False)
    critic = Critic(3, 2, 32, 2, True, "default")
    target = copy.deepcopy(critic).requires_grad_(False)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    losses = []
    for _ in range(300):
        obs, action = torch.randn(64, 3), torch.randn(64, 2)
        metrics = update_critic(critic, target, optimizer, obs, action, obs[:, 0] - action[:, 1], args)
        losses.append(metrics["losses/critic"].item())
    assert losses[-1] < 0.05 * losses[0]


CAPACITY, T, N = 3, 10, 4


def numbered(added):
    """A replay whose rewards encode rollout, environment and time: 1000 rollout + 100 environment + time."""
    args = rldt_gym.Args(device="cpu", buffer_iterations=CAPACITY, rollout_chunks=T, num_envs=N)
    replay = Replay(args, obs_dim=2, action_size=3)
    for rollout in range(added):
        slot = replay.rollout()
        slot["reward"].copy_(1000.0 * rollout + 100 * torch.arange(N) + torch.arange(T)[:, None])
        slot["obs"].copy_(slot["reward"][..., None].expand(-1, -1, 2))
    return replay


@given(added=st.integers(1, 8), length=st.integers(1, T), count=st.integers(1, 50), seed=st.integers(0, 1000))
def test_segments_are_consecutive_steps_of_one_environment_in_one_rollout(added, length, count, seed):
    replay = numbered(added)
    torch.manual_seed(seed)
    batch = replay.draw(count, length, 0.3)
    assert batch["reward"].shape == (length, count)
    assert batch["obs"].shape == (length, count, 2)
    assert batch["action"].shape == (length, count, 3)
    assert torch.equal(batch["obs"][..., 0], batch["reward"])
    first = batch["reward"][0]
    assert torch.equal(batch["reward"], first + torch.arange(length)[:, None])
    assert (first % 100 + length <= T).all()


@given(added=st.integers(1, 8), count=st.integers(1, 60), fraction=st.floats(0, 1), seed=st.integers(0, 1000))
def test_at_least_the_fresh_fraction_comes_from_the_newest_rollout_and_none_from_an_overwritten_one(
    added, count, fraction, seed
):
    replay = numbered(added)
    torch.manual_seed(seed)
    rollout = replay.draw(count, 2, fraction)["reward"][0] // 1000
    assert (rollout == added - 1).sum() >= fraction * count
    assert (rollout >= max(0, added - CAPACITY)).all()


def test_every_kept_rollout_environment_and_start_is_drawn():
    replay = numbered(5)
    first = replay.draw(20_000, 3, 0.33)["reward"][0].long()
    assert set((first // 1000).tolist()) == {2, 3, 4}
    assert set((first // 100 % 10).tolist()) == set(range(N))
    assert set((first % 100).tolist()) == set(range(T - 2))


def test_newest_is_the_slot_last_written_and_old_rollouts_are_overwritten_first_in_first_out():
    replay = numbered(0)
    for rollout in range(7):
        replay.rollout()["reward"].fill_(rollout)
        assert (replay.newest()["reward"] == rollout).all()
        kept = sorted(set(replay.data["reward"].flatten().tolist()))
        assert kept == sorted({max(0, r) for r in range(rollout - CAPACITY + 1, rollout + 1)})
