import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from rldt_gym import VectorEnv

TASKS = "Hopper-v4", "Walker2d-v4", "HalfCheetah-v4"


class Counter(gym.Env):
    """Observes (episode, step); reward = action + step; terminates at step 6, or at step 4 in every second episode."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    broken = None  # (step, what it then returns as observation, as reward)

    def __init__(self):
        self.episode = -1

    def observation(self):
        return np.array([self.episode, self.t], np.float32)

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action):
        self.t += 1
        obs, reward = self.observation(), float(action[0]) + self.t
        if self.broken and self.t == self.broken[0]:
            obs, reward = np.full(2, self.broken[1], np.float32), self.broken[2]
        return obs, reward, self.t == (6 if self.episode % 2 == 0 else 4), False, {}


class NaNObservation(Counter):
    broken = 4, np.nan, 0.0


class InfReward(Counter):
    broken = 3, 0.0, np.inf


class Picture(Counter):
    observation_space = spaces.Box(0, 1, (4, 4), np.float32)


class Buttons(Counter):
    action_space = spaces.Discrete(3)


@pytest.fixture(scope="module", autouse=True)
def own_tasks():
    names = {
        "RldtCounter-v0": Counter,
        "RldtNaN-v0": NaNObservation,
        "RldtInf-v0": InfReward,
        "RldtPicture-v0": Picture,
    }
    for name, task in {**names, "RldtButtons-v0": Buttons}.items():
        gym.register(name, task, disable_env_checker=True)
    gym.register("RldtShort-v0", Counter, max_episode_steps=4, disable_env_checker=True)
    yield
    for name in (*names, "RldtButtons-v0", "RldtShort-v0"):
        del gym.registry[name]


def both_backends(env_id, num_envs, chunk=1):
    """An EnvPool and a Gymnasium batch in the same states: qpos = (0, obs[:nq-1]), qvel = the rest."""
    pool, plain = (VectorEnv(env_id, num_envs, chunk, backend, seed=3) for backend in ("envpool", "gymnasium"))
    start = pool.envs.reset()[0]  # float64; VectorEnv would round it
    pool.obs = start.astype(np.float32)
    plain.reset()
    plain.obs = pool.obs.copy()
    for env, obs in zip(plain.envs.envs, start, strict=True):
        model = env.unwrapped.model
        env.unwrapped.set_state(np.r_[0, obs[: model.nq - 1]], obs[model.nq - 1 :])
        # EnvPool's MuJoCo 3.6 seems to add the contact margins of two geoms where 3.3.7 takes the larger one: with twice
        # the margin observations agree to the last bit, without this line Hopper's velocities (only its model has a margin)
        # differ by up to 0.3 from the first touch of the floor on.
        model.geom_margin *= 2
    return pool, plain


# Measured over these 40 steps of 8 environments: observations differ by at most 3e-7, rewards by at most 2e-7
# (EnvPool's are float32). The tolerances are wider, as a contact that comes a rounding error later grows.
@pytest.mark.parametrize("env_id", TASKS)
def test_backends_agree_from_the_same_state_and_actions(env_id):
    pool, plain = both_backends(env_id, 8)
    rng, alive, steps = np.random.default_rng(0), np.ones(8, bool), 0
    while alive.any() and steps < 40:
        actions = rng.uniform(-1.3, 1.3, (8, 1, pool.action_dim)).astype(np.float32)  # beyond the limits: clipped
        first, second = pool.step(actions, alive), plain.step(actions, alive)
        np.testing.assert_allclose(first[0][alive], second[0][alive], atol=1e-4, rtol=1e-5)
        np.testing.assert_allclose(first[1], second[1], atol=1e-5)
        for i in (2, 3, 4):  # terminated, truncated, length
            np.testing.assert_array_equal(first[i], second[i])
        alive &= ~(first[2] | first[3])
        steps += 1
    assert steps >= 20
    assert alive.all() == (env_id == "HalfCheetah-v4")  # the other two fall, so terminations were compared too


@pytest.mark.parametrize("env_id", TASKS)
def test_backends_agree_on_whole_chunks(env_id):
    pool, plain = both_backends(env_id, 8, chunk=4)
    rng, alive = np.random.default_rng(1), np.ones(8, bool)
    for _ in range(10):
        actions = rng.uniform(-1, 1, (8, 4, pool.action_dim)).astype(np.float32)
        first, second = pool.step(actions, alive), plain.step(actions, alive)
        for a, b in zip(first, second, strict=True):
            np.testing.assert_allclose(a[alive], b[alive], atol=1e-4, rtol=1e-5)
        alive &= ~(first[2] | first[3])


@pytest.mark.parametrize("env_id", TASKS)
def test_backends_have_the_same_spaces(env_id):
    pool, plain = (VectorEnv(env_id, 1, 1, backend) for backend in ("envpool", "gymnasium"))
    assert (pool.obs_dim, pool.action_dim) == (plain.obs_dim, plain.action_dim)
    np.testing.assert_array_equal(pool.action_space.low, plain.action_space.low)
    np.testing.assert_array_equal(pool.action_space.high, plain.action_space.high)


@pytest.mark.parametrize("backend, num_envs", [("envpool", 3), ("gymnasium", 1)])
def test_halfcheetah_is_truncated_after_exactly_1000_steps_inside_a_chunk(backend, num_envs):
    envs = VectorEnv("HalfCheetah-v4", num_envs, chunk=3, backend=backend)
    envs.reset()
    actions = np.zeros((num_envs, 3, envs.action_dim), np.float32)
    for _ in range(333):
        _, _, terminated, truncated, length = envs.step(actions)
        assert not terminated.any()
        assert not truncated.any()
        assert (length == 3).all()
    last, _, terminated, truncated, length = envs.step(actions)
    assert truncated.all()
    assert not terminated.any()
    assert (length == 1).all()
    assert np.abs(envs.obs - last).max(1).min() > 1e-3  # already the next episode's
    assert np.abs(envs.obs[:, :8]).max() < 0.11  # reset noise of the positions is uniform in +-0.1
    assert (envs.step(actions)[4] == 3).all()


def test_chunk_sums_rewards_until_the_episode_ends_and_ignores_its_rest():
    envs = VectorEnv("RldtCounter-v0", 1, chunk=4, backend="gymnasium")
    np.testing.assert_array_equal(envs.reset(), [[0, 0]])
    actions = np.array([0.1, 0.2, 0.3, 0.4], np.float32).reshape(1, 4, 1)
    expected = [  # next_obs, reward, terminated, length, first observation of what follows
        ([0, 4], 1 + 2 + 3 + 4 + 1.0, False, 4, [0, 4]),
        ([0, 6], 5 + 6 + 0.3, True, 2, [1, 0]),
        ([1, 4], 1 + 2 + 3 + 4 + 1.0, True, 4, [2, 0]),
        ([2, 4], 1 + 2 + 3 + 4 + 1.0, False, 4, [2, 4]),
    ]
    for last, total, end, steps, following in expected:
        next_obs, reward, terminated, truncated, length = envs.step(actions)
        np.testing.assert_array_equal(next_obs, [last])
        np.testing.assert_allclose(reward, [total], rtol=1e-6)
        assert terminated.tolist() == [end]
        assert truncated.tolist() == [False]
        assert length.tolist() == [steps]
        np.testing.assert_array_equal(envs.obs, [following])


def test_time_limit_is_a_truncation_and_a_termination_at_the_limit_is_not():
    envs = VectorEnv("RldtShort-v0", 1, chunk=5, backend="gymnasium")
    envs.reset()
    ends = []
    for _ in range(2):  # the first episode would end at step 6, the second ends at the limit of 4
        _, _, terminated, truncated, length = envs.step(np.zeros((1, 5, 1), np.float32))
        ends.append((bool(terminated[0]), bool(truncated[0]), int(length[0])))
    assert ends == [(False, True, 4), (True, False, 4)]


def test_actions_are_clipped_to_the_action_space():
    envs = VectorEnv("RldtCounter-v0", 1, chunk=1, backend="gymnasium")
    envs.reset()
    assert envs.step(np.array([[[7.0]]]))[1][0] == pytest.approx(1 + 1)
    assert envs.step(np.array([[[-7.0]]]))[1][0] == pytest.approx(-1 + 2)


@pytest.mark.parametrize("chunk", [2, 5])
def test_envpool_chunks_equal_their_single_steps(chunk):
    whole, single = (VectorEnv("Hopper-v4", 6, c, "envpool", seed=4) for c in (chunk, 1))
    np.testing.assert_array_equal(whole.reset(), single.reset())
    rng, ended = np.random.default_rng(2), 0
    for _ in range(25):
        actions = rng.uniform(-1, 1, (6, chunk, 3)).astype(np.float32)
        next_obs, reward, terminated, truncated, length = whole.step(actions)
        total, alive, steps = np.zeros(6), np.ones(6, bool), np.zeros(6, int)
        last, new = np.zeros((6, 11), np.float32), np.zeros((6, 11), np.float32)
        for c in range(chunk):
            o, r, term, trunc, _ = single.step(actions[:, c : c + 1], alive)
            total, steps = total + r, steps + alive
            last[alive], new[alive] = o[alive], single.obs[alive]
            alive = alive & ~(term | trunc)
        np.testing.assert_array_equal(terminated | truncated, ~alive)
        np.testing.assert_array_equal(length, steps)
        np.testing.assert_allclose(reward, total, rtol=1e-12)
        np.testing.assert_array_equal(next_obs, last)
        np.testing.assert_array_equal(whole.obs, new)
        ended += (~alive).sum()
    assert ended >= 6


def test_hopper_starts_anew_after_a_fall():
    envs = VectorEnv("Hopper-v4", 5, 4, "envpool")
    envs.reset()
    falls = 0
    for _ in range(60):
        next_obs, _, terminated, _, _ = envs.step(np.ones((5, 4, 3), np.float32))
        start, ended = envs.obs[terminated], next_obs[terminated]
        assert (np.abs(start[:, 0] - 1.25) < 0.006).all()  # the height of a reset, with its noise
        assert ((ended[:, 0] < 0.7) | (np.abs(ended[:, 1]) > 0.2)).all()  # and of a fall: low or tilted
        np.testing.assert_array_equal(envs.obs[~terminated], next_obs[~terminated])
        falls += terminated.sum()
    assert falls >= 5


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_environments_that_are_not_active_stay_as_they_are(backend):
    some, every = (VectorEnv("Hopper-v4", 4, 2, backend, seed=5) for _ in range(2))
    some.reset(), every.reset()
    rng, active = np.random.default_rng(3), np.array([True, False, True, False])
    actions = rng.uniform(-1, 1, (6, 4, 2, 3)).astype(np.float32)
    for t in range(3):
        before = some.obs.copy()
        next_obs, reward, terminated, truncated, length = some.step(actions[t], active)
        np.testing.assert_array_equal(next_obs[~active], before[~active])
        np.testing.assert_array_equal(some.obs[~active], before[~active])
        for value in (reward, terminated, truncated, length):
            assert (value[~active] == 0).all()
        assert (length[active] == 2).all()
    for t in range(3):  # they go on from their first state, as if nothing had happened
        first = some.step(actions[t + 3], ~active)
        second = every.step(actions[t + 3])
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a[~active], b[~active])


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_the_same_seed_gives_the_same_episodes_and_another_seed_others(backend):
    starts = [VectorEnv("Hopper-v4", 3, 1, backend, seed=seed).reset() for seed in (1, 1, 2)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert np.abs(starts[0] - starts[2]).min(1).max() > 0
    assert len(np.unique(starts[0], axis=0)) == 3


@pytest.mark.parametrize("backend", ["auto", "gymnasium"])
def test_unknown_task_stops_with_its_name(backend):
    with pytest.raises(SystemExit, match="NoSuchTask-v7"):
        VectorEnv("NoSuchTask-v7", 1, backend=backend)


def test_envpool_backend_without_the_task_names_the_way_out():
    with pytest.raises(SystemExit, match=r"RldtCounter-v0.*--backend gymnasium"):
        VectorEnv("RldtCounter-v0", 1, backend="envpool")


def test_auto_takes_envpool_where_it_has_the_task_and_gymnasium_elsewhere():
    assert VectorEnv("Hopper-v4", 1).backend == "envpool"
    assert VectorEnv("RldtCounter-v0", 1).backend == "gymnasium"


@pytest.mark.parametrize(
    "env_id, name", [("RldtPicture-v0", "observation"), ("RldtButtons-v0", "action"), ("CartPole-v1", "action")]
)
def test_spaces_that_are_not_flat_boxes_stop_with_the_space_that_is_wrong(env_id, name):
    with pytest.raises(SystemExit, match=f"{env_id}: the {name} space must be a flat Box"):
        VectorEnv(env_id, 1)


@pytest.mark.parametrize("env_id, name", [("RldtNaN-v0", "observation"), ("RldtInf-v0", "reward")])
def test_non_finite_numbers_of_an_environment_raise_with_their_name(env_id, name):
    envs = VectorEnv(env_id, 2, chunk=2, backend="gymnasium")
    envs.reset()
    envs.step(np.zeros((2, 2, 1), np.float32))
    with pytest.raises(FloatingPointError, match=f"non-finite {name}"):
        envs.step(np.zeros((2, 2, 1), np.float32))


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_actions_of_nan_raise_instead_of_standing_still(monkeypatch, tmp_path, backend):
    monkeypatch.chdir(tmp_path)  # where MuJoCo would log a warning
    envs = VectorEnv("Hopper-v4", 2, 2, backend)
    envs.reset()
    actions = np.zeros((2, 2, 3), np.float32)
    actions[1, 0, 2] = np.nan
    with pytest.raises(FloatingPointError):
        envs.step(actions)
