"""envs/vector.py: EnvPool, Gymnasium and tasks made for this file."""

import sys

import fakes
import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
from gymnasium import spaces

from common.flow import FlowPolicy
from envs.interface import Step
from envs.vector import VectorEnv, record_video


class Counter(gym.Env):
    """Observes (episode, step); reward = action + step; ends at step 6, in every second episode at 4."""

    observation_space = spaces.Box(0, 99, (2,), np.int64)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    broken = {}  # noqa: RUF012, by step what it then returns as observation, as reward

    def __init__(self, render_mode=None, **spaces):
        assert spaces.keys() <= {"observation_space", "action_space"}
        self.episode = -1
        vars(self).update(spaces)

    def observation(self):
        return np.full(2, self.broken[self.t][0]) if self.t in self.broken else [self.episode, self.t]

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action):
        self.t += 1
        reward = self.broken[self.t][1] if self.t in self.broken else float(action[0]) + self.t
        return self.observation(), reward, int(self.t == (6, 4)[self.episode % 2]), 0, {}  # no booleans

    def render(self):
        return np.full((65, 47, 3), 40 * self.t, np.uint8)


SPACES = {
    "Free": dict(action_space=spaces.Box(-np.inf, np.inf, (1,))),  # fits; the others do not
    "Picture": dict(observation_space=spaces.Box(0, 1, (4, 4))),
    "Nested": dict(observation_space=spaces.Dict({"a": Counter.observation_space})),
    "Buttons": dict(action_space=spaces.Discrete(3)),
    "Integers": dict(action_space=spaces.Box(0, 5, (1,), np.int64)),
}


@pytest.fixture(scope="module", autouse=True)
def own_tasks():
    limits = {"Counter": 100, "Short": 4, "Single": 1, "Endless": None} | dict.fromkeys(SPACES, 9)
    for name, limit in limits.items():
        task = dict(max_episode_steps=limit, kwargs=SPACES.get(name, {}))
        gym.register(f"Rldt{name}-v0", Counter, **task)
    gym.register("RldtNothing-v0", "json:Nothing", max_episode_steps=9)
    yield
    for name in limits:
        del gym.registry[f"Rldt{name}-v0"]


def started(env_id, num_envs, backend=None, seed=0):
    envs = VectorEnv(env_id, num_envs, backend=backend)
    envs.reset(seed)
    return envs


def assert_steps(first, second, **tolerance):
    for name, a, b in zip(Step._fields, first, second, strict=True):
        np.testing.assert_allclose(a, b, **{"atol": 0, "rtol": 0, "err_msg": name} | tolerance)


def both_backends(env_id, num_envs):
    """An EnvPool and a Gymnasium batch in the same states: qpos = (0, obs[:nq-1]), qvel = the rest."""
    pool, plain = (started(env_id, num_envs, backend, seed=3) for backend in ("envpool", "gymnasium"))
    start = pool.envs.reset()[0]  # float64; VectorEnv would round it
    pool.obs = start.astype(np.float32)
    plain.obs = pool.obs.copy()
    for env, obs in zip(plain.envs.envs, start, strict=True):
        model = env.unwrapped.model
        env.unwrapped.set_state(np.r_[0, obs[: model.nq - 1]], obs[model.nq - 1 :])
        # EnvPool's MuJoCo 3.6 seems to add the contact margins of two geoms where 3.3.7 takes the larger
        # one. With twice the margin observations agree to the last bit. Without this line Hopper's
        # velocities (only its model has a margin) differ by up to 0.3 after it touches the floor.
        model.geom_margin *= 2
    return pool, plain


# Measured over these steps: observations differ by at most 3e-7, rewards by 2e-7 (float32).
# The tolerances are wider, as a contact that comes a rounding error later grows.
@pytest.mark.parametrize("chunk, steps", [(1, 40), (4, 10)])
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Walker2d-v4", "HalfCheetah-v4"])
def test_backends_agree_from_the_same_state_and_actions(env_id, chunk, steps):
    pool, plain = both_backends(env_id, 8)
    assert (pool.obs_dim, pool.action_dim) == (plain.obs_dim, plain.action_dim)
    np.testing.assert_array_equal(pool.action_space.high, plain.action_space.high)
    rng, alive = np.random.default_rng(0), np.ones(8, bool)
    for _ in range(steps):
        actions = rng.uniform(-1.3, 1.3, (8, chunk, pool.action_dim)).astype(np.float32)  # some clipped
        first, second = pool.step(actions, alive), plain.step(actions, alive)
        np.testing.assert_array_equal(first.length, second.length)
        assert_steps([x[alive] for x in first], [x[alive] for x in second], atol=1e-4, rtol=1e-5)
        alive &= ~(first.terminated | first.truncated)
    assert alive.all() == (env_id == "HalfCheetah-v4")  # others fall: terminations were compared too


def test_envpools_halfcheetah_is_truncated_after_exactly_1000_steps_inside_a_chunk():
    envs, total = started("HalfCheetah-v4", 3, "envpool"), 0
    actions = np.zeros((3, 3, envs.action_dim), np.float32)
    for chunk in range(334):
        step = envs.step(actions)
        total += step.reward
        assert (step.truncated == (chunk == 333)).all() and not step.terminated.any()
        assert (step.length == (1 if chunk == 333 else 3)).all()
    np.testing.assert_allclose(step.score, total, rtol=1e-9)
    assert np.abs(envs.obs - step.next_obs).max(1).min() > 1e-3  # already the next episode's
    assert np.abs(envs.obs[:, :8]).max() < 0.11  # reset noise of the positions is uniform in +-0.1
    after = envs.step(actions)
    assert (after.length == 3).all()
    np.testing.assert_array_equal(after.score, after.reward)


def test_chunk_sums_rewards_until_the_episode_ends_and_ignores_its_rest():
    envs = started("RldtCounter-v0", 1)
    assert (envs.backend, VectorEnv("Hopper-v4", 1).backend) == ("gymnasium", "envpool")
    np.testing.assert_array_equal(envs.obs, [[0, 0]])
    actions = np.array([0.1, 0.2, 0.3, 0.4], np.float32).reshape(1, 4, 1)
    whole = 1 + 2 + 3 + 4 + 1.0
    expected = [  # next_obs, reward, terminated, truncated, length, score; what follows
        ([0, 4], whole, False, False, 4, whole, [0, 4]),
        ([0, 6], 5 + 6 + 0.3, True, False, 2, whole + 11.3, [1, 0]),
        ([1, 4], whole, True, False, 4, whole, [2, 0]),
        ([2, 4], whole, False, False, 4, whole, [2, 4]),
    ]
    for *values, following in expected:
        assert_steps([x[0] for x in envs.step(actions)], values, rtol=1e-6)
        np.testing.assert_array_equal(envs.obs, [following])


@pytest.mark.parametrize("env_id, ends", [
    ("RldtShort-v0", [(False, True, 4), (True, False, 4)]),  # without it, at step 6 and at step 4
    ("RldtSingle-v0", [(False, True, 1)] * 2),
])  # fmt: skip
def test_time_limit_is_a_truncation_and_a_termination_at_the_limit_is_not(env_id, ends):
    envs = started(env_id, 1)
    for end in ends:
        step = envs.step(np.zeros((1, 5, 1), np.float32))
        assert (step.terminated[0], step.truncated[0], step.length[0]) == end


@pytest.mark.parametrize("env_id, rewards", [
    ("RldtCounter-v0", [1 + 1, -1 + 2]), ("RldtFree-v0", [7 + 1, -7 + 2]),
])  # fmt: skip
def test_actions_are_clipped_to_the_action_space(env_id, rewards):
    envs = started(env_id, 1)
    assert [envs.step(np.array([[[a]]])).reward[0] for a in (7.0, -7.0)] == rewards


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_environments_that_are_not_active_stay_as_they_are(backend):
    some, every = (started("Hopper-v4", 4, backend, seed=5) for _ in range(2))
    rng, active = np.random.default_rng(3), np.array([True, False, True, False])
    actions = rng.uniform(-1, 1, (6, 4, 2, 3)).astype(np.float32)
    for t in range(3):
        before = some.obs.copy()
        step = some.step(actions[t], active)
        np.testing.assert_array_equal(step.next_obs[~active], before[~active])
        np.testing.assert_array_equal(some.obs[~active], before[~active])
        for value in step[1:]:
            assert (value[~active] == 0).all()
        assert (step.length[active] == 2).all()
    for t in range(3):  # they go on from their first state, as if nothing had happened
        first, second = some.step(actions[t + 3], ~active), every.step(actions[t + 3])
        assert_steps([x[~active] for x in first], [x[~active] for x in second])


@pytest.mark.parametrize("env_id, backend", [
    ("Hopper-v4", "envpool"), ("Hopper-v4", "gymnasium"), ("RldtShort-v0", "gymnasium"),
])  # fmt: skip
def test_environments_come_back_in_the_middle_of_their_episodes(env_id, backend):
    first, second = (started(env_id, 3, backend, seed) for seed in (8, 9))
    if env_id == "Hopper-v4":  # environment i has the seed 8 + i, or 9 + i
        np.testing.assert_array_equal(first.obs[1:], second.obs[:2])
        assert len(np.unique(first.obs, axis=0)) == 3
    rng = np.random.default_rng(4)
    draw = lambda: rng.uniform(-1, 1, (3, 3, first.action_dim)).astype(np.float32)
    for _ in range(2):
        first.step(draw())
    first.reset(7)  # from here on
    for _ in range(20):
        first.step(draw())
    with pytest.raises(ValueError, match="it ran on another, this on"):
        second.load_state_dict(first.state_dict() | {"backend": "another"})
    second.load_state_dict(first.state_dict())
    second.load_state_dict(second.state_dict())  # again, from what it keeps now
    np.testing.assert_array_equal(second.obs, first.obs)
    for _ in range(20):
        actions = draw()
        assert_steps(first.step(actions), second.step(actions))


@pytest.mark.parametrize("env_id, message", [
    ("NoSuchTask-v7", "NoSuchTask-v7"), (":odd", "Empty module name"),
    ("RldtEndless-v0", "no time limit: register it with max_episode_steps"),
    ("RldtPicture-v0", "RldtPicture-v0: the observation space must be a flat Box"),
    ("RldtNested-v0", "the observation space must be a flat Box of real numbers, not Dict"),
    ("RldtNothing-v0", "Cannot make the environment .RldtNothing-v0"),
    ("RldtButtons-v0", "the action space must be a flat Box"), ("RldtIntegers-v0", "not Box.*int64"),
])  # fmt: skip
def test_tasks_that_do_not_fit_stop_with_what_is_wrong(env_id, message):
    with pytest.raises(SystemExit, match=rf"^.*{message}.*$"):
        VectorEnv(env_id, 1)


@pytest.mark.parametrize("name, broken, action", [
    ("observation at a reset", {0: (np.nan, 0.0)}, 0), ("observation", {4: (np.nan, 0.0)}, 0),
    ("reward", {3: (0.0, np.inf)}, 0), ("action", {}, np.nan),
])  # fmt: skip
def test_numbers_that_are_not_finite_end_the_run_with_their_origin(monkeypatch, name, broken, action):
    monkeypatch.setattr(Counter, "broken", broken)
    origin = "The policy" if name == "action" else "RldtCounter-v0: the environment"
    with pytest.raises(SystemExit, match=rf"^{origin} returned a non-finite {name}\.$"):
        envs = started("RldtCounter-v0", 2)
        for _ in range(2):
            envs.step(np.full((2, 2, 1), action, np.float32))


def test_observations_of_another_shape_than_the_space_has_end_the_run(monkeypatch):
    monkeypatch.setattr(Counter, "observation", lambda self: [self.t])
    with pytest.raises(SystemExit, match=r"RldtCounter-v0: an observation of \(1,\), not \(2,\)"):
        started("RldtCounter-v0", 2)


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_every_first_seed_gives_its_own_episodes(backend):
    envs, starts = VectorEnv("Hopper-v4", 3, backend=backend), []
    for seed in (0, 4242_000_000, 2**31 - 4, 2**40 + 9, -5):
        envs.reset(seed)
        starts.extend(envs.obs)
    assert len(np.unique(starts, axis=0)) == 15


@pytest.mark.parametrize("env_id, sizes, shape", [
    ("Hopper-v4", (11, 3), (320, 320, 3)), ("RldtCounter-v0", (2, 1), (64, 46, 3)),
])  # fmt: skip
def test_a_film_of_one_episode(tmp_path, monkeypatch, recwarn, capsys, env_id, sizes, shape):
    if env_id != "Hopper-v4":  # no MuJoCo, no OpenGL
        monkeypatch.delitem(sys.modules, "mujoco", raising=False)
        monkeypatch.setenv("MUJOCO_GL", "none")
    policy = FlowPolicy(*sizes, 1, 1, width=8, time_dim=4)
    record_video(policy, env_id, tmp_path)
    frames = imageio.mimread(tmp_path / "episode.mp4", memtest=False)
    assert len(frames) > 5 and frames[0].shape == shape
    assert not [warning for warning in recwarn if "out of date" in str(warning.message)]
    record_video(policy, "NoSuchTask-v7", tmp_path)  # costs no trained policy
    assert capsys.readouterr().out.startswith("No video: Cannot make")
    closed = fakes.recorded(monkeypatch, VectorEnv, "close", lambda envs: envs)
    policy.sample = None
    record_video(policy, env_id, tmp_path)
    assert len(closed) == 1  # also after a fault
