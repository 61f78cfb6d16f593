"""Targets, networks, steps and replay of the critic, in all three scripts."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import (
    ENDS_IN,
    MOST,
    arguments,
    each_script,
    each_sparse,
    new_replay,
    observed,
    small_critic,
    small_policy,
    with_stage,
)
from hypothesis import given
from hypothesis import strategies as st

import rldt_furniture
import rldt_gym
import rldt_robomimic


# ------------------------------------------------------------------------------------ targets
@st.composite
def segments(draw):
    """Rewards, ends and next values (T, L) of segments, gamma and lambda."""
    T, L = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    reward, value = 0.5 + torch.randn(2, T, L, dtype=torch.float64, generator=generator)
    ends = st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=T * L, max_size=T * L)
    end = torch.tensor(draw(ends)).view(T, L)  # 1: terminated, 2: truncated
    gamma, lam = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    return reward, (end == 1).double(), (end == 2).double(), value, gamma, lam


def recursive(script, t, r, terminated, truncated, value, gamma, lam):
    """y_t as it is defined, for one segment of plain numbers; of a sparse reward, within its bounds."""
    if terminated[t]:
        y = r[t]
    elif t == len(r) - 1 or (truncated[t] and script is rldt_gym):
        y = r[t] + gamma * value[t]
    else:
        later = recursive(script, t + 1, r, terminated, truncated, value, gamma, lam)
        y = r[t] + gamma * ((1 - lam) * value[t] + lam * later)
    return y if script is rldt_gym else min(max(y, 0.0), MOST[script])


def assert_defined(script, y, arrays, gamma, lam):
    for column in range(y.shape[1]):
        one = [x[:, column].tolist() for x in arrays]
        expected = [recursive(script, t, *one, gamma, lam) for t in range(len(y))]
        assert y[:, column].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@each_script
@given(segment=segments())
def test_td_lambda_equals_its_recursive_definition(script, segment):
    *arrays, gamma, lam = segment
    given = arrays if script is rldt_gym else [*arrays[:2], arrays[3]]  # else a time limit is an end
    most = [MOST[script]] if script is rldt_furniture else []
    assert_defined(script, script.td_lambda(*given, gamma, lam, *most), arrays, gamma, lam)


@each_script
def test_critic_target_takes_the_smaller_value_at_an_action_of_the_policy(script):
    gym = script is rldt_gym
    args = arguments(script, gamma=0.8, td_lambda=0.9 if gym else 0.4)
    policy = small_policy(script)
    target, state = small_critic(script, policy), torch.randn(4, 50, 4)
    target.biases[-1].data.fill_(0.5)
    reward, terminated, truncated = torch.randn(4, 50), torch.zeros(4, 50), torch.zeros(4, 50)
    terminated[1, :20] = truncated[2, 10:30] = 1
    batch = dict(reward=reward, terminated=terminated, truncated=truncated)
    batch["next_obs"] = observed(script, state)
    scale_and_lambda = (2.5, 0.4) if gym else ()
    torch.manual_seed(1)
    y = script.critic_target(policy, target, batch, *scale_and_lambda, args)
    torch.manual_seed(1)
    state = state.view(200, 4)
    q = target(with_stage(script, state), policy.sample(state, torch.randn(200, 4)))
    assert 20 < (q[0] < q[1]).sum() < 180  # each network is sometimes the smaller one
    value = torch.where(q[0] < q[1], q[0], q[1]).view(4, 50)
    arrays = reward / 2.5 if gym else reward, terminated, truncated, value
    assert_defined(script, y, arrays, 0.8, 0.4)
    assert not y.requires_grad


# ----------------------------------------------------------------------------------- networks
@each_script
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_batched_critics_equal_networks_with_the_same_weights(script, layer_norm, depth):
    some = {} if script is rldt_gym else dict(networks=3)
    critic = script.Critic(5, 3, layer_norm, width=16, depth=depth, **some)
    obs, action = torch.randn(7, 5), torch.randn(7, 3)
    q = critic(obs, action)
    assert len(q) == some.get("networks", 2)
    for member in range(len(q)):
        x = torch.cat([obs, action], 1)
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            x = F.linear(x, weight[member].T, bias[member, 0])
            if i < depth:
                x = F.silu(F.layer_norm(x, (16,)) if layer_norm else x)
        torch.testing.assert_close(q[member], x[:, 0])
    assert not torch.allclose(q[0], q[1])
    q[0].sum().backward()
    for parameter in critic.parameters():  # they share no gradients
        assert parameter.grad[0].abs().sum() > 0
        assert parameter.grad[1:].abs().sum() == 0


@each_script
def test_authors_critic_starts_with_normal_weights_and_ours_like_linear_layers(script):
    authors, ours = (script.Critic(50, 50, layer_norm, width=256) for layer_norm in (False, True))
    for weight, bias in zip(authors.weights, authors.biases, strict=True):
        assert weight.std().item() == pytest.approx(0.1, rel=0.1)
        assert (bias == 0).all()
    for weight, bias, fan_in in zip(ours.weights, ours.biases, (100, 256, 256, 256), strict=True):
        bound = 1 / math.sqrt(fan_in)
        assert 0.95 * bound < weight.abs().max() <= bound
        assert 0 < bias.abs().max() <= bound


@each_script
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_update_critic_descends_both_squared_errors_and_moves_the_target(script, momentum):
    args, policy = arguments(script, target_momentum=momentum), small_policy(script)
    critic = small_critic(script, policy)
    target = copy.deepcopy(critic).requires_grad_(False)
    for p in target.parameters():
        p.add_(1.0)
    before = copy.deepcopy([*target.parameters()])
    state, action, y = torch.randn(9, 4), torch.randn(9, 4), torch.randn(9)
    q, parameters = critic(with_stage(script, state), action), list(critic.parameters())
    loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
    steps = torch.autograd.grad(loss, parameters)
    expected = [(p - 0.1 * g).detach() for p, g in zip(parameters, steps, strict=True)]
    optimizer = torch.optim.SGD(parameters, 0.1)
    metrics = script.update_critic(critic, target, optimizer, observed(script, state), action, y, args)
    torch.testing.assert_close([p.detach() for p in parameters], expected)
    followed = [momentum * a + (1 - momentum) * b for a, b in zip(before, expected, strict=True)]
    torch.testing.assert_close([*map(torch.Tensor.detach, target.parameters())], followed)
    assert metrics["losses/critic"].item() == pytest.approx(loss.item())
    assert metrics["diagnostics/q"].item() == pytest.approx(q.mean().item())


@each_script
def test_critic_keeps_float32_where_bfloat16_is_used(script):
    critic = script.Critic(5, 3, True, width=256)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        q = critic(torch.randn(64, 5), torch.randn(64, 3)) + 0
        critic.biases[-1].add_(100)
        high = critic(torch.randn(64, 5), torch.randn(64, 3))
    assert q.dtype == torch.float32
    assert len(high.unique()) > 100  # bfloat16 has steps of 0.5 at 100


# ------------------------------------------------------------------------------------- replay
CAPACITY, T, N = 5, 20, 4


def numbered(script, added, seed=0):
    """A replay that holds 1000 rollout + 100 environment + time everywhere, in next_obs one more.

    With a sparse reward, episodes score 0 to 2 in the end, and some rows are not valid, at random.
    """
    args = arguments(script, buffer_iterations=CAPACITY, num_envs=N)
    replay = new_replay(script, args, small_policy(script), T)
    generator = torch.Generator().manual_seed(seed)
    for rollout in range(added):
        slot = replay.next()
        code = 1000.0 * rollout + 100 * torch.arange(N) + torch.arange(T + 1)[:, None]  # (T + 1, N)
        for name, value in slot.items():
            rows = code[1:] if name == "next_obs" else code[: len(value)]
            value.view(*rows.shape, -1).copy_(rows[..., None].expand(*rows.shape, value[0, 0].numel()))
        if script is not rldt_gym:
            slot["valid"].copy_(torch.rand(T, N, generator=generator) < 0.7)
            slot["valid"][0] = 1
            ends_in = torch.randint(3, (T, N), generator=generator)
            slot[ENDS_IN[script]].copy_(ends_in * (rollout > 0))
    return replay


def draw(script, replay, count, length):
    """A batch, and the weights of the starts that it was drawn by, where there are some."""
    weights, multinomial = [], torch.multinomial
    recorded = lambda weight, *args, **how: weights.append(weight) or multinomial(weight, *args, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "SEGMENT", length)
        patch.setattr(torch, "multinomial", recorded)
        batch = replay.draw(count)
    if script is rldt_robomimic:
        batch |= {name: batch[name]["state"] for name in ("obs", "next_obs")}
    return batch, [weight.double().view(CAPACITY, -1, N) for weight in weights]


@each_script
@given(
    added=st.integers(1, 8), length=st.integers(1, T + 2), count=st.integers(1, 40),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_segments_are_consecutive_rows_of_one_environment(script, added, length, count, seed):
    replay = numbered(script, added, seed)
    batch, length = draw(script, replay, count, length)[0], min(length, T)
    first = batch["reward"][0]
    codes = first + torch.arange(length)[:, None]  # (length, count)
    for name, shift in ("reward", 0), ("terminated", 0), ("obs", 0), ("action", 0), ("next_obs", 1):
        assert (batch[name].view(length, count, -1) == codes[..., None] + shift).all(), name
    assert (first % 100 + length <= T).all()  # none runs over the rollout's end
    assert (first // 1000 >= max(0, added - CAPACITY)).all()  # none that is overwritten
    if script is not rldt_gym:
        assert (batch["valid"][0] == 1).all()
        where = (codes // 1000).long() % CAPACITY, (codes % 100).long(), (first // 100 % 10).long()
        for name in "valid", ENDS_IN[script]:
            assert torch.equal(batch[name], replay.slots[name][where])


@pytest.mark.parametrize("added", [1, 2, 7])
def test_gym_draws_every_rollout_environment_and_start_and_a_third_from_the_newest(added):
    replay = numbered(rldt_gym, added)
    for count in 1, 5, 40:
        rollout = draw(rldt_gym, replay, count, 16)[0]["reward"][0] // 1000
        assert (rollout == added - 1).sum() >= max(0.33, 1 / min(added, CAPACITY)) * count
    first = draw(rldt_gym, replay, 20_000, 16)[0]["reward"][0].long()
    fresh = {1: 1, 2: 0.5 + 0.5 / 2, 7: 0.33 + 0.67 / 5}[added]
    assert (first // 1000 == added - 1).float().mean().item() == pytest.approx(fresh, abs=0.02)
    assert set((first // 1000).tolist()) == {*range(max(0, added - CAPACITY), added)}
    assert set((first // 100 % 10).tolist()) == {*range(N)}
    assert set((first % 100).tolist()) == {*range(T - 16 + 1)}


def start_probabilities(replay, kind, fresh, length):
    """Of each start (rollout, time, environment), from the definition.

    Each kind of episode has the same. Its starts in the newest rollout get `fresh` of that, where there
    are some, and the rest falls on all of its starts alike.
    """
    valid = replay.slots["valid"]
    starts = [start for start in np.ndindex(CAPACITY, T - length + 1, N) if valid[start]]
    p = torch.zeros(CAPACITY, T - length + 1, N, dtype=torch.float64)
    for start in starts:
        alike = [other for other in starts if kind[other] == kind[start]]
        newest = sum(other[0] == replay.slot for other in alike)
        p[start] = 1 / len(alike)
        if newest:
            p[start] = (1 - fresh) / len(alike) + fresh / newest * (start[0] == replay.slot)
    return p / len({kind[start].item() for start in starts})


@each_sparse
@pytest.mark.parametrize("added, length", [(1, 1), (2, 12), (5, 17), (8, T)])  # the last lacks a kind
def test_starts_are_drawn_with_the_probabilities_of_their_definition(script, added, length):
    replay, count = numbered(script, added, seed=added), 20_000
    expected = start_probabilities(replay, replay.slots[ENDS_IN[script]], script.FRESH, length)
    batch, (weight,) = draw(script, replay, count, length)
    torch.testing.assert_close(weight / weight.sum(), expected, rtol=1e-5, atol=0)
    code = batch["reward"][0].long()
    drawn = torch.zeros_like(expected)
    where = code // 1000 % CAPACITY, code % 100, code // 100 % 10
    drawn.index_put_(where, torch.ones(count, dtype=torch.float64), accumulate=True)
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((drawn / count - expected).abs() <= 5 * deviation).all()
