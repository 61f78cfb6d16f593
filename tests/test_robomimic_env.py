import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import h5py
import imageio.v2 as imageio
import numpy as np
import pytest
from conftest import ROOT
from fakes import small_policy

import envs.robomimic as module
import rldt_robomimic
from envs.osc import ArmControl
from envs.robomimic import TASKS, RobomimicEnv, RobomimicVectorEnv, control_step, import_robomimic

ARM = ("eef_pos", "eef_quat", "gripper_qpos")
ONE, TWO = ([f"robot{i}_{key}" for key in ARM] for i in range(2))
STATE = {  # DPPO's order of keys without images, their size, actions of a chunk and time limit
    "lift": ([*ONE, "object"], 19, 4, 300),
    "can": ([*ONE, "object"], 23, 4, 300),
    "square": ([*ONE, "object"], 23, 4, 400),
    "transport": ([*ONE, *TWO, "object"], 59, 8, 800),
}
CAMERAS = {task: ["agentview"] for task in STATE} | {"transport": ["shouldercamera0", "shouldercamera1"]}


@pytest.fixture(scope="module", autouse=True)
def _renderer():
    module.choose_renderer(log=lambda text: None)  # before robosuite is imported


@pytest.fixture(scope="module")
def built():
    """robomimic's environments without images, each built once."""
    made = {}

    def get(task):
        if task not in made:
            made[task] = module.make_robosuite(task, images=False)
        return made[task]

    yield get
    for env in made.values():
        env.env.close()


@pytest.fixture
def shared_env(built):
    """Makes environments without images around those."""

    def get(task="lift", horizon=300):
        env = RobomimicEnv(task, images=False, horizon=horizon)
        env.env = built(task)
        return env

    return get


@pytest.fixture
def image_env():
    """Makes an environment with images, of which robosuite can render one at a time in a process."""
    made = []

    def make(task="lift", **kwargs):
        for env in made:
            env.env.env.close()
        made[:] = [RobomimicEnv(task, images=True, **kwargs)]
        made[-1].reset(0)
        return made[-1]

    yield make
    for env in made:
        env.env.env.close()


def seed_robosuite(seed):
    np.random.seed(seed)  # noqa: NPY002, it draws from the global generator


@pytest.fixture(scope="module")
def demonstration(built):
    """A demonstration of Lift: reset seed, first state, actions, and the rewards of robosuite's step."""
    env = built("lift")
    with h5py.File(ROOT / "demos" / "lift" / "low_dim.hdf5") as file:
        demo = file["data/demo_0"]
        seed, state, actions = int(demo.attrs["seed"]), demo["states"][0], demo["actions"][()]
    seed_robosuite(seed)
    env.reset()
    env.reset_to({"states": state})
    rewards = np.array([env.step(action)[1] for action in actions])
    assert rewards.max() == 1  # the cube is lifted
    return seed, state, actions, rewards


def random_chunks(task, count):
    shape = count, TASKS[task].chunk, 7 * TASKS[task].robots
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


# ---------------------------------------------------------------------------- the simulator's step
def random_episode(env, step, steps):
    """Observation, reward, state and time after each of `steps` random actions, executed by `step`."""
    seed_robosuite(3)
    env.reset()
    actions = np.random.default_rng(1).uniform(-1, 1, (steps, 7 * len(env.env.robots)))
    state = lambda: (env.env.sim.get_state().flatten(), env.env.cur_time)
    return [(*step(env, i, action), *state()) for i, action in enumerate(actions)]


def plain_step(env, i, action):
    obs, reward, *_ = env.step(action)
    return obs, reward


def fast_step(env, i, action):
    observe = i % 3 != 1  # observations are also right if they were not read in every step
    reward = control_step(env.env, action, observe)
    return env.get_observation(env.env._get_observations()) if observe else None, reward


@pytest.mark.parametrize(("task", "images", "steps"), [
    ("square", False, 60), ("transport", False, 40), ("lift", True, 40),
])  # fmt: skip
def test_control_step_gives_the_states_observations_and_rewards_of_robosuites_step(
    built, image_env, task, images, steps
):
    env = image_env(task).env if images else built(task)
    episodes = [random_episode(env, step, steps) for step in (plain_step, fast_step)]
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


@pytest.mark.parametrize("task", ["square", "transport"])
def test_compiled_controller_gives_the_torques_of_robosuites(built, task):
    env = built(task).env
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


# ------------------------------------------------------------------------------- one environment
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("task", list(STATE))
def test_observations_are_dppos(shared_env, image_env, task, images):
    env = image_env(task) if images else shared_env(task)
    keys, size, *limits = STATE[task]
    assert [TASKS[task].chunk, TASKS[task].horizon] == limits
    if images:
        keys, size = keys[:-1], 9 * len(CAMERAS[task])
    for begin in (lambda: env.reset(2), lambda: env.step(random_chunks(task, 1)[0])[0]):
        obs = begin()
        raw = env.env.get_observation()  # robomimic's, read anew
        assert set(obs) == ({"state", "rgb", "object"} if images else {"state"})
        assert obs["state"].shape == (size,) == (TASKS[task].state_dim(images),)
        state = np.concatenate([raw[key] for key in keys]).astype(np.float32)
        np.testing.assert_array_equal(obs["state"], state)
        if images:
            views = [raw[f"{camera}_image"] for camera in CAMERAS[task]]
            rgb = np.concatenate([view.transpose(2, 0, 1) for view in views])
            np.testing.assert_array_equal(obs["rgb"], rgb)
            np.testing.assert_array_equal(obs["object"], raw["object"].astype(np.float32))
            assert obs["rgb"].shape == (3 * len(views), 96, 96)
            assert obs["rgb"].dtype == np.uint8 and obs["rgb"].std() > 10


@pytest.mark.parametrize("before, left", [(0, 99), (1, 99), (3, 99), (3, 0)])  # to the time limit
def test_success_ends_chunk_and_episode_at_once(shared_env, demonstration, before, left):
    seed, state, actions, rewards = demonstration
    solved = int(np.argmax(rewards > 0))
    env = shared_env(horizon=solved + 1 + left)
    env.reset(seed)
    env.env.reset_to({"states": state})
    for action in actions[: solved - before]:
        assert env.step(action[None])[1:] == (False, False, 1)
    assert env.step(actions[solved - before :][:4])[1:] == (True, False, before + 1)
    assert env.t == solved + 1


def test_fast_images_lack_shadows_and_little_else(image_env):
    images = [image_env(fast_render=fast).reset(1)["rgb"] for fast in (True, False)]
    fast, full = np.array(images, int)
    assert 0.5 < np.abs(fast - full).mean() < 5


# ---------------------------------------------------------------------------- many environments
class NoSimulator(RobomimicEnv):
    """A RobomimicEnv without a simulator, for what happens around it; `fault` runs in every step.

    Its state is (seed, chunks since the reset, ...); an episode ends after seed % 10 chunks, and in the
    last of them the task is solved where the seed is above 100.
    """

    fault = staticmethod(lambda: None)

    def reset(self, seed):
        self.obs = {"state": np.zeros(19, np.float32)}
        self.obs["state"][0] = seed
        return self.obs

    def step(self, actions):
        self.fault()
        self.obs["state"][1] += 1
        seed, t = self.obs["state"][:2]
        over = t == seed % 10
        success = bool(over and seed > 100)
        return self.obs, success, bool(over and not success), 4


@pytest.fixture
def without_simulators(monkeypatch):
    """Makes vector environments of NoSimulators with the attributes that are given."""
    made = []

    def make(**attributes):
        for name, value in attributes.items():
            monkeypatch.setattr(NoSimulator, name, value)
        monkeypatch.setattr(module, "RobomimicEnv", NoSimulator)
        made.append(RobomimicVectorEnv(2, task="lift", images=False))
        return made[-1]

    yield make
    for envs in made:
        envs.close()


CHUNKS = np.zeros((2, 4, 7), np.float32)


def test_vector_env_runs_the_episodes_of_their_seeds_as_a_single_environment_does(shared_env):
    env, chunks, alone = shared_env(horizon=6), random_chunks("lift", 2), {}
    for seed in (3, 4, 5):  # 5 comes after other episodes than below
        alone[seed] = [env.reset(seed)["state"]]
        alone[seed] += [env.step(chunk)[0]["state"] for chunk in chunks]
    assert not np.array_equal(alone[3][0], alone[4][0])
    seed_robosuite(123)  # must not reach the models of the workers, which are built now
    with closing(RobomimicVectorEnv(2, task="lift", images=False, horizon=6)) as envs:
        envs.reset(iter([3, 4, 5]))
        np.testing.assert_array_equal(envs.obs["state"], [alone[3][0], alone[4][0]])
        step = envs.step(np.stack([chunks[0]] * 2))
        kept = step.next_obs["state"].copy()
        np.testing.assert_array_equal(kept, [alone[3][1], alone[4][1]])
        assert (step.score.tolist(), step.length.tolist()) == ([0, 0], [4, 4])
        assert not step.truncated.any()
        last = envs.step(np.stack([chunks[1]] * 2))
    np.testing.assert_array_equal(last.next_obs["state"], [alone[3][2], alone[4][2]])
    assert (last.truncated.tolist(), last.length.tolist()) == ([True, True], [2, 2])
    np.testing.assert_array_equal(envs.obs["state"], [alone[5][0], alone[4][2]])  # one starts anew
    np.testing.assert_array_equal(step.next_obs["state"], kept)  # observations are copies


def test_episodes_take_the_seeds_in_order_and_without_one_an_environment_stays_idle(without_simulators):
    envs, seen = without_simulators(), []
    envs.reset(iter([1, 103, 2]))
    while (envs.episode >= 0).any():
        step = envs.step(CHUNKS)
        seen.append([envs.episode.tolist(), step.next_obs["state"][:, :2].tolist(), step.score.tolist()])
        seen[-1] += [step.terminated.tolist(), step.truncated.tolist()]
        assert step.reward.tolist() == step.score.tolist()
    assert seen == [
        [[2, 1], [[1, 1], [103, 1]], [0, 0], [False, False], [True, False]],
        [[2, 1], [[2, 1], [103, 2]], [0, 0], [False, False], [False, False]],
        [[-1, -1], [[2, 2], [103, 3]], [0, 1], [False, True], [True, False]],
    ]
    envs.reset(iter([2]))  # fewer seeds than environments
    assert envs.episode.tolist() == [0, -1]
    envs.reset(101)  # a first seed
    assert envs.obs["state"][:, 0].tolist() == [101, 102]
    assert envs.step(CHUNKS).score.tolist() == [1, 0]
    assert envs.obs["state"][:, 0].tolist() == [103, 102]
    assert envs.step(CHUNKS).score.tolist() == [0, 1]  # a new episode is not solved yet


def test_workers_render_where_this_process_has_a_renderer_too(image_env):
    obs = image_env().reset(5)
    with closing(RobomimicVectorEnv(1, task="lift", images=True)) as envs:
        envs.reset(5)
        rgb, frame = envs.obs["rgb"][0], envs.render()
    assert rgb.std() > 10
    assert frame.shape == (256, 256, 3) and frame.dtype == np.uint8 and frame.std() > 10
    assert (rgb != obs["rgb"]).mean() < 0.01


def test_vector_env_clips_actions_and_films(monkeypatch, tmp_path):
    results, chosen = [], []
    monkeypatch.setattr(module, "choose_renderer", lambda: chosen.append(True))  # it was, see _renderer
    with closing(RobomimicVectorEnv(2, task="lift", images=False, horizon=8)) as envs:
        for scale in (1.0, 7.0):
            envs.reset(iter([1, 1]))
            chunks = scale * np.sign(random_chunks("lift", 2))
            results.append(envs.step(chunks).next_obs["state"])
        policy = small_policy(rldt_robomimic, 19, 7, chunk=4)
        module.record_video(policy, envs, tmp_path)
    np.testing.assert_array_equal(*results)
    frames = np.stack(imageio.mimread(tmp_path / "episode.mp4"))
    assert chosen and frames.shape == (8, 256, 256, 3) and frames.std() > 10


def test_ctrl_c_in_the_terminal_leaves_the_workers_alone(without_simulators):
    envs = without_simulators()
    envs.reset(15)
    for process in envs.processes:  # a terminal sends it to every process
        os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert envs.step(CHUNKS).length.tolist() == [4, 4]


def fail():
    raise ValueError("mj_step diverged")


@pytest.mark.parametrize("fault, timeout, message", [
    (fail, 300, "mj_step diverged"), (lambda: time.sleep(600), 0.5, "did not answer for 0.5 s"),
])  # fmt: skip
def test_a_worker_that_raises_or_is_slow_is_an_error(
    without_simulators, monkeypatch, fault, timeout, message
):
    envs = without_simulators(fault=staticmethod(fault))
    envs.reset(15)
    monkeypatch.setattr(module, "TIMEOUT", timeout)  # a busy machine resets slowly
    began = time.perf_counter()
    with pytest.raises(module.WorkerError, match=message):
        envs.step(CHUNKS)
    assert time.perf_counter() - began < 60  # also on a busy machine
    envs.close()
    assert not any(process.is_alive() for process in envs.processes)


def test_numbers_that_are_not_finite_end_the_run(without_simulators, shared_env):
    broken = {"state": np.full(19, np.nan, np.float32)}
    envs = without_simulators(step=lambda self, actions: (broken, False, False, 4))
    envs.reset(15)
    for chunks, fault in (CHUNKS + np.nan, "The policy .*action"), (CHUNKS, "The sim.* 0 .*observation"):
        with pytest.raises(SystemExit, match=f"^{fault}"):
            envs.step(chunks)
    for obs in broken, {"state": np.zeros(19), "object": np.full(10, np.nan)}:
        with pytest.raises(SystemExit, match="non-finite observation"):
            without_simulators(reset=lambda self, seed, obs=obs: obs).reset(15)
    env = shared_env()
    env.reset(1)
    env.env.env.sim.data.qvel[:] = np.nan  # MuJoCo would go on from its initial state
    obs, *ended = env.step(CHUNKS[0])
    assert ended[:2] == [False, True] and np.isfinite(obs["state"]).all()  # as after the time limit
    env.reset(2)
    assert env.step(CHUNKS[0])[1:3] == (False, False)


def test_a_run_ends_in_one_line_and_without_processes_where_a_worker_is_killed():
    code = (
        "import os, signal, numpy as np; from envs.robomimic import RobomimicVectorEnv\n"
        "envs = RobomimicVectorEnv(2, task='lift', images=False); envs.reset(2**32 - 1)\n"
        "print(*[process.pid for process in envs.processes], flush=True)\n"
        "os.kill(envs.processes[1].pid, signal.SIGKILL); envs.step(np.zeros((2, 4, 7)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    (line,) = result.stderr.splitlines()  # robosuite's warnings are not among it
    assert result.returncode == 1 and line.startswith("A worker process ended") and "-9" in line
    assert not any(os.path.exists(f"/proc/{pid}") for pid in result.stdout.split())


# ------------------------------------------------------------------------------------- rendering
@pytest.mark.parametrize("asked, working, order", [
    ("glfw", {"egl", "glfw"}, ["glfw"]), ("", {"osmesa"}, ["egl", "osmesa"]),
    ("", set(), ["egl", "osmesa"]),
])  # fmt: skip
def test_renderer_is_asked_for_or_the_first_that_works_or_named(monkeypatch, asked, working, order):
    tried = []  # in place of a renderer

    def run(command, env, **kwargs):
        tried.append(env["MUJOCO_GL"])
        code, stderr = int(tried[-1] not in working), "Traceback\nImportError: no library\n"
        return subprocess.CompletedProcess(command, code, stdout="", stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("MUJOCO_GL", asked)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "")
    monkeypatch.delenv("PYOPENGL_PLATFORM")
    if working:
        module.choose_renderer(log=lambda text: None)
        assert os.environ["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"] == order[-1]
    else:
        with pytest.raises(SystemExit, match=r"apt-get install .*libegl1") as stop:
            module.choose_renderer(log=lambda text: None)
        for backend in order:
            assert f"{backend} does not work: ImportError: no library" in str(stop.value)
    assert tried == order


# --------------------------------------------------------------------------- robomimic's imports
@pytest.mark.parametrize("name", ["robosuite", "robomimic"])
def test_import_without_robosuite_or_with_another_names_what_to_install(monkeypatch, name):
    import_robomimic()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"1\.5\.1.*1\.4\.1"):
        patch.setattr("robosuite.__version__", "1.5.1")
        import_robomimic()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"pip install -r requirements\.txt"):
        import_robomimic()
