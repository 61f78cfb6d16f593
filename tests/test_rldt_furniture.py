import copy
import dataclasses
import itertools
import json
import math
import signal
import types
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import DEVICE, metrics, parse
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
from hypothesis import given
from hypothesis import strategies as st
from test_furniture_base import DIMS, SETTINGS, STAGES, arguments, small_policy, write_demos

import rldt_furniture
import rldt_gym
from common.flow import FlowPolicy, VelocityMLP, expected_target, sample
from common.svgd import particle_gradient, transport_field
from rldt_furniture import (
    Critic,
    Replay,
    actor_losses,
    collect,
    critic_target,
    evaluate,
    stages_of,
    summary,
    td_lambda,
)


# ------------------------------------------------------------------------------------- critic
@st.composite
def segments(draw):
    """Rewards, ends and next values (T, L) of segments, gamma, lambda and the number of stages."""
    T, L = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    value = 0.5 + 1.5 * torch.randn(T, L, dtype=torch.float64, generator=generator)  # some out of bounds
    table = lambda options: draw(st.lists(st.sampled_from(options), min_size=T * L, max_size=T * L))
    end, reward = (torch.tensor(table(options)).view(T, L) for options in ([0, 0, 0, 1], [0, 0, 1, 2]))
    shares = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    return reward.double(), end.double(), value, *shares, draw(st.integers(1, 2))


def recursive(t, r, terminated, value, gamma, lam, most):
    """y_t as it is defined, for one segment of plain numbers."""
    if terminated[t]:
        y = r[t]
    elif t == len(r) - 1:
        y = r[t] + gamma * value[t]
    else:
        later = recursive(t + 1, r, terminated, value, gamma, lam, most)
        y = r[t] + gamma * ((1 - lam) * value[t] + lam * later)
    return min(max(y, 0.0), most)


@given(segments())
def test_td_lambda_equals_its_recursive_definition_clipped_to_the_number_of_stages(segment):
    *arrays, gamma, lam, most = segment
    y = td_lambda(*arrays, gamma, lam, most)
    for column in range(y.shape[1]):
        one = [x[:, column].tolist() for x in arrays]
        expected = [recursive(t, *one, gamma, lam, most) for t in range(len(y))]
        assert y[:, column].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("furniture", ["one_leg", "lamp"])
def test_critic_target_takes_the_smaller_value_of_the_next_obs_at_an_action_of_the_policy(furniture):
    args, stages = arguments(furniture=furniture, gamma=0.9, td_lambda=0.4), STAGES[furniture]
    policy, T, L = small_policy(), 3, 2
    target = Critic(5, 4, True, width=16, depth=2)
    target.biases[-1].data.fill_(0.5 * stages)  # values inside [0, stages]
    batch = dict(next_obs=torch.randn(T, L, 5), reward=torch.zeros(T, L), terminated=torch.zeros(T, L))
    batch["reward"][1, 0] = batch["terminated"][1, 0] = 1
    torch.manual_seed(1)
    y = critic_target(policy, target, batch, args)
    torch.manual_seed(1)
    noise, values = torch.randn(T * L, policy.action_size).view(T, L, -1), torch.empty(T, L)
    for t, column in itertools.product(range(T), range(L)):
        obs = batch["next_obs"][t, column][None]
        action = policy.sample(obs[:, :4], noise[t, column][None])
        values[t, column] = target(obs, action).min()
    expected = td_lambda(batch["reward"], batch["terminated"], values, 0.9, 0.4, stages)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-4, atol=1e-5)
    assert y[1, 0].item() == 1
    assert not y.requires_grad
    target.biases[-1].data.fill_(77.0)
    assert (critic_target(policy, target, batch, args)[0] == stages).all()


@pytest.mark.parametrize("layer_norm", [False, True])
def test_critic_and_its_update_are_those_of_rldt_gym(layer_norm):
    results = []
    for script in rldt_furniture, rldt_gym:
        torch.manual_seed(3)
        critic = script.Critic(5, 4, layer_norm, width=16)
        target = copy.deepcopy(critic).requires_grad_(False)
        optimizer = torch.optim.SGD(critic.parameters(), 0.1)
        batch = torch.randn(9, 5), torch.randn(9, 4), torch.rand(9)
        args = arguments(target_momentum=0.9)
        measured = script.update_critic(critic, target, optimizer, *batch, args)
        results.append((measured, critic.state_dict(), target.state_dict()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# -------------------------------------------------------------------------------------- actor
K, B, P, D = 4, 3, 5, 2


@pytest.mark.parametrize("kernel", ["rbf", "delta"])
@pytest.mark.parametrize("form", ["literal", "authors"])
def test_losses_and_step_of_the_actor_are_those_of_rldt_gym(kernel, form):
    changes = dict(kernel=kernel, transport_loss=form, transport_scale=1.0, zero_fraction=0.0)
    args, obs, results = arguments(alpha=0.3, n_particles=P, **changes), torch.randn(7, 5), []
    start, reference = small_policy(), small_policy()
    for script, seen in (rldt_furniture, obs), (rldt_gym, obs[:, :-1]):
        policy = copy.deepcopy(start)
        optimizer = torch.optim.SGD(policy.parameters(), 0.1)
        torch.manual_seed(5)
        measured = script.update_actor(policy, reference, QuadraticCritic(), optimizer, seen, args)
        results.append((measured, policy.state_dict()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kernel", ["rbf", "delta"])
@pytest.mark.parametrize("q_gradient", ["critic", "particles"])
def test_field_is_that_of_the_scaled_gradient_of_q_or_toward_particles_of_high_q(kernel, q_gradient):
    velocity, reference = (VelocityMLP(D, 3, 16, 3, 8).double() for _ in range(2))
    obs, start = torch.randn(B, 4, dtype=torch.float64), torch.randn(B, P, D, dtype=torch.float64)
    state = obs[:, None, :-1].expand(-1, P, -1)
    trajectory = sample(velocity, state, start, K, trajectory=True)
    changes = dict(kernel=kernel, q_gradient=q_gradient, transport_loss="literal")
    args, k = arguments(alpha=0.3, transport_scale=10.0, **changes), torch.randint(K, (B, P))
    transport, *_ = actor_losses(velocity, reference, QuadraticCritic(), obs, trajectory, args, k)
    x, t = trajectory[k, torch.arange(B)[:, None], torch.arange(P)], k / K
    query = expected_target(x, t, velocity(x, t, state)).detach()
    particles = query if kernel == "delta" else trajectory[-1]
    gradient = 1.5 * (1 - particles)
    if q_gradient == "particles":
        gradient = particle_gradient(-0.75 * (particles - 1).square().sum(-1), particles)
    phi = transport_field(query, particles, 10 * gradient, args.alpha, kernel)
    weights = -2 / K * (1 - t)[..., None] * phi / (B * P)  # eq. (13)
    parameters = list(velocity.parameters())
    expected = torch.autograd.grad(velocity(x, t, state), parameters, weights)
    torch.testing.assert_close(torch.autograd.grad(transport, parameters, retain_graph=True), expected)


@pytest.mark.parametrize("zero_fraction", [0.0, 0.5, 1.0])
def test_particles_and_the_constraint_start_from_zero_in_a_share_of_all(monkeypatch, zero_fraction):
    starts, losses = {}, actor_losses

    def recorded(velocity, reference, critic, obs, trajectory, args):
        starts["particles"] = trajectory[0]

        def seen(x, t, obs):
            starts["constraint"] = x - t[..., None] * trajectory[-1]  # (1 - t) x_0
            return reference(x, t, obs)

        return losses(velocity, seen, critic, obs, trajectory, args)

    monkeypatch.setattr(rldt_furniture, "actor_losses", recorded)
    args, policy = arguments(n_particles=6, zero_fraction=zero_fraction), small_policy()
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    networks = policy, copy.deepcopy(policy), QuadraticCritic()
    rldt_furniture.update_actor(*networks, optimizer, torch.randn(200, 5), args)
    for x0 in starts.values():
        zero = (x0.abs() < 1e-5).all(-1).float()  # (200, 6)
        assert zero.mean().item() == pytest.approx(zero_fraction, abs=0.05)
        some = 1 - (1 - zero_fraction) ** 6  # drawn per particle, not per state
        assert (zero.mean(1) > 0).float().mean().item() == pytest.approx(some, abs=0.05)


def test_losses_show_the_velocities_the_state_and_the_critic_all():
    seen = {}

    def velocity(name):
        return lambda x, t, obs: seen.update({name: obs}) or x

    def critic(obs, action):
        seen["critic"] = obs
        return action.sum(-1).expand(2, -1)

    obs, trajectory = torch.randn(B, 4), torch.randn(K + 1, B, P, D)
    actor_losses(velocity("actor"), velocity("reference"), critic, obs, trajectory, arguments())
    for name, expected in ("actor", obs[:, :-1]), ("reference", obs[:, :-1]), ("critic", obs):
        each = seen[name].reshape(-1, B, P, expected.shape[1])
        assert torch.equal(each, expected[:, None].expand(len(each), -1, P, -1)), name


# ------------------------------------------------------------------------------------- replay
CAPACITY, T, N = 3, 10, 4


def numbered(added, seed=0):
    """A replay that encodes rollout, environment and time: 1000 rollout + 100 environment + time.

    Its episodes reach 0 to 2 pairs, and some rows are not valid, at random.
    """
    args = arguments(buffer_iterations=CAPACITY, horizon=T, num_envs=N)
    replay = Replay(args, small_policy(2, 3, chunk=1))
    generator = torch.Generator().manual_seed(seed)
    for rollout in range(added):
        slot = replay.next()
        code = 1000.0 * rollout + 100 * torch.arange(N) + torch.arange(T + 1)[:, None]
        slot["obs"].copy_(code[..., None].expand(-1, -1, 3))
        slot["action"].copy_(code[:-1, :, None].expand(-1, -1, 3))
        slot["reward"].copy_(code[:-1])
        slot["valid"].copy_(torch.rand(T, N, generator=generator) < 0.7)
        slot["valid"][0] = 1
        slot["reached"].copy_(torch.randint(3, (T, N), generator=generator) * (rollout > 0))
    return replay


def draw(replay, count, length):
    """A batch, and the weights of the starts that it was drawn by, in double precision."""
    weights, multinomial = [], torch.multinomial
    recorded = lambda weight, *args, **how: weights.append(weight) or multinomial(weight, *args, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rldt_furniture, "SEGMENT", length)
        patch.setattr(torch, "multinomial", recorded)
        batch = replay.draw(count)
    return batch, weights[0].double().view(CAPACITY, -1, N)


@given(st.integers(1, 7), st.integers(1, T + 2), st.integers(1, 40), st.integers(0, 1000))
def test_segments_are_consecutive_rows_of_one_environment_that_begin_validly(added, length, count, seed):
    replay = numbered(added, seed)
    batch, length = draw(replay, count, length)[0], min(length, T)
    first = batch["obs"][0, :, 0]
    codes = first + torch.arange(length)[:, None]  # (length, count)
    for name, shift in ("obs", 0), ("action", 0), ("next_obs", 1):
        assert torch.equal(batch[name], (codes + shift)[..., None].expand(-1, -1, 3)), name
    assert torch.equal(batch["reward"], codes)
    assert (batch["valid"][0] == 1).all()
    assert (first % 100 + length <= T).all()  # none runs over the rollout's end
    assert (first // 1000 >= max(0, added - CAPACITY)).all()  # none that is overwritten
    rollout, column, time = (codes // 1000).long(), (first // 100 % 10).long(), (codes % 100).long()
    for name in "valid", "reached":
        assert torch.equal(batch[name], replay.slots[name][rollout % CAPACITY, time, column])


def start_probabilities(replay, length):
    """Of each start (rollout, time, environment), from the definition.

    Each kind of episode has the same. Its starts in the newest rollout get FRESH of that, where there
    are some, and the rest falls on all of its starts alike.
    """
    fresh, valid, kind = rldt_furniture.FRESH, replay.slots["valid"], replay.slots["reached"]
    starts = [start for start in np.ndindex(CAPACITY, T - length + 1, N) if valid[start]]
    p = torch.zeros(CAPACITY, T - length + 1, N, dtype=torch.float64)
    for start in starts:
        alike = [other for other in starts if kind[other] == kind[start]]
        newest = sum(other[0] == replay.slot for other in alike)
        p[start] = 1 / len(alike)
        if newest:
            p[start] = (1 - fresh) / len(alike) + fresh / newest * (start[0] == replay.slot)
    return p / len({kind[start].item() for start in starts})


@pytest.mark.parametrize("added", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 3, T])
def test_starts_are_drawn_with_the_probabilities_of_their_definition(added, length):
    replay = numbered(added, seed=added)
    expected, count = start_probabilities(replay, length), 20_000
    batch, weight = draw(replay, count, length)
    torch.testing.assert_close(weight / weight.sum(), expected, rtol=1e-5, atol=0)
    code = batch["obs"][0, :, 0].long()
    drawn = torch.zeros_like(expected)
    where = code // 1000 % CAPACITY, code % 100, code // 100 % 10
    drawn.index_put_(where, torch.ones(count, dtype=torch.float64), accumulate=True)
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((drawn / count - expected).abs() <= 5 * deviation).all()


# ------------------------------------------------------------------------------------ rollouts
def scripted(num_envs, lengths, pairs, diverges=None, **kwargs):
    """Episodes of seeds 100, 101, ... of `lengths` chunks; each chunk of `pairs` assembles a pair."""
    assembles = lambda seed, t, chunk: pairs[seed - 100].count(t)
    length = lambda seed: lengths[seed - 100]
    return FakeEnvs(num_envs, length, assembles, diverges=(diverges or {}).get, **kwargs)


def rollout(envs, rows, policy=None, **changes):
    """Collects a rollout from fake environments; returns policy, slot and environment steps."""
    furniture = {1: "one_leg", 2: "lamp"}[envs.stages]
    fixed = dict(num_envs=envs.num_envs, buffer_iterations=1, furniture=furniture, horizon=2 * rows)
    args, policy = arguments(**fixed | changes), policy or small_policy()
    replay = Replay(args, policy)
    for value in replay.slots.values():
        value.fill_(77)  # as if left from an older rollout
    torch.manual_seed(2)
    steps = collect(policy, envs, replay.next(), 100, args)
    return policy, replay.newest(), steps


# Three environments of a task of two pairs. Episode 100 assembles both in its first two chunks, 101 one
# and does not end, 102 none before its time limit. Then come 103 (one pair, time limit), 104 (one pair,
# then the simulation diverges), 105 (one pair) and 106 (none), which the rollout's end cuts.
LENGTHS, PAIRS = [5, 20, 3, 3, 9, 9, 9], [(0, 1), (2,), (), (1,), (0,), (1,), ()]
ROWS = [
    [(100, 0), (100, 1), (103, 0), (103, 1), (103, 2), (105, 0), (105, 1), (105, 2), (105, 3)],
    [(101, t) for t in range(9)],
    [(102, 0), (102, 1), (102, 2), (104, 0), (104, 1), (104, 2), (106, 0), (106, 1), (106, 2)],
]
STAGE = [[0, 1, 0, 0, 1, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0, 0]]
REWARD = [[1, 1, 0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]]
TERMINATED = [[0, 1, 0, 0, 1, 0, 0, 0], [0] * 8, [0, 0, 1, 0, 0, 1, 0, 0]]
REACHED = [[2, 2, 1, 1, 1, 1, 1, 1], [1] * 8, [0, 0, 0, 1, 1, 1, 0, 0]]


def test_rollout_of_scripted_episodes_of_two_pairs():
    envs = scripted(3, LENGTHS, PAIRS, {104: 2}, stages=2)
    policy, slot, steps = rollout(envs, 8)
    assert envs.begun == [100, 101, 102, 103, 104, 105, 106]
    assert slot["obs"][..., -1].T.tolist() == (np.array(STAGE) / 2).tolist()
    assert slot["reward"].T.tolist() == REWARD
    assert slot["terminated"].T.tolist() == TERMINATED
    assert slot["reached"].T.tolist() == REACHED
    assert (slot["valid"] == 1).all()
    for column, rows in enumerate(ROWS):
        for row, episode in enumerate(rows):
            expected = policy.normalize(envs.observation(*episode))
            assert torch.equal(slot["obs"][row, column, :-1], expected), (row, column)
    for t, chunks in enumerate(envs.executed):
        np.testing.assert_array_equal(chunks, policy.to_env(slot["action"][t]))
    assert steps == sum(envs.steps.values()) == 2 * 8 * 3 - 4  # an episode's last step is one env step


def test_what_follows_the_last_pair_is_masked_where_episodes_go_on():
    # 100 assembles its pairs in chunks 0 and 1 of 4, 101 one of two, 102 (after 100) both at once
    envs = scripted(2, [4, 20, 9], [(0, 1), (5,), (0, 0)], stages=2, stop=False)
    _, slot, steps = rollout(envs, 8)
    assert envs.begun == [100, 101, 102]
    assert slot["valid"].T.tolist() == [[1, 1, 0, 0, 1, 0, 0, 0], [1] * 8]
    assert slot["reward"].T.tolist() == [[1, 1, 0, 0, 2, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0]]
    stages = [[0, 1, 2, 2, 0, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1, 1]]
    assert (2 * slot["obs"][..., -1]).T.tolist() == stages
    assert slot["terminated"].T.tolist() == [[0, 1, 1, 1, 1, 1, 1, 1], [0] * 8]
    assert slot["reached"].T.tolist() == [[2] * 8, [1] * 8]
    assert steps == 2 * 8 * 2 - 1


@pytest.mark.parametrize("fraction, count", [(0.0, 0), (0.5, 2), (1.0, 4)])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_rollout_explores_from_zero_in_a_share_of_the_environments(fraction, count, steps):
    envs = scripted(4, [20] * 4, [()] * 4)
    policy, slot, _ = rollout(envs, 6, zero_fraction=fraction, exploration_steps=steps)
    with torch.no_grad():
        deterministic = policy.sample(slot["obs"][:-1, :, :-1], torch.zeros(6, 4, 4))
    same = (slot["action"] - deterministic).abs().amax((0, 2)) < 1e-5
    count = 0 if steps == 4 else count  # steps before the last add noise
    assert same.tolist() == [True] * count + [False] * (4 - count)


# ---------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("num_envs", [1, 4, 16])
@pytest.mark.parametrize("stop", [False, True])
def test_evaluation_runs_every_state_once_from_zero_and_once_from_noise(monkeypatch, num_envs, stop):
    starts = {}

    def assembles(seed, t, chunk):
        zero = not chunk.any()
        starts.setdefault((seed, zero), []).append(t)
        return int(t == 0 and seed % 2 == 0) + int(t == 1 and seed % 3 == (0 if zero else 1))

    pairs = lambda seed, zero: int(seed % 2 == 0) + int(seed % 3 == (0 if zero else 1))
    monkeypatch.setattr(rldt_furniture, "summary", lambda stages, name, args: {name: stages.tolist()})
    envs = FakeEnvs(num_envs, lambda seed: 2 + seed % 3, assembles, stages=2, stop=stop)
    scores = evaluate(Identity(), envs, arguments(furniture="lamp"), episodes=7, seed=50)
    assert scores[""] == [pairs(50 + j, True) for j in range(7)]
    assert scores["_sampled"] == [pairs(50 + j, False) for j in range(7)]
    assert {0, 1, 2} == set(scores[""])
    assert Counter(envs.begun) == {50 + j: 2 for j in range(7)}
    for (seed, zero), times in starts.items():  # from start to end, and from x_0 of one kind
        assert times == list(range(2 if stop and pairs(seed, zero) == 2 else 2 + seed % 3))


def test_a_simulation_that_diverges_ends_its_episode_with_the_pairs_it_had(monkeypatch):
    monkeypatch.setattr(rldt_furniture, "summary", lambda stages, name, args: {name: stages.tolist()})
    envs = scripted(2, [9] * 4, [(0,), (0, 1), (), ()], {100: 2, 102: 0}, stages=2)
    scores = evaluate(Identity(), envs, arguments(furniture="lamp"), episodes=4, seed=100)
    assert scores[""] == scores["_sampled"] == [1, 2, 0, 0]
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
def test_summary_has_the_success_rate_with_wilsons_interval_and_the_pairs(k, n):
    z, p = 1.959963984540054, k / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    stages = np.where(np.arange(n) < k, 2, np.arange(n) % 2)
    result = summary(stages, "_sampled", arguments(furniture="lamp"))
    expected = {
        "eval_success_sampled": p, "eval_success_sampled_low": center - half,
        "eval_success_sampled_high": center + half, "eval_stages_sampled": stages.mean(),
        "eval_stages_sampled_std": stages.std(),
    }  # fmt: skip
    assert result == pytest.approx(expected, abs=1e-9)
    assert {type(number) for number in result.values()} == {float}  # checkpoints hold plain numbers


# ------------------------------------------------------------------------------------ settings
def settled(monkeypatch, *flags):
    """The settings with which main begins its run."""
    taken = []
    monkeypatch.setattr(rldt_furniture, "Run", lambda args, name: taken.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(flags)
    return taken[0]


@pytest.mark.parametrize("furniture, horizon, scale", [("one_leg", 700, 30), ("lamp", 1000, 8)])
def test_the_task_decides_what_is_not_given(monkeypatch, furniture, horizon, scale):
    args = settled(monkeypatch, f"--furniture={furniture}")
    assert (args.horizon, args.transport_scale, args.backend) == (horizon, scale, "mujoco")
    assert stages_of(args) == STAGES[furniture]
    given = "--horizon=48", "--transport-scale=3", "--q-gradient=critic", "--n-particles=1"
    args = settled(monkeypatch, f"--furniture={furniture}", *given)
    assert (args.horizon, args.transport_scale) == (48, 3)


def test_gradient_of_the_particles_needs_two_of_them():
    with pytest.raises(SystemExit, match="--q-gradient particles needs --n-particles"):
        main(["--q-gradient=particles", "--n-particles=1"])


def test_paper_preset_sets_the_values_of_the_paper():
    args = parse(rldt_furniture, ["--preset=paper"])
    assert (args.num_envs, args.gamma, args.q_gradient, args.actor_lr) == (1000, 0.995, "critic", 2e-5)
    assert args.actor_batch * args.n_particles == args.segments * rldt_furniture.SEGMENT == 50_000
    small, large = (rldt_furniture.PRETRAINING[preset] for preset in ("laptop", "paper"))
    assert small.keys() == large.keys()
    assert (large["width"], large["depth"], large["euler_steps"], large["lr"]) == (1024, 7, 32, 1e-4)


def test_settings_are_few():
    assert len(dataclasses.fields(rldt_furniture.Args)) <= 50


# ------------------------------------------------------------------- whole runs without simulators
@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Files of small random policies: {furniture: path}."""
    paths = {}
    for furniture, dim in DIMS.items():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            policy = small_policy(dim, action_dim=10, chunk=4)
        paths[furniture] = tmp_path_factory.mktemp("base") / f"{furniture}.safetensors"
        policy.save(paths[furniture], furniture=furniture)
    return paths


def flags(base, runs, **changes):
    """Flags of a run of four iterations, the first and the last of which evaluate."""
    values = SHORT | dict(
        furniture="lamp", backend="mujoco", runs=runs, base=base, device=DEVICE, horizon=52,
        exploration_steps=2, q_gradient="critic", transport_scale=30.0, reference_every=1,
    )  # fmt: skip
    return words(values | changes)


def main(argv):
    return rldt_furniture.main(parse(rldt_furniture, argv))


def use_fakes(patch):
    """Has main() run on fake environments, all `made`; their episodes `stop` at success or go on."""
    fakes = types.SimpleNamespace(made=[], stop=True)

    def make_envs(args, num_envs):
        """Episodes of 3 to 5 chunks, whose actions decide whether they assemble a pair."""
        scores = lambda seed, t, chunk: int(math.sin(100 * chunk.sum()) > 0.4)
        sizes = dict(obs_dim=DIMS[args.furniture], action_dim=10)
        length = lambda seed: 3 + seed % 3
        fakes.made.append(FakeEnvs(num_envs, length, scores, stages_of(args), fakes.stop, **sizes))
        return fakes.made[-1]

    patch.setattr(rldt_furniture, "make_envs", make_envs)
    patch.setattr(rldt_furniture, "SEGMENT", 3)
    patch.setattr(rldt_furniture, "CRITIC_WIDTH", {"laptop": 16})
    return fakes


@pytest.fixture
def fakes(monkeypatch):
    return use_fakes(monkeypatch)


def whole_run(furniture, base, runs, **changes):
    """Directory and result of a run, after which Ctrl-C does what it did before."""
    handler = signal.getsignal(signal.SIGINT)
    result = main(flags(base, runs, furniture=furniture, **changes))
    signal.signal(signal.SIGINT, handler)
    return only_run(runs), result


@pytest.fixture(scope="module")
def fake_run(bases, tmp_path_factory):
    """Directory and result of a complete run on fake environments, and these; read it only."""
    with pytest.MonkeyPatch.context() as patch:
        fakes = use_fakes(patch)
        return *whole_run("lamp", bases["lamp"], tmp_path_factory.mktemp("fake")), fakes.made[0]


def test_run_succeeds_and_fails_in_turn_so_that_it_tests_something(fake_run):
    run, result, _ = fake_run
    rows, replay = metrics(run), checkpoint(run, "checkpoint.replay0")
    assert any(0 < float(row["train_success"]) < 1 for row in rows[1:4])
    assert set(replay["reached"].unique().tolist()) == {0, 1, 2}
    assert set(replay["obs"][..., -1].unique().tolist()) == {0, 0.5}
    assert checkpoint(run)["critic"]["weights.0"].shape[1] == 44 + 1 + 40  # state, stage and action
    last = replay["reached"][0]  # the third rollout has overwritten the first
    assert float(rows[3]["train_stages"]) == last.mean()
    assert float(rows[3]["train_success"]) == (last == 2).float().mean()
    for name, row in ("base", rows[0]), ("final", rows[-1]):
        for kind in "success", "success_low", "stages", "stages_std", "stages_sampled":
            assert result[f"{name}_{kind}"] == float(row[f"eval_{kind}"])


def in_training(counter):
    """Without the seeds of the evaluations of a run with seed 3."""
    assert {4_000_000, 4_000_001, 4_000_002} <= set(counter)
    return {seed: value for seed, value in counter.items() if seed // 1_000_000 != 4}


@pytest.mark.parametrize("changes", [
    dict(td_lambda=0.0, critic_layer_norm=False, q_gradient="particles", reference_every=25),
    dict(transport_loss="literal", kernel="delta", reference_every=0, bf16=False, n_particles=1),
    dict(furniture="one_leg", reference_every=1),
])  # fmt: skip
def test_run_with_the_other_choices_ends_with_finite_numbers(fakes, bases, tmp_path, changes):
    furniture = changes.get("furniture", "lamp")
    result = main(flags(bases[furniture], tmp_path, **dict(iterations=3, warmup_iterations=0) | changes))
    assert result["task"] == f"{furniture}-low"
    run = only_run(tmp_path)
    saved = checkpoint(run)
    assert float(metrics(run)[2]["diagnostics/base_distance"]) > 0
    followed = all(torch.equal(value, saved["policy"][key]) for key, value in saved["reference"].items())
    assert followed == (changes["reference_every"] == 1)
    assert saved["critic"]["weights.0"].shape[1] == DIMS[furniture] + 1 + 40
    assert all(envs.closed for envs in fakes.made)


def test_the_actor_starts_after_the_warm_up(fake_run):
    run, _, envs = fake_run
    rows = metrics(run)
    for i, row in enumerate(rows):
        assert (row["eval_success"] != "") == (row["eval_stages_sampled"] != "") == (i in (0, 4))
        assert (row["losses/critic"] != "") == (row["train_stages"] != "") == (i in (1, 2, 3))
        assert (row["losses/transport"] != "") == (i in (2, 3))
    assert float(rows[1]["diagnostics/base_distance"]) == 0
    assert float(rows[3]["diagnostics/base_distance"]) > 0
    assert int(rows[-1]["env_steps"]) == sum(in_training(envs.steps).values())


def test_training_episodes_are_of_seeds_of_their_own(fake_run):
    begun = in_training(Counter(fake_run[2].begun))
    assert set(begun.values()) == {1}
    assert {seed // 10_000 for seed in begun} == {40_001, 40_002, 40_003}
    assert {400_010_000, 400_020_000, 400_030_000} <= set(begun)


def test_states_after_the_last_pair_reach_neither_update_and_the_critic_sees_their_stage(
    fakes, bases, tmp_path, monkeypatch
):
    fakes.stop, seen = False, []
    critic, actor = rldt_furniture.update_critic, rldt_furniture.update_actor
    recorded_critic = lambda *args: seen.append(args[3]) or critic(*args)
    recorded_actor = lambda *args: seen.append(args[4]) or actor(*args)
    monkeypatch.setattr(rldt_furniture, "update_critic", recorded_critic)
    monkeypatch.setattr(rldt_furniture, "update_actor", recorded_actor)
    main(flags(bases["lamp"], tmp_path, segments=40))
    (envs,) = fakes.made
    valid = {seed % 100_000: chunks for seed, chunks in in_training(envs.valid).items()}
    assert len(valid) == len(in_training(envs.valid))  # no two seeds with the same last digits
    left = [valid[round(s[0].item() * 100_000)] - 1 - round(s[1].item() * 10) for s in torch.cat(seen)]
    assert min(left) == 0  # the chunk that assembles the last pair, but none after it
    assert any(chunks < 3 for chunks in valid.values())  # an episode is at least so long
    assert set(torch.cat(seen)[:, -1].tolist()) == {0, 0.5}


def test_evaluating_a_run_gives_its_final_numbers(fakes, fake_run, capsys):
    run, result, _ = fake_run
    scores = main(["--evaluate", run])
    for key, value in scores.items():
        assert result[key.replace("eval", "final")] == value
    assert "eval_success" in capsys.readouterr().out
    assert all(envs.closed for envs in fakes.made)


def test_best_policy_is_measured_again_on_other_episodes(fakes, bases, tmp_path, scripted_evaluations):
    scores = [0.5, 1.5, 1.0, 1.25]  # base, middle, final, the middle's policy again
    episodes, policies = scripted_evaluations(rldt_furniture, scores, "eval_stages")
    result = main(flags(bases["lamp"], tmp_path, eval_every=2, eval_episodes=3, final_eval_episodes=4))
    assert [len(some) for some in episodes] == [8, 6, 8, 8]
    assert not any(episodes[-1] & others for others in episodes[:-1])
    assert [result[f"{name}_stages"] for name in ("base", "final", "best")] == [0.5, 1.0, 1.25]
    assert same(policies[-1], policies[1].state_dict())
    assert not same(policies[-1], policies[2].state_dict())


def test_run_that_crashed_and_is_resumed_equals_one_that_did_not(fakes, fake_run, bases, tmp_path):
    check_crash_and_resume(rldt_furniture, flags(bases["lamp"], tmp_path), tmp_path, fake_run[0])


# ------------------------------------------------------------------------- a whole run on MuJoCo
@pytest.fixture(scope="module")
def one_leg(tmp_path_factory):
    """A complete run on One-Leg whose base is pretrained on random demonstrations; read it only."""
    path = write_demos(tmp_path_factory.mktemp("demos") / "demos.hdf5")
    with pytest.MonkeyPatch.context() as patch:
        settings = SETTINGS | dict(layer_norm=True, cond_mlp=[7])
        patch.setitem(rldt_furniture.PRETRAINING, "laptop", settings)
        changes = dict(dataset=path, iterations=3, horizon=10, final_eval_episodes=2)
        return whole_run("one_leg", None, tmp_path_factory.mktemp("one_leg"), **changes)


def test_run_on_mujoco_keeps_its_policy_and_results(one_leg):
    run, returned = one_leg
    assert run.name.startswith("one_leg-low__rldt__3__")
    assert not [*run.glob("*.partial"), *run.glob("pretraining*")]
    args = json.loads((run / "args.json").read_text())
    assert (args["seed"], args["horizon"], args["backend"]) == (3, 10, "mujoco")
    assert same(FlowPolicy.load(run / "policy.safetensors"), checkpoint(run)["policy"])
    result = json.loads((run / "result.json").read_text())
    assert result == json.loads(json.dumps(returned))
    rows = metrics(run)
    assert 0 < int(rows[1]["env_steps"]) <= 2 * 12  # three chunks of four steps in two environments
    assert int(rows[2]["env_steps"]) == int(rows[3]["env_steps"]) == result["env_steps"]


def test_replay_of_a_run_on_mujoco_holds_its_episodes(one_leg):
    slot = checkpoint(one_leg[0], "checkpoint.replay1")  # of the second iteration
    assert slot["obs"].shape == (4, 2, 59)
    assert slot["valid"].tolist() == [[1, 1]] * 3
    assert torch.equal(slot["reward"] > 0, (slot["terminated"] > 0) & (slot["reached"] > 0))
    assert (slot["obs"][1:] != slot["obs"][:-1]).any(-1).all()
    assert slot["obs"].abs().max() <= 5


def test_video_shows_the_policy_or_says_why_not(bases, tmp_path, capsys, monkeypatch):
    for name in "MUJOCO_GL", "PYOPENGL_PLATFORM":  # as before, afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    short = dataclasses.replace(rldt_furniture.FURNITURE["one_leg"], horizon=3)
    monkeypatch.setitem(rldt_furniture.FURNITURE, "one_leg", short)
    rldt_furniture.record_video(FlowPolicy.load(bases["one_leg"]), "one_leg", "low", tmp_path / "videos")
    printed = capsys.readouterr().out
    assert (tmp_path / "videos" / "episode.mp4").exists() == (printed == "")
    if printed:
        assert "libosmesa6" in printed
