"""Targets, networks, steps and replay of the critic."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import rldt_gym
from common.flow import FlowPolicy
from rldt_gym import Args, Critic, Replay, critic_target, td_lambda, update_critic


@st.composite
def segments(draw):
    """Rewards, ends and next values (T, L) of segments, gamma and lambda."""
    T, L = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    reward, value = torch.randn(2, T, L, dtype=torch.float64, generator=generator)
    ends = st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=T * L, max_size=T * L)
    end = torch.tensor(draw(ends)).view(T, L)  # 1: terminated, 2: truncated
    gamma, lam = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    return reward, (end == 1).double(), (end == 2).double(), value, gamma, lam


def recursive(t, r, terminated, truncated, value, gamma, lam):
    """y_t as it is defined, for one segment of plain numbers."""
    if terminated[t]:
        return r[t]
    if truncated[t] or t == len(r) - 1:
        return r[t] + gamma * value[t]
    y = recursive(t + 1, r, terminated, truncated, value, gamma, lam)
    return r[t] + gamma * ((1 - lam) * value[t] + lam * y)


@given(segments())
def test_td_lambda_equals_its_recursive_definition(segment):
    *arrays, gamma, lam = segment
    y = td_lambda(*arrays, gamma, lam)
    for column in range(y.shape[1]):
        one = [x[:, column].tolist() for x in arrays]
        expected = [recursive(t, *one, gamma, lam) for t in range(len(y))]
        assert y[:, column].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_critic_target_takes_the_smaller_value_at_an_action_of_the_policy():
    args = Args(device="cpu", bf16=False, td_lambda=0.9, gamma=0.8)
    policy, target = FlowPolicy(5, 3, chunk=2, euler_steps=4, width=8, time_dim=4), Critic(5, 6, False)
    batch = dict(reward=torch.randn(4, 50), terminated=torch.zeros(4, 50), truncated=torch.zeros(4, 50))
    batch["next_obs"] = torch.randn(4, 50, 5)
    batch["terminated"][1, :20] = batch["truncated"][2, 10:30] = 1
    torch.manual_seed(1)
    y = critic_target(policy, target, batch, 2.5, 0.4, args)
    torch.manual_seed(1)
    obs = batch["next_obs"].view(200, 5)
    q = target(obs, policy.sample(obs, torch.randn(200, 6)))
    batch["value"] = torch.where(q[0] < q[1], q[0], q[1]).view(4, 50)
    batch["reward"] = batch["reward"] / 2.5
    assert 20 < (q[0] < q[1]).sum() < 180  # each network is sometimes the smaller one
    for i in range(50):
        one = [batch[key][:, i].tolist() for key in ("reward", "terminated", "truncated", "value")]
        expected = [recursive(t, *one, 0.8, 0.4) for t in range(4)]
        assert y[:, i].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert not y.requires_grad


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_batched_critics_equal_two_networks_with_the_same_weights(layer_norm, depth):
    critic = Critic(5, 3, layer_norm, 16, depth)
    obs, action = torch.randn(7, 5), torch.randn(7, 3)
    q = critic(obs, action)
    for member in range(2):
        x = torch.cat([obs, action], 1)
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            x = F.linear(x, weight[member].T, bias[member, 0])
            if i < depth:
                x = F.silu(F.layer_norm(x, (16,)) if layer_norm else x)
        torch.testing.assert_close(q[member], x[:, 0])
    assert not torch.allclose(q[0], q[1])
    q[0].sum().backward()
    for parameter in critic.parameters():  # the two share no gradients
        assert parameter.grad[0].abs().sum() > 0
        assert parameter.grad[1].abs().sum() == 0


def test_authors_critic_starts_with_normal_weights_and_ours_like_linear_layers():
    authors, ours = Critic(50, 50, False), Critic(50, 50, True)
    for weight, bias in zip(authors.weights, authors.biases, strict=True):
        assert weight.std().item() == pytest.approx(0.1, rel=0.1)
        assert (bias == 0).all()
    for weight, bias, fan_in in zip(ours.weights, ours.biases, (100, 256, 256, 256), strict=True):
        bound = 1 / math.sqrt(fan_in)
        assert 0.95 * bound < weight.abs().max() <= bound
        assert 0 < bias.abs().max() <= bound


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_update_critic_descends_both_squared_errors_and_moves_the_target_by_its_momentum(momentum):
    args, critic = Args(device="cpu", bf16=False, target_momentum=momentum), Critic(5, 3, True, 8, 2)
    target = copy.deepcopy(critic).requires_grad_(False)
    for p in target.parameters():
        p.add_(1.0)
    before = copy.deepcopy([*target.parameters()])
    obs, action, y = torch.randn(9, 5), torch.randn(9, 3), torch.randn(9)
    q, parameters = critic(obs, action), list(critic.parameters())
    loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
    steps = torch.autograd.grad(loss, parameters)
    expected = [(p - 0.1 * g).detach() for p, g in zip(parameters, steps, strict=True)]
    optimizer = torch.optim.SGD(parameters, 0.1)
    metrics = update_critic(critic, target, optimizer, obs, action, y, args)
    torch.testing.assert_close([p.detach() for p in parameters], expected)
    followed = [momentum * a + (1 - momentum) * b for a, b in zip(before, expected, strict=True)]
    torch.testing.assert_close([*map(torch.Tensor.detach, target.parameters())], followed)
    assert metrics["losses/critic"].item() == pytest.approx(loss.item())
    assert metrics["diagnostics/q"].item() == pytest.approx(q.mean().item())


def test_critic_keeps_float32_where_bfloat16_is_used():
    critic = Critic(5, 3, True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        q = critic(torch.randn(64, 5), torch.randn(64, 3)) + 0
        critic.biases[-1].add_(100)
        high = critic(torch.randn(64, 5), torch.randn(64, 3))
    assert q.dtype == torch.float32
    assert len(high.unique()) > 100  # bfloat16 has steps of 0.5 at 100


# ------------------------------------------------------------------------------------- replay
CAPACITY, T, N = 5, 20, 4


def numbered(added):
    """A replay whose rewards encode 1000 rollout + 100 environment + time."""
    args = Args(device="cpu", buffer_iterations=CAPACITY, rollout_chunks=T, num_envs=N)
    replay = Replay(args, obs_dim=2, action_size=3)
    for rollout in range(added):
        slot = replay.next()
        slot["reward"].copy_(1000.0 * rollout + 100 * torch.arange(N) + torch.arange(T)[:, None])
        slot["obs"].copy_(slot["reward"][..., None].expand(-1, -1, 2))
    return replay


@given(added=st.integers(1, 9), length=st.integers(1, 30), count=st.integers(1, 60))
def test_segments_are_consecutive_and_a_share_of_them_is_fresh(added, length, count):
    replay = numbered(added)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rldt_gym, "SEGMENT", length)
        batch = replay.draw(count)
    length = min(length, T)
    assert batch["reward"].shape == (length, count)
    assert batch["action"].shape == (length, count, 3)
    assert torch.equal(batch["obs"][..., 0], batch["reward"])
    first = batch["reward"][0]
    assert torch.equal(batch["reward"], first + torch.arange(length)[:, None])
    assert (first % 100 + length <= T).all()
    assert ((first // 1000 == added - 1).sum() >= max(0.33, 1 / min(added, CAPACITY)) * count)
    assert (first // 1000 >= max(0, added - CAPACITY)).all()  # none that is overwritten


def test_every_kept_rollout_environment_and_start_is_drawn():
    first = numbered(7).draw(20_000)["reward"][0].long()
    share = (first // 1000 == 6).float().mean()
    assert share.item() == pytest.approx(0.33 + 0.67 / 5, abs=0.02)
    assert set((first // 1000).tolist()) == {2, 3, 4, 5, 6}
    assert set((first // 100 % 10).tolist()) == {*range(N)}
    assert set((first % 100).tolist()) == {*range(T - rldt_gym.SEGMENT + 1)}
