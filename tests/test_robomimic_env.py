import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from contextlib import closing

import h5py
import numpy as np
import pytest
from conftest import ROOT

import envs.robomimic as module
from envs.osc import ArmControl, cholesky_solve
from envs.robomimic import (
    IMAGE_SIZE,
    MODEL_SEED,
    RobomimicEnv,
    RobomimicVectorEnv,
    WorkerError,
    choose_renderer,
    control_step,
    import_robomimic,
    make_robosuite,
    metadata,
)

ARM = ("eef_pos", "eef_quat", "gripper_qpos")
STATE = {  # DPPO's order of keys without images, and their size
    "lift": ([*(f"robot0_{key}" for key in ARM), "object"], 19),
    "can": ([*(f"robot0_{key}" for key in ARM), "object"], 23),
    "square": ([*(f"robot0_{key}" for key in ARM), "object"], 23),
    "transport": ([*(f"robot0_{key}" for key in ARM), *(f"robot1_{key}" for key in ARM), "object"], 59),
}
SECONDS = 60  # within which a fault must show on a busy machine; without care it would be the timeout of 300, or never
CAMERAS = {"lift": ["agentview"], "can": ["agentview"], "square": ["agentview"], "transport": ["shouldercamera0", "shouldercamera1"]}


@pytest.fixture(scope="module", autouse=True)
def _renderer():
    choose_renderer(log=lambda text: None)  # before robosuite is imported


@pytest.fixture(scope="module")
def shared_env():
    """Environments without images, each built once."""
    built = {}

    def get(task="lift", stop_on_success=True, horizon=300, copy=0):
        env = built.setdefault((task, copy), RobomimicEnv(task, images=False))
        env.stop_on_success, env.horizon = stop_on_success, horizon
        return env

    yield get
    for env in built.values():
        env.close()


@pytest.fixture
def image_env():
    """Makes an environment with images, of which robosuite can render one at a time in a process."""
    made = []

    def make(task="lift", **kwargs):
        for env in made:
            env.close()
        made.append(RobomimicEnv(task, images=True, **kwargs))
        return made[-1]

    yield make
    for env in made:
        env.close()


@pytest.fixture(scope="module")
def lift():
    """Lift as robomimic's environment, built once."""
    env = build("lift")
    yield env
    env.env.close()


def seed_robosuite(seed):
    np.random.seed(seed)  # noqa: NPY002, it draws from the global generator


def build(task, images=False):
    seed_robosuite(MODEL_SEED)
    return make_robosuite(task, images)


@pytest.fixture(scope="module")
def demonstration(lift):
    """A demonstration of Lift: reset seed, first state, actions, and the rewards that robosuite's own step gives for them."""
    env = lift
    with h5py.File(ROOT / "demos" / "lift" / "low_dim.hdf5") as file:
        demo = file["data/demo_0"]
        seed, state, actions = int(demo.attrs["seed"]), demo["states"][0], demo["actions"][()]
    seed_robosuite(seed)
    env.reset()
    env.reset_to({"states": state})
    rewards = np.array([env.step(action)[1] for action in actions])
    assert rewards.max() == 1  # the cube is lifted
    return seed, state, actions, rewards


def simulator(env):
    """The simulator's state of a RobomimicEnv or of robomimic's."""
    return (env.env if isinstance(env, RobomimicEnv) else env).env.sim.get_state().flatten()


def start(env, demonstration):
    """Puts a RobomimicEnv into the first state of the demonstration; returns it."""
    seed, state, *_ = demonstration
    env.reset(seed=seed)
    env.env.reset_to({"states": state})
    return env


def random_chunks(env, count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *env.action_space.shape)).astype(np.float32)


# ---------------------------------------------------------------------------- the simulator's step
def random_episode(env, step, steps):
    """Observation, state, time and reward after each of `steps` random actions that are executed by `step`."""
    seed_robosuite(3)
    env.reset()
    actions = np.random.default_rng(1).uniform(-1, 1, (steps, 7 * len(env.env.robots)))
    return [(*step(env, i, action), simulator(env), env.env.cur_time) for i, action in enumerate(actions)]


def plain_step(env, i, action):
    obs, reward, *_ = env.step(action)
    return obs, reward


def fast_step(env, i, action):
    observe = i % 3 != 1  # observations are also right if they were not read in every step
    reward = control_step(env.env, action, observe)
    return env.get_observation(env.env._get_observations()) if observe else None, reward


@pytest.mark.parametrize(("task", "images", "steps"), [("lift", False, 100), ("square", False, 100), ("transport", False, 40), ("lift", True, 40)])
def test_control_step_gives_the_states_observations_and_rewards_of_robosuites_step(task, images, steps):
    episodes = []
    for step in (plain_step, fast_step):
        env = build(task, images)
        episodes.append(random_episode(env, step, steps))
        env.env.close()
    for (expected, *numbers), (obs, *same) in zip(*episodes, strict=True):
        for a, b in zip(numbers, same, strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-4)
        if obs is not None:
            assert set(obs) == set(expected)
            for key, value in expected.items():
                if key.endswith("_image"):
                    assert (obs[key] != value).mean() < 0.01
                else:
                    np.testing.assert_allclose(obs[key], value, rtol=0, atol=1e-4, err_msg=key)
    if images:
        first, last = (episodes[1][i][0]["agentview_image"] for i in (0, -1))
        assert first.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert (first != last).mean() > 0.01  # the arm has moved


def test_control_step_gives_robosuites_rewards_on_a_demonstration(lift, demonstration):
    seed, state, actions, rewards = demonstration
    seed_robosuite(seed)
    lift.reset()
    lift.reset_to({"states": state})
    assert [control_step(lift.env, action, observe=False) for action in actions] == rewards.tolist()


@pytest.mark.parametrize("task", ["square", "transport"])
def test_compiled_controller_gives_the_torques_of_robosuites(task):
    env = build(task).env
    env.reset()
    rng = np.random.default_rng(2)
    for _ in range(20):
        action = rng.uniform(-1.5, 1.5, 7 * len(env.robots))
        for i in range(4):  # the goal is set in the first
            env.sim.forward()
            if i:
                before = [robot.gripper.current_action.copy() for robot in env.robots]
                for k, robot in enumerate(env.robots):
                    ArmControl(robot, action[7 * k : 7 * k + 7])()
                ours = env.sim.data.ctrl.copy()
                for robot, gripper in zip(env.robots, before, strict=True):
                    robot.gripper.current_action = gripper
            env._pre_action(action, i == 0)
            if i:
                np.testing.assert_allclose(ours, env.sim.data.ctrl, rtol=1e-9, atol=1e-9)
                assert abs(ours).max() > 1
            env.sim.step()
    env.close()


def test_cholesky_solve_solves():
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(7, 7)), rng.normal(size=(7, 3))
    A = A @ A.T + np.eye(7)
    X = B.copy()
    cholesky_solve(A.copy(), X)
    np.testing.assert_allclose(X, np.linalg.solve(A, B), rtol=1e-10)


def test_control_step_leaves_the_simulators_forward_pass_in_place(lift):
    lift.reset()
    control_step(lift.env, np.zeros(7), observe=False)
    assert "forward" not in vars(lift.env.sim)


# ------------------------------------------------------------------------------- one environment
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("task", list(STATE))
def test_observations_are_dppos(shared_env, image_env, task, images):
    env = image_env(task) if images else shared_env(task)
    keys, size = STATE[task]
    if images:
        keys, size = keys[:-1], 9 * len(CAMERAS[task])
    for begin in (lambda: env.reset(seed=2), lambda: env.step(random_chunks(env, 1)[0])):
        obs = begin()[0]
        raw = env.env.get_observation()  # robomimic's, read anew
        assert set(obs) == ({"state", "rgb"} if images else {"state"})
        assert obs["state"].shape == (size,)
        np.testing.assert_array_equal(obs["state"], np.concatenate([raw[key] for key in keys]).astype(np.float32))
        assert env.observation_space.contains(obs)
        if images:
            views = [raw[f"{camera}_image"] for camera in CAMERAS[task]]
            np.testing.assert_array_equal(obs["rgb"], np.concatenate([view.transpose(2, 0, 1) for view in views]))
            assert obs["rgb"].shape == (3 * len(views), 96, 96)
            assert obs["rgb"].dtype == np.uint8
            assert obs["rgb"].std() > 10
            upright = env.env.env.sim.render(height=96, width=96, camera_name=CAMERAS[task][0])[::-1]  # MuJoCo's first row is the lowest
            np.testing.assert_array_equal(obs["rgb"][:3], upright.transpose(2, 0, 1))


@pytest.mark.parametrize(("task", "chunk", "horizon", "arms"), [
    ("lift", 4, 300, 1), ("can", 4, 300, 1), ("square", 4, 400, 1), ("transport", 8, 800, 2),
])  # fmt: skip
def test_tasks_have_dppos_chunks_time_limits_and_actions(task, chunk, horizon, arms):
    env = RobomimicEnv(task, images=False)
    assert env.horizon == horizon
    assert env.action_space.shape == (chunk, 7 * arms)
    assert (env.action_space.low == -1).all()
    assert (env.action_space.high == 1).all()
    settings = metadata(task, images=True)["env_kwargs"]
    assert settings["camera_names"] == CAMERAS[task]
    assert (settings["control_freq"], settings["reward_shaping"], settings["robots"]) == (20, False, ["Panda"] * arms)


def test_unknown_task_stops_with_the_known_ones():
    with pytest.raises(SystemExit, match=r"'lfit': choose lift, can, square, transport"):
        RobomimicEnv("lfit", images=False)


def test_horizon_and_chunk_can_be_chosen():
    env = RobomimicEnv("lift", images=False, horizon=12, chunk=3)
    assert (env.horizon, env.action_space.shape) == (12, (3, 7))


def test_reward_of_a_chunk_is_the_sum_of_its_steps(shared_env, demonstration):
    env, rewards = start(shared_env(stop_on_success=False), demonstration), demonstration[3]
    actions = demonstration[2][: len(rewards) // 4 * 4].reshape(-1, 4, 7)
    results = [env.step(chunk) for chunk in actions]
    expected = rewards[: 4 * len(actions)].reshape(-1, 4)
    assert expected.sum() > 1
    for (_, reward, terminated, truncated, info), part in zip(results, expected, strict=True):
        assert reward == part.sum()
        assert info == {"success": part.any(), "steps": 4}
        assert not terminated
        assert not truncated


@pytest.mark.parametrize("before", [0, 1, 3])
def test_success_ends_a_chunk_at_once_where_it_ends_the_episode(shared_env, demonstration, before):
    env, (_, _, actions, rewards) = start(shared_env(stop_on_success=True), demonstration), demonstration
    solved = int(np.argmax(rewards > 0))
    for action in actions[: solved - before]:
        assert env.step(action[None])[1:] == (0, False, False, {"success": False, "steps": 1})
    obs, reward, terminated, truncated, info = env.step(actions[solved - before :][:4])
    assert (reward, terminated, truncated) == (1, True, False)
    assert info == {"success": True, "steps": before + 1}
    assert env.t == solved + 1
    assert env.observation_space.contains(obs)


@pytest.mark.parametrize("stop_on_success", [False, True])
def test_success_at_the_time_limit_is_a_termination_where_success_ends_the_episode(shared_env, demonstration, stop_on_success):
    solved = int(np.argmax(demonstration[3] > 0))
    env = start(shared_env(stop_on_success=stop_on_success, horizon=solved + 1), demonstration)
    *_, terminated, truncated, info = env.step(demonstration[2][: solved + 3])
    assert (terminated, truncated) == (stop_on_success, not stop_on_success)
    assert info == {"success": True, "steps": solved + 1}


def test_truncation_comes_exactly_at_the_time_limit_with_the_last_observation(shared_env):
    env = shared_env(horizon=10)
    env.reset(seed=1)
    results = [env.step(chunk) for chunk in random_chunks(env, 3)]
    assert [info["steps"] for *_, info in results] == [4, 4, 2]
    assert [truncated for *_, truncated, _ in results] == [False, False, True]
    np.testing.assert_array_equal(results[-1][0]["state"], env.read(env.env.get_observation())["state"])


def test_a_chunk_of_nan_changes_nothing(shared_env):
    env = shared_env()
    env.reset(seed=1)
    obs = env.step(random_chunks(env, 1)[0])[0]
    before, chunk = simulator(env), random_chunks(env, 1)[0]
    chunk[2, 3] = np.nan
    again, *rest = env.step(chunk)
    assert rest == [0.0, False, False, {"success": False, "steps": 0}]
    np.testing.assert_array_equal(again["state"], obs["state"])
    np.testing.assert_array_equal(simulator(env), before)
    assert env.t == 4


def test_a_seed_gives_the_same_episode_in_another_environment_after_other_episodes(shared_env):
    first, second = shared_env(copy=0), shared_env(copy=1)
    seed_robosuite(123)  # must not reach the model of the second, which is built now
    chunks = random_chunks(first, 4)
    episodes = []
    for env, seeds in (first, (8, 5, 5)), (second, (5,)):
        for seed in seeds:
            obs = [env.reset(seed=seed)[0]["state"]]
            obs += [env.step(chunk)[0]["state"] for chunk in chunks]
            episodes.append(np.array(obs))
    other, *same = episodes
    for episode in same:
        np.testing.assert_array_equal(episode, same[0])
    assert not np.array_equal(other[0], same[0][0])
    sizes = [env.env.env.sim.model.geom_size.copy() for env in (first, second)]
    np.testing.assert_array_equal(*sizes)


def test_images_are_there_after_an_environment_without_them_was_built(image_env):
    env = image_env("lift")
    env.reset(seed=1)
    with closing(RobomimicEnv("square", images=False)) as other:
        other.reset(seed=1)
    assert env.observation_space.contains(env.reset(seed=1)[0])


def test_episodes_share_one_compiled_model(shared_env):
    env = shared_env()
    env.reset(seed=1)
    model = env.env.env.sim.model
    env.reset(seed=2)
    assert env.env.env.sim.model is model


def test_fast_images_lack_shadows_and_little_else(image_env):
    fast, full = (image_env(fast_render=flag).reset(seed=1)[0]["rgb"].astype(int) for flag in (True, False))
    assert 0.5 < np.abs(fast - full).mean() < 5


def test_recorded_frames_are_those_of_the_steps_since_the_last_call():
    with closing(RobomimicEnv("lift", images=False, record=True)) as env:
        env.reset(seed=1)
        chunk = random_chunks(env, 1)[0]
        env.step(chunk)
        frames = env.take_frames()
        assert [frame.shape for frame in frames] == [(256, 256, 3)] * 4
        assert frames[0].dtype == np.uint8
        assert (frames[0] != frames[3]).any()
        assert env.take_frames() == []


# ---------------------------------------------------------------------------- many environments
@pytest.fixture(scope="module")
def vector_env():
    with closing(RobomimicVectorEnv(2, task="lift", images=False, stop_on_success=False)) as envs:
        yield envs


@pytest.fixture
def make_vector_env():
    """Makes vector environments that are closed at the end of the test."""
    made = []

    def make(**kwargs):
        made.append(RobomimicVectorEnv(2, **dict(task="lift", images=False) | kwargs))
        return made[-1]

    yield make
    for envs in made:
        envs.close()


class NoSimulator(RobomimicEnv):
    """A RobomimicEnv without a simulator, for what happens around it; `fault` runs in every step."""

    fault = staticmethod(lambda: None)

    def reset(self, *, seed=None, options=None):
        return {"state": np.zeros(self.observation_space["state"].shape, np.float32)}, {}

    def step(self, action):
        if not np.isnan(action).any():
            self.fault()
        return self.reset()[0], 0.0, False, False, {"success": False, "steps": len(action)}


@pytest.fixture
def without_simulators(make_vector_env, monkeypatch):
    """Makes vector environments of NoSimulators with the attributes that are given."""

    def make(timeout=300.0, **attributes):
        for name, value in attributes.items():
            monkeypatch.setattr(NoSimulator, name, value)
        monkeypatch.setattr(module, "RobomimicEnv", NoSimulator)
        return make_vector_env(timeout=timeout)

    return make


def pids(envs):
    return [process.pid for process in envs.envs.processes]


def test_vector_env_steps_only_active_environments_and_resets_only_masked_ones(vector_env, shared_env):
    everyone, first_only, second_only = np.array([True, True]), np.array([True, False]), np.array([False, True])
    env = shared_env(stop_on_success=False)  # alone, what each of the two should do
    chunks = random_chunks(env, 4)
    alone = {}
    for seed in (3, 4, 6):
        alone[seed] = [env.reset(seed=seed)[0]["state"]] + [env.step(chunk)[0]["state"] for chunk in chunks]

    obs = vector_env.reset([3, 4], everyone)["state"]
    np.testing.assert_array_equal(obs, [alone[3][0], alone[4][0]])
    obs, reward, terminated, truncated, success, steps = vector_env.step(np.stack([chunks[0]] * 2), everyone)
    np.testing.assert_array_equal(obs["state"], [alone[3][1], alone[4][1]])
    assert (reward.tolist(), success.tolist(), steps.tolist()) == ([0, 0], [False, False], [4, 4])

    broken = np.stack([chunks[1], np.full_like(chunks[1], np.nan)])  # of the one that waits: never looked at
    obs, *_, steps = vector_env.step(broken, first_only)
    np.testing.assert_array_equal(obs["state"], [alone[3][2], alone[4][1]])
    assert steps.tolist() == [4, 0]
    obs = vector_env.reset([6, 7], first_only)
    np.testing.assert_array_equal(obs["state"], [alone[6][0], alone[4][1]])
    obs, *_, steps = vector_env.step(np.stack([chunks[0], chunks[1]]), everyone)
    np.testing.assert_array_equal(obs["state"], [alone[6][1], alone[4][2]])  # the second was neither stepped nor reset
    kept = obs["state"].copy()
    obs, *_ = vector_env.step(np.stack([chunks[2]] * 2), second_only)
    np.testing.assert_array_equal(obs["state"], [alone[6][1], alone[4][3]])
    np.testing.assert_array_equal(kept, [alone[6][1], alone[4][2]])  # observations are copies
    for flags in (terminated, truncated, success):
        assert flags.dtype == bool
        assert flags.shape == (2,)


def test_workers_render_where_this_process_has_a_renderer_too(image_env):
    obs, _ = image_env().reset(seed=5)
    with closing(RobomimicVectorEnv(1, timeout=SECONDS, task="lift", images=True)) as envs:
        rgb = envs.reset([5], np.ones(1, bool))["rgb"][0]
    assert rgb.std() > 10
    assert (rgb != obs["rgb"]).mean() < 0.01


def test_vector_env_has_the_sizes_of_its_environments(vector_env):
    assert (vector_env.num_envs, vector_env.horizon, vector_env.chunk, vector_env.action_dim) == (2, 300, 4, 7)
    assert vector_env.observation_space["state"].shape == (19,)


def test_vector_env_clips_actions(vector_env):
    everyone, results = np.ones(2, bool), []
    for scale in (1.0, 7.0):
        vector_env.reset([1, 1], everyone)
        chunks = scale * np.sign(random_chunks(RobomimicEnv("lift", images=False), 2))
        results.append(vector_env.step(chunks, everyone)[0]["state"])
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vector_env_refuses_actions_that_are_not_finite(vector_env, value):
    chunks = np.zeros((2, 4, 7), np.float32)
    chunks[1, 0, 3] = value
    vector_env.reset([1, 1], np.ones(2, bool))
    with pytest.raises(FloatingPointError, match="non-finite action"):
        vector_env.step(chunks, np.ones(2, bool))


def test_ctrl_c_in_the_terminal_leaves_the_workers_alone(without_simulators):
    envs, everyone = without_simulators(), np.ones(2, bool)
    envs.reset([1, 2], everyone)
    for pid in pids(envs):  # a terminal sends it to every process
        os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    try:
        steps = envs.step(np.zeros((2, 4, 7)), everyone)[-1].tolist()
    except KeyboardInterrupt:  # would end pytest
        steps = None
    assert steps == [4, 4]


@pytest.mark.parametrize("action", ["step", "reset"])
def test_a_killed_worker_is_a_worker_error_within_seconds(make_vector_env, without_simulators, action):
    envs, everyone = make_vector_env() if action == "step" else without_simulators(), np.ones(2, bool)
    envs.reset([1, 2], everyone)
    os.kill(pids(envs)[1], signal.SIGKILL)
    began = time.perf_counter()
    with pytest.raises(WorkerError, match=r"worker process ended, exit codes \[.*-9.*\].*--num-envs"):
        envs.step(np.zeros((2, 4, 7)), everyone) if action == "step" else envs.reset([1, 2], everyone)
    assert time.perf_counter() - began < SECONDS
    assert not any(process.is_alive() for process in envs.envs.processes)
    envs.close()
    envs.close()


def test_a_worker_killed_while_it_steps_is_a_worker_error_within_seconds(without_simulators):
    envs = without_simulators(fault=staticmethod(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    envs.reset([1, 2], np.ones(2, bool))
    began = time.perf_counter()
    with pytest.raises(WorkerError, match="exit codes"):
        envs.step(np.zeros((2, 4, 7)), np.array([False, True]))
    assert time.perf_counter() - began < SECONDS


def test_a_worker_that_exits_is_a_worker_error_within_seconds(without_simulators):
    envs = without_simulators(fault=staticmethod(lambda: sys.exit("robosuite is missing")))
    envs.reset([1, 2], np.ones(2, bool))
    with pytest.raises(WorkerError, match="exit codes"):
        envs.step(np.zeros((2, 4, 7)), np.ones(2, bool))


def failing(error):
    def fault(*args, **kwargs):
        raise error

    return fault


@pytest.mark.parametrize("error", [ValueError, OSError, FloatingPointError, EOFError, AssertionError])
@pytest.mark.parametrize("active", [[True, True], [False, True]])
def test_an_error_inside_a_simulator_is_a_worker_error_with_its_text(without_simulators, error, active):
    envs = without_simulators(fault=staticmethod(failing(error("mj_step diverged"))))
    envs.reset([1, 2], np.ones(2, bool))
    with pytest.raises(WorkerError, match="mj_step diverged"):
        envs.step(np.zeros((2, 4, 7)), np.array(active))
    assert not any(process.is_alive() for process in envs.envs.processes)
    envs.close()


def test_an_error_in_the_real_simulator_is_a_worker_error(make_vector_env, monkeypatch):
    monkeypatch.setattr(module, "control_step", failing(RuntimeError("singular matrix")))
    envs = make_vector_env()
    envs.reset([1, 2], np.ones(2, bool))
    with pytest.raises(WorkerError, match="singular matrix"):
        envs.step(np.zeros((2, 4, 7)), np.array([True, False]))


@pytest.mark.parametrize("name", ["fault", "reset"])
def test_a_simulator_that_does_not_answer_is_a_worker_error_after_the_timeout(without_simulators, name):
    envs, everyone = without_simulators(timeout=1.0, **{name: lambda *args, **kwargs: time.sleep(600)}), np.ones(2, bool)
    began = time.perf_counter()
    with pytest.raises(WorkerError, match="not answered for 1 s"):
        envs.reset([1, 2], everyone)
        envs.step(np.zeros((2, 4, 7)), everyone)
    assert 1 <= time.perf_counter() - began < SECONDS
    assert not any(process.is_alive() for process in envs.envs.processes)
    envs.close()


@pytest.mark.parametrize("name", ["state", "reward"])
def test_a_simulator_that_returns_nan_is_an_error(without_simulators, name):
    def step(self, action):
        obs, value = self.reset()[0], {name: np.nan}
        obs["state"][3] = value.get("state", 0)
        return obs, value.get("reward", 0.0), False, False, {"success": False, "steps": 4}

    envs, everyone = without_simulators(step=step), np.ones(2, bool)
    envs.reset([1, 2], everyone)
    with pytest.raises(FloatingPointError, match="simulator returned a non-finite"):
        envs.step(np.zeros((2, 4, 7)), everyone)


def test_close_ends_the_workers(without_simulators):
    envs = without_simulators()
    assert all(process.is_alive() for process in envs.envs.processes)
    envs.close()
    assert [process.exitcode for process in envs.envs.processes] == [0, 0]
    envs.close()


# ------------------------------------------------------------------------------------- rendering
def renderers(monkeypatch, working, stderr=""):
    """Lets only `working` backends render; returns the list of those that are tried."""
    tried = []

    def run(command, env, **kwargs):
        tried.append(env["MUJOCO_GL"])
        return subprocess.CompletedProcess(command, 0 if tried[-1] in working else 1, stdout="", stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return tried


@pytest.mark.parametrize("asked", ["egl", "osmesa", "glfw"])
def test_renderer_is_the_one_that_mujoco_gl_asks_for(monkeypatch, asked):
    monkeypatch.setenv("MUJOCO_GL", asked)
    tried, lines = renderers(monkeypatch, {"egl", "osmesa", "glfw"}), []
    assert choose_renderer(lines.append) == asked
    assert tried == [asked]
    assert os.environ["MUJOCO_GL"] == asked
    (line,) = lines
    assert asked in line
    assert "MUJOCO_GL" in line


@pytest.mark.parametrize(("working", "chosen", "order"), [
    ({"egl", "osmesa"}, "egl", ["egl"]), ({"osmesa"}, "osmesa", ["egl", "osmesa"]),
])  # fmt: skip
def test_renderer_is_the_first_that_works_and_why(monkeypatch, working, chosen, order):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    tried, lines = renderers(monkeypatch, working, stderr="Traceback\nno libEGL"), []
    assert choose_renderer(lines.append) == chosen
    assert tried == order
    assert os.environ["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"] == chosen
    why = "; egl does not: no libEGL" if chosen == "osmesa" else ""
    assert lines == [f"Rendering with {chosen} (the first that works here{why})."]
    monkeypatch.undo()
    os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])


@pytest.mark.parametrize(("asked", "tried"), [("", ["egl", "osmesa"]), ("osmesa", ["osmesa"])])
def test_without_a_renderer_the_message_names_the_packages_to_install(monkeypatch, asked, tried):
    monkeypatch.setenv("MUJOCO_GL", asked)
    assert renderers(monkeypatch, set(), "Traceback\nImportError: no library\n") == []
    with pytest.raises(SystemExit) as stop:
        choose_renderer(log=lambda text: None)
    message = str(stop.value)
    assert "\n" not in message
    for part in ("libegl1", "libgl1", "libgles2", "libosmesa6", "apt-get install", "--obs state"):
        assert part in message
    for backend in ("egl", "osmesa"):
        assert (f"{backend}: ImportError: no library" in message) == (backend in tried)
    assert os.environ["MUJOCO_GL"] == asked


def test_a_renderer_that_crashes_without_a_word_is_passed_over(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    renderers(monkeypatch, set())
    with pytest.raises(SystemExit, match="egl: it crashed"):
        choose_renderer(log=lambda text: None)


def test_a_backend_that_does_not_exist_does_not_render(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "crayon")
    with pytest.raises(SystemExit, match=r"crayon: .*invalid value"):
        choose_renderer(log=lambda text: None)


NO_GL = """
    import ctypes, ctypes.util

    def without_gl(find):
        def wrapped(name, *args, **kwargs):
            if name and any(part in str(name) for part in ("EGL", "OSMesa", "GL.so", "GLES")) or name == "GL":
                raise OSError(f"{name}: cannot open shared object file")
            return find(name, *args, **kwargs)
        return wrapped

    init = ctypes.CDLL.__init__
    ctypes.CDLL.__init__ = lambda self, name, *args, **kwargs: without_gl(lambda n: init(self, n, *args, **kwargs))(name)
    find = ctypes.util.find_library
    ctypes.util.find_library = lambda name: None if name in ("EGL", "GL", "OSMesa", "GLESv2", "GLESv1_CM") else find(name)

    from envs.robomimic import RobomimicEnv
    print(RobomimicEnv("lift", images=False).reset(seed=1)[0]["state"].shape)
"""


def test_state_observations_need_no_graphics_library():
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    command = [sys.executable, "-c", textwrap.dedent(NO_GL)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert process.stdout.endswith("(19,)\n"), process.stderr


# --------------------------------------------------------------------------- robomimic's imports
STUBBED = "mujoco_py", "egl_probe", "torchvision", "torchvision.models", "torchvision.transforms", "torchvision.transforms.functional", "tensorboardX"


def test_import_leaves_installed_modules_alone(monkeypatch):
    installed = {name: type(sys)(name) for name in STUBBED}
    for name, installed_module in installed.items():
        monkeypatch.setitem(sys.modules, name, installed_module)
        monkeypatch.setattr(installed_module, "__path__", [], raising=False)
    import_robomimic()
    for name, installed_module in installed.items():
        assert sys.modules[name] is installed_module


def test_import_replaces_missing_modules(monkeypatch):
    for name in STUBBED:
        monkeypatch.setitem(sys.modules, name, None)  # Python's mark of a module that cannot be imported
    assert import_robomimic().__version__ == "0.3.0"
    import mujoco_py
    import torchvision.transforms.functional
    from egl_probe import get_available_devices
    from tensorboardX import SummaryWriter
    from torchvision import models, transforms

    assert get_available_devices() == []
    assert issubclass(mujoco_py.builder.MujocoException, Exception)
    assert (transforms.Lambda, transforms.Compose, SummaryWriter) == (object,) * 3
    assert torchvision.models is models
    assert torchvision.transforms.functional is sys.modules["torchvision.transforms.functional"]


def test_import_replaces_a_module_that_fails_to_import(monkeypatch, tmp_path):
    (tmp_path / "mujoco_py.py").write_text("raise Exception('You appear to be missing MuJoCo')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "mujoco_py", None)
    del sys.modules["mujoco_py"]
    import_robomimic()
    assert sys.modules["mujoco_py"].builder.MujocoException is RuntimeError


@pytest.mark.parametrize("name", ["robosuite", "robomimic"])
def test_import_without_robosuite_or_robomimic_names_the_commands(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"pip install -r requirements\.txt"):
        import_robomimic()


def test_import_of_another_robosuite_stops_with_its_version(monkeypatch):
    import_robomimic()
    import robosuite

    monkeypatch.setattr(robosuite, "__version__", "1.5.1")
    with pytest.raises(SystemExit, match=r"1\.5\.1.*1\.4\.1"):
        import_robomimic()


@pytest.mark.parametrize("images, context", [(True, "spawn"), (False, "fork")])
def test_simulators_with_cameras_are_not_forked_from_a_process_in_which_mujoco_renders(monkeypatch, images, context):
    """A forked copy of an open renderer hangs."""
    egl, seen = types.ModuleType("mujoco.egl"), {}
    egl.EGL_DISPLAY = object()  # as after the first mujoco.GLContext
    monkeypatch.setitem(sys.modules, "mujoco.egl", egl)
    monkeypatch.setattr(module, "_rendering", False)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module.gym.vector, "AsyncVectorEnv", lambda *args, **kwargs: seen.update(kwargs))
    module.RobomimicVectorEnv(2, task="lift", images=images)
    assert seen["context"] == context
