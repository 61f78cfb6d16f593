import importlib.machinery
import os
import runpy
import subprocess
import sys
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from conftest import ROOT
from short_runs import kept_rollout, only_run

import rldt_furniture
from common.flow import FlowPolicy
from envs.furniture_isaac import IsaacVectorEnv, isaac_missing
from envs.furniture_mujoco import FurnitureVectorEnv

OBS_KEYS = ["robot_state/ee_pos", "robot_state/ee_quat", "parts_poses"]
NOT_IMPORTED = "Isaac Gym was not imported: it needs Python 3.8 and must come before torch"
PARTS = {"one_leg": 5, "lamp": 3}
DPPO = dict(
    act_rot_repr="rot_6d", action_type="pos", april_tags=False, concat_robot_state=True,
    ctrl_mode="diffik", obs_keys=OBS_KEYS, gpu_id=0, headless=True, observation_space="state",
    record=False, pos_scalar=1, rot_scalar=1, stiffness=1_000, damping=200,
)  # fmt: skip


@dataclass
class Simulator:
    """What the fake FurnitureRLSimEnv was asked, and what it answers."""

    arguments: list = field(default_factory=list)
    resets: list = field(default_factory=list)
    actions: list = field(default_factory=list)
    rewards: object = lambda t, i: 0.0
    """Reward of environment i in step t of its episode."""
    nan: bool = False


def code(env, t):
    """The number that the fake's robot reports: 100 * environment + step of the episode."""
    return 100.0 * env + t


def fake_env(simulator):
    class FurnitureRLSimEnv:
        def __init__(self, **arguments):
            simulator.arguments.append(arguments)
            self.device, self.num_envs = torch.device("cpu"), arguments["num_envs"]
            self.parts, self.t = PARTS[arguments["furniture"]], np.zeros(self.num_envs, int)

        def observe(self):
            robot = torch.arange(14.0).repeat(self.num_envs, 1)
            robot[:, 0] = torch.tensor([code(i, t) for i, t in enumerate(self.t)])
            pose = -torch.arange(1.0, 7 * (self.parts + 1) + 1)
            poses = pose.repeat(self.num_envs, 1)
            if simulator.nan:
                poses[0, 3] = torch.nan
            return {"robot_state": robot, "parts_poses": poses}

        def reset(self, env_idxs=None):
            assert env_idxs.dtype == torch.int32 and env_idxs.numel() > 0
            simulator.resets.append(env_idxs.tolist())
            self.t[env_idxs.long().numpy()] = 0
            return self.observe()

        def step(self, action):
            assert action.shape == (self.num_envs, 10) and action.dtype == torch.float32
            simulator.actions.append(action.clone())
            reward = torch.tensor([[simulator.rewards(t, i)] for i, t in enumerate(self.t)])
            self.t += 1
            done = torch.ones(self.num_envs, 1, dtype=torch.bool)  # not asked for
            return self.observe(), reward, done, {"obs_success": True, "action_success": True}

    return FurnitureRLSimEnv


def module(name, **content):
    result = types.ModuleType(name)
    result.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(result).update(content)
    return result


@pytest.fixture
def simulator(monkeypatch):
    """Isaac Gym and the fork of FurnitureBench, as far as they are used; a rotation becomes -1 to -6."""
    simulator = Simulator()

    def to_rot6d(robot):
        assert robot.shape[-1] == 14
        rotation = -torch.arange(1.0, 7).expand(len(robot), 6)
        return torch.cat([robot[:, :3], rotation, robot[:, 7:]], -1)

    content = {
        "isaacgym": {}, "furniture_bench": dict(__path__=[]), "furniture_bench.envs": dict(__path__=[]),
        "furniture_bench.controllers": dict(__path__=[]),
        "furniture_bench.envs.furniture_rl_sim_env": dict(FurnitureRLSimEnv=fake_env(simulator)),
        "furniture_bench.envs.observation": dict(DEFAULT_STATE_OBS=OBS_KEYS),
        "furniture_bench.controllers.control_utils": dict(proprioceptive_quat_to_6d_rotation=to_rot6d),
    }  # fmt: skip
    for name, attributes in content.items():
        monkeypatch.setitem(sys.modules, name, module(name, **attributes))
    return simulator


def chunks(envs, chunk=4):
    """Numbered actions (N, chunk, 10)."""
    return np.arange(envs.num_envs * chunk * 10, dtype=np.float64).reshape(envs.num_envs, chunk, 10)


# ------------------------------------------------------------------------------- the simulator
@pytest.mark.parametrize("furniture, randomness, horizon, limit, dim", [
    ("one_leg", "low", None, 700, 58), ("lamp", "med", None, 1000, 44), ("one_leg", "med", 48, 48, 58),
])  # fmt: skip
def test_arguments_and_observations_are_dppos(simulator, furniture, randomness, horizon, limit, dim):
    envs = IsaacVectorEnv(2, furniture, randomness, horizon)
    task = dict(furniture=furniture, randomness=randomness, num_envs=2, max_env_steps=limit)
    assert simulator.arguments == [DPPO | task]
    envs.reset(7)
    assert envs.obs.dtype == np.float32
    assert envs.obs.shape == (2, envs.obs_dim) == (2, dim)
    parts = [-i for i in range(1, dim - 16 + 1)]
    for i in range(2):
        assert envs.obs[i].tolist() == [code(i, 0), 1, 2, *range(-1, -7, -1), *range(7, 14), *parts]


def test_every_environment_executes_its_own_actions_in_their_order_while_all_is_finite(simulator):
    envs = IsaacVectorEnv(3, "one_leg", "low")
    envs.reset(0)
    actions = chunks(envs)
    step = envs.step(actions)
    assert len(simulator.actions) == 4
    for t, action in enumerate(simulator.actions):
        np.testing.assert_array_equal(action.numpy(), actions[:, t])
    assert step.next_obs[:, 0].tolist() == [code(i, 4) for i in range(3)]
    np.testing.assert_array_equal(step.next_obs, envs.obs)
    actions[1, 2, 3] = np.inf
    with pytest.raises(SystemExit, match="policy returned a non-finite action"):
        envs.step(actions)
    assert len(simulator.actions) == 4
    simulator.nan = True
    with pytest.raises(SystemExit, match="simulator returned a non-finite observation"):
        envs.step(chunks(envs))


def test_episodes_end_together_at_the_horizon_and_begin_anew_while_there_are_seeds(simulator):
    simulator.rewards = lambda t, i: float(t == 6 + i)  # of 0 in the last step, of 1 after it
    envs = IsaacVectorEnv(2, "one_leg", "low", horizon=7)
    envs.reset(iter([5, 6, 7]))
    for wave, episodes in enumerate(([0, 1], [2, -1])):
        assert envs.episode.tolist() == episodes
        first, last = (envs.step(chunks(envs)) for _ in range(2))
        running = np.array(episodes) >= 0
        assert not first.truncated.any() and not last.terminated.any()
        assert (last.truncated == running).all()
        assert (first.length == 4 * running).all() and (last.length == 3 * running).all()
        assert last.reward.tolist() == last.score.tolist() == [1, 0]
        assert last.next_obs[:, 0].tolist() == [code(0, 8), code(1, 8 if wave == 0 else 16)]
    assert envs.episode.tolist() == [-1, -1]
    assert simulator.resets == [[0, 1], [0]]  # never while another environment is in an episode


# --------------------------------------------------------------------------------- what is missing
@pytest.mark.parametrize("name, missing", [
    ("furniture_bench.envs.furniture_rl_sim_env", "not the fork ankile/furniture-bench"),
    ("isaacgym", "Isaac Gym is not installed"),
])  # fmt: skip
def test_what_is_missing_is_named(simulator, monkeypatch, name, missing):
    assert isaac_missing() == ""
    monkeypatch.delitem(sys.modules, name)
    assert isaac_missing().endswith(missing)


# ------------------------------------------------------------------------------ choosing a simulator
def resolved(**changes):
    args = rldt_furniture.Args(**changes)
    rldt_furniture.resolve(args)
    return args


@pytest.mark.parametrize("backend, taken", [("auto", "isaac"), ("isaac", "isaac"), ("mujoco", "mujoco")])
def test_isaac_is_taken_where_it_is_installed_or_asked_for(simulator, backend, taken):
    args = resolved(backend=backend, furniture="lamp", randomness="med", horizon=40, threads=1)
    assert args.backend == taken
    envs = rldt_furniture.make_envs(args, 5)
    assert type(envs) is {"isaac": IsaacVectorEnv, "mujoco": FurnitureVectorEnv}[taken]
    if taken == "isaac":
        task = dict(furniture="lamp", randomness="med", num_envs=5, max_env_steps=40)
        assert simulator.arguments == [DPPO | task]
    envs.close()


def test_where_isaac_is_missing_auto_takes_mujoco_and_isaac_stops_in_one_line():
    assert resolved(backend="auto").backend == "mujoco"
    with pytest.raises(SystemExit, match=r"Isaac Gym is not installed; use --backend mujoco\.$"):
        resolved(backend="isaac")


def test_a_run_in_isaac_resets_all_environments_together(simulator, tmp_path):
    simulator.rewards = lambda t, i: float((t, i) in ((2, 0), (5, 1), (6, 1)))
    policy = FlowPolicy(44, 10, 4, 4, width=16, depth=3, time_dim=8)
    policy.obs_max.fill_(300)
    policy.obs_min.fill_(-300)
    policy.save(tmp_path / "base.safetensors")
    args = rldt_furniture.Args(
        backend="isaac", furniture="lamp", base=tmp_path / "base.safetensors", runs=tmp_path / "runs",
        device="cpu", threads=1, iterations=2, num_envs=3, horizon=10, buffer_iterations=2,
        eval_every=10, final_eval_episodes=4, rounds=1, critic_steps=2, critic_batch=8, segments=6,
        warmup_iterations=0, actor_steps=1, actor_batch=4, n_particles=2,
    )  # fmt: skip
    result = rldt_furniture.main(args)
    # eight episodes in three waves, one rollout and the start of what would follow, eight episodes again
    waves = [[0, 1, 2], [0, 1, 2], [0, 1]]
    assert simulator.resets == [*waves, [0, 1, 2], [0, 1, 2], *waves]
    assert (result["args"]["backend"], result["task"], result["env_steps"]) == ("isaac", "lamp-low", 30)
    # environments have 1, 2 and 0 pairs; the waves begin with the four episodes from zero
    assert (result["base_stages"], result["base_success"]) == ((1 + 2 + 0 + 1) / 4, 1 / 4)
    found = result["base_stages_sampled"], result["base_success_sampled"]
    assert found == ((2 + 0 + 1 + 2) / 4, 2 / 4)
    slot = kept_rollout(only_run(tmp_path / "runs"), 0)
    assert slot["reward"].T.tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 0]]
    assert (2 * slot["obs"][..., -1]).T.tolist() == [[0, 1, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    assert slot["valid"].T.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert slot["reached"].T.tolist() == [[1] * 3, [2] * 3, [0] * 3]
    assert slot["terminated"].T.tolist() == [[0, 0, 1], [0, 1, 1], [0, 0, 1]]


# ----------------------------------------------------------------------------------- order of imports
FAKE = """
import sys
if "torch" in sys.modules:
    raise ImportError("PyTorch was imported before isaacgym modules")
"""


def python(statement, path):
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", statement]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def test_isaac_gym_is_imported_before_torch(tmp_path):
    (tmp_path / "isaacgym.py").write_text(FAKE)  # pretrain_fm.py imports rldt_furniture first
    result = python("import sys, pretrain_fm; print('isaacgym' in sys.modules)", tmp_path)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


def test_isaac_gym_of_another_python_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "isaacgym.py").write_text("raise RuntimeError('no gym module for this Python')")
    monkeypatch.syspath_prepend(tmp_path)
    assert runpy.run_path(str(ROOT / "rldt_furniture.py"))["isaac_missing"]() == NOT_IMPORTED


def test_isaac_gym_is_not_filmed(simulator, tmp_path, monkeypatch):
    monkeypatch.setattr(rldt_furniture, "make_envs", lambda *_: 1 / 0)  # nothing is made before
    args = rldt_furniture.Args(backend="isaac", capture_video=True, runs=tmp_path / "runs", device="cpu")
    with pytest.raises(SystemExit, match="--capture-video films in MuJoCo"):
        rldt_furniture.main(args)
    assert not (tmp_path / "runs").exists()
