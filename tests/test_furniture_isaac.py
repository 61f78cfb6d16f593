import importlib.machinery
import os
import subprocess
import sys
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from conftest import ROOT

import rldt_furniture
from envs.furniture_isaac import IsaacVectorEnv, isaac_missing

OBS_KEYS = ["robot_state/ee_pos", "robot_state/ee_quat", "parts_poses"]
PARTS = {"one_leg": 5, "lamp": 3}
DPPO = dict(
    act_rot_repr="rot_6d", action_type="pos", april_tags=False, concat_robot_state=True, ctrl_mode="diffik", obs_keys=OBS_KEYS, gpu_id=0, headless=True,
    observation_space="state", record=False, pos_scalar=1, rot_scalar=1, stiffness=1_000, damping=200,
)  # fmt: skip


@dataclass
class Simulator:
    """What the fake FurnitureRLSimEnv was asked, and what it answers."""

    arguments: list = field(default_factory=list)
    resets: list = field(default_factory=list)
    actions: list = field(default_factory=list)
    rotated: list = field(default_factory=list)
    rewards: object = lambda t, i: 0.0
    """Reward of environment i in step t of its episode."""
    dtype: torch.dtype = torch.float32
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
            robot = torch.arange(14, dtype=simulator.dtype).repeat(self.num_envs, 1)
            robot[:, 0] = torch.tensor([code(i, t) for i, t in enumerate(self.t)])
            poses = -torch.arange(1, 7 * (self.parts + 1) + 1, dtype=simulator.dtype).repeat(self.num_envs, 1)
            if simulator.nan:
                poses[0, 3] = torch.nan
            return {"robot_state": robot, "parts_poses": poses}

        def reset(self, env_idxs=None):
            assert env_idxs.dtype == torch.int32
            assert env_idxs.numel() > 0
            assert env_idxs.device == self.device
            simulator.resets.append(env_idxs.tolist())
            self.t[env_idxs.long().numpy()] = 0
            return self.observe()

        def step(self, action):
            assert action.shape == (self.num_envs, 10)
            assert action.dtype == torch.float32
            simulator.actions.append(action.clone())
            reward = torch.tensor([[simulator.rewards(t, i)] for i, t in enumerate(self.t)])
            self.t += 1
            done = torch.ones(self.num_envs, 1, dtype=torch.bool)  # the simulator's own ends are not asked for
            return self.observe(), reward, done, {"obs_success": True, "action_success": True}

    return FurnitureRLSimEnv


def module(name, **content):
    result = types.ModuleType(name)
    result.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(result).update(content)
    return result


@pytest.fixture
def simulator(monkeypatch):
    """Isaac Gym and the fork of FurnitureBench, as far as they are used; the robot's rotation becomes -1 to -6."""
    simulator = Simulator()

    def to_rot6d(robot):
        simulator.rotated.append(robot)
        assert robot.shape[-1] == 14
        rotation = -torch.arange(1.0, 7, dtype=robot.dtype).expand(len(robot), 6)
        return torch.cat([robot[:, :3], rotation, robot[:, 7:]], -1)

    content = {
        "isaacgym": {}, "furniture_bench": dict(__path__=[]), "furniture_bench.envs": dict(__path__=[]), "furniture_bench.controllers": dict(__path__=[]),
        "furniture_bench.envs.furniture_rl_sim_env": dict(FurnitureRLSimEnv=fake_env(simulator)),
        "furniture_bench.envs.observation": dict(DEFAULT_STATE_OBS=OBS_KEYS),
        "furniture_bench.controllers.control_utils": dict(proprioceptive_quat_to_6d_rotation=to_rot6d),
    }  # fmt: skip
    for name, attributes in content.items():
        monkeypatch.setitem(sys.modules, name, module(name, **attributes))
    return simulator


def everyone(envs):
    return np.ones(envs.num_envs, bool)


def chunks(envs, chunk=8):
    """Numbered actions (N, chunk, 10)."""
    return np.arange(envs.num_envs * chunk * 10, dtype=np.float64).reshape(envs.num_envs, chunk, 10)


# ------------------------------------------------------------------------------- the simulator
@pytest.mark.parametrize("furniture, horizon", [("one_leg", 700), ("lamp", 1000)])
@pytest.mark.parametrize("randomness", ["low", "med"])
def test_the_simulator_gets_exactly_dppos_arguments(simulator, furniture, horizon, randomness):
    envs = IsaacVectorEnv(3, furniture, randomness)
    assert simulator.arguments == [DPPO | dict(furniture=furniture, randomness=randomness, num_envs=3, max_env_steps=horizon)]
    assert (envs.num_envs, envs.chunk, envs.horizon) == (3, 8, horizon)
    IsaacVectorEnv(1, furniture, randomness, horizon=48)
    assert simulator.arguments[1]["max_env_steps"] == 48


@pytest.mark.parametrize("furniture, dim", [("one_leg", 58), ("lamp", 44)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_observations_are_the_robots_state_with_a_6d_rotation_then_the_parts(simulator, furniture, dim, dtype):
    simulator.dtype = dtype
    envs = IsaacVectorEnv(2, furniture, "low")
    obs = envs.reset([7, 8], everyone(envs))
    assert list(obs) == ["state"]
    assert obs["state"].dtype == np.float32
    assert obs["state"].shape == (2, *envs.observation_space["state"].shape) == (2, dim)
    parts = [-i for i in range(1, dim - 16 + 1)]
    for i in range(2):
        assert obs["state"][i].tolist() == [code(i, 0), 1, 2, *range(-1, -7, -1), *range(7, 14), *parts]
    assert len(simulator.rotated) == 1


def test_a_subset_is_reset_and_all_are_observed(simulator):
    envs = IsaacVectorEnv(4, "one_leg", "low", chunk=2)
    envs.reset(range(4), everyone(envs))
    envs.step(chunks(envs, 2), everyone(envs))
    obs = envs.reset([0, 5, 0, 6], np.array([False, True, False, True]))
    assert simulator.resets == [[0, 1, 2, 3], [1, 3]]
    assert obs["state"][:, 0].tolist() == [code(0, 2), code(1, 0), code(2, 2), code(3, 0)]


def test_every_environment_executes_its_own_actions_in_their_order(simulator):
    envs = IsaacVectorEnv(3, "one_leg", "low", chunk=4)
    envs.reset(range(3), everyone(envs))
    actions = chunks(envs, 4)
    obs, *_ = envs.step(actions, everyone(envs))
    assert len(simulator.actions) == 4
    for t, action in enumerate(simulator.actions):
        np.testing.assert_array_equal(action.numpy(), actions[:, t])
    assert obs["state"][:, 0].tolist() == [code(i, 4) for i in range(3)]


def test_rewards_and_pairs_are_counted_over_chunks_and_start_anew_with_the_episode(simulator):
    pairs = {0: (1, 5), 1: (3,), 2: ()}  # steps of an episode in which an environment assembles one
    simulator.rewards = lambda t, i: float(t in pairs[i])
    envs = IsaacVectorEnv(3, "lamp", "low", chunk=4)
    envs.reset(range(3), everyone(envs))
    _, reward, terminated, truncated, stages, steps = envs.step(chunks(envs, 4), everyone(envs))
    assert (reward.tolist(), stages.tolist(), steps.tolist()) == ([1, 1, 0], [1, 1, 0], [4, 4, 4])
    kept = stages
    _, reward, *_, stages, _ = envs.step(chunks(envs, 4), everyone(envs))
    assert (reward.tolist(), stages.tolist()) == ([1, 0, 0], [2, 1, 0])
    assert kept.tolist() == [1, 1, 0]  # not written to later
    assert stages.dtype.kind == "i"
    assert not terminated.any()
    assert not truncated.any()
    envs.reset(range(3), np.array([True, False, False]))
    _, reward, *_, stages, _ = envs.step(chunks(envs, 4), everyone(envs))
    assert (reward.tolist(), stages.tolist()) == ([1, 0, 0], [1, 1, 0])


@pytest.mark.parametrize("stop_on_success", [False, True])
def test_an_episode_ends_with_the_last_pair_where_asked_for(simulator, stop_on_success):
    simulator.rewards = lambda t, i: float(i == 0 and t in (1, 2, 3))  # more than there are pairs
    envs = IsaacVectorEnv(2, "one_leg", "low", chunk=4, stop_on_success=stop_on_success)
    envs.reset(range(2), everyone(envs))
    _, reward, terminated, truncated, stages, steps = envs.step(chunks(envs, 4), everyone(envs))
    assert terminated.tolist() == [stop_on_success, False]
    assert steps.tolist() == [2 if stop_on_success else 4, 4]
    assert not truncated.any()
    if stop_on_success:
        assert (reward.tolist(), stages.tolist()) == ([1, 0], [1, 0])


def test_episodes_are_truncated_at_the_horizon_within_a_chunk(simulator):
    simulator.rewards = lambda t, i: float(t == 6 + i)  # of environment 0 in the last step, of 1 after the time limit
    envs = IsaacVectorEnv(2, "one_leg", "low", chunk=4, horizon=7)
    envs.reset(range(2), everyone(envs))
    results = [envs.step(chunks(envs, 4), everyone(envs))[1:] for _ in range(2)]
    for (reward, terminated, truncated, stages, steps), last in zip(results, (False, True), strict=True):
        assert reward.tolist() == stages.tolist() == [float(last), 0]
        assert not terminated.any()
        assert truncated.tolist() == [last, last]
        assert steps.tolist() == ([3, 3] if last else [4, 4])
    envs.reset(range(2), everyone(envs))
    assert envs.step(chunks(envs, 4), everyone(envs))[3].tolist() == [False, False]


def test_success_in_the_last_step_is_no_truncation(simulator):
    simulator.rewards = lambda t, i: float(t == 3)
    envs = IsaacVectorEnv(1, "one_leg", "low", chunk=4, horizon=4, stop_on_success=True)
    envs.reset([0], everyone(envs))
    _, _, terminated, truncated, *_ = envs.step(chunks(envs, 4), everyone(envs))
    assert (terminated.tolist(), truncated.tolist()) == ([True], [False])


def test_environments_that_are_not_active_count_nothing(simulator):
    simulator.rewards = lambda t, i: 1.0 if t == 0 else 0.0
    envs = IsaacVectorEnv(2, "lamp", "low", chunk=4, horizon=4)
    envs.reset(range(2), everyone(envs))
    _, reward, _, truncated, stages, steps = envs.step(chunks(envs, 4), np.array([True, False]))
    assert (reward.tolist(), stages.tolist(), steps.tolist(), truncated.tolist()) == ([1, 0], [1, 0], [4, 0], [True, False])


def test_numbers_that_are_not_finite_stop(simulator):
    envs = IsaacVectorEnv(2, "one_leg", "low", chunk=4)
    envs.reset(range(2), everyone(envs))
    bad = chunks(envs, 4)
    bad[1, 2, 3] = np.inf
    with pytest.raises(FloatingPointError, match="policy returned a non-finite action"):
        envs.step(bad, everyone(envs))
    assert simulator.actions == []
    simulator.nan = True
    with pytest.raises(FloatingPointError, match="simulator returned a non-finite observation"):
        envs.step(chunks(envs, 4), everyone(envs))


# --------------------------------------------------------------------------------- what is missing
def test_nothing_is_missing_where_both_are_installed(simulator):
    assert isaac_missing() == ""


def test_isaac_gym_is_not_installed_here():
    assert isaac_missing() == "Isaac Gym is not installed"


def test_furniture_bench_is_missing(simulator, monkeypatch):
    monkeypatch.delitem(sys.modules, "furniture_bench")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isaac_missing() == "furniture-bench is not installed"


def test_isaac_gym_is_installed_and_was_not_imported(simulator, monkeypatch):
    monkeypatch.delitem(sys.modules, "isaacgym")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    assert isaac_missing() == "Isaac Gym was not imported: it needs Python 3.8 and must come before torch"


def test_another_furniture_bench_is_installed(simulator, monkeypatch):
    monkeypatch.delitem(sys.modules, "furniture_bench.envs.furniture_rl_sim_env")
    assert isaac_missing() == "the installed furniture-bench has no FurnitureRLSimEnv (it is in the fork ankile/furniture-bench)"


def test_what_furniture_bench_needs_is_missing(simulator, monkeypatch):
    find = importlib.util.find_spec

    def broken(name, package=None):
        if name.startswith("furniture_bench."):
            raise ModuleNotFoundError("No module named 'gym'")
        return find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", broken)
    assert isaac_missing() == "furniture-bench cannot be imported (No module named 'gym')"


# ------------------------------------------------------------------------------ choosing a simulator
def resolved(**changes):
    return rldt_furniture.resolve(rldt_furniture.Args(**changes))


@pytest.mark.parametrize("backend", ["auto", "isaac"])
def test_isaac_is_taken_where_it_is_installed_and_its_episodes_run_to_the_time_limit(simulator, backend, capsys):
    args = resolved(backend=backend)
    assert (args.backend, args.stop_on_success) == ("isaac", False)
    assert capsys.readouterr().out == ("Simulator: isaac\n" if backend == "auto" else "")


def test_mujoco_is_taken_where_it_is_asked_for(simulator, capsys):
    args = resolved(backend="mujoco")
    assert (args.backend, args.stop_on_success) == ("mujoco", True)
    assert not resolved(backend="mujoco", stop_on_success=False).stop_on_success
    assert capsys.readouterr().out == ""


def test_auto_takes_mujoco_and_says_why_where_isaac_is_missing(capsys):
    assert resolved(backend="auto").backend == "mujoco"
    assert capsys.readouterr().out == "Simulator: mujoco (Isaac Gym is not installed)\n"


def test_isaac_that_is_missing_stops_in_one_line():
    with pytest.raises(SystemExit) as stop:
        resolved(backend="isaac")
    assert str(stop.value) == "--backend isaac: Isaac Gym is not installed; use --backend mujoco."


@pytest.mark.parametrize("stop_on_success", [False, True])
def test_environments_are_made_as_the_arguments_say(simulator, stop_on_success):
    args = resolved(backend="isaac", furniture="lamp", randomness="med", horizon=40, chunk=4)
    envs = rldt_furniture.make_envs(args, 5, stop_on_success=stop_on_success)
    assert isinstance(envs, IsaacVectorEnv)
    assert simulator.arguments == [DPPO | dict(furniture="lamp", randomness="med", num_envs=5, max_env_steps=40)]
    assert (envs.chunk, envs.horizon, envs.stop_on_success, envs.stages) == (4, 40, stop_on_success, 2)
    envs.close()


def test_a_run_in_isaac_resets_all_environments_together(simulator, tmp_path, capsys):
    simulator.rewards = lambda t, i: float((t, i) in ((2, 0), (5, 1), (6, 1)))
    policy = rldt_furniture.FlowPolicy(44, 10, 4, 4, width=16, depth=3, time_dim=8, layer_norm=False, cond_mlp=())
    policy.obs_max.fill_(300), policy.obs_min.fill_(-300)
    rldt_furniture.save_base(policy, tmp_path / "base.safetensors", backend="mujoco")
    args = rldt_furniture.Args(
        backend="isaac", furniture="lamp", base=tmp_path / "base.safetensors", runs=tmp_path / "runs", chunk=4, euler_steps=4, actor_width=16,
        actor_depth=3, actor_layer_norm=False, cond_mlp=(), time_dim=8, device="cpu", threads=1, iterations=2, num_envs=3, horizon=10, buffer_iterations=2,
        eval_every=10, final_eval_episodes=4, rounds=1, critic_steps=2, critic_batch=8, critic_width=16, segments=6, segment_chunks=0,
        warmup_iterations=0, actor_steps=1, actor_batch=4, n_particles=2,
    )  # fmt: skip
    result = rldt_furniture.main(args)
    assert f"{args.base}: a base policy of mujoco, now used in isaac" in capsys.readouterr().out
    # eight episodes in three waves, one rollout, eight episodes again
    assert simulator.resets == [[0, 1, 2], [0, 1, 2], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1]]
    assert (result["backend"], result["task"], result["env_steps"]) == ("isaac", "lamp-low", 30)
    # environments have 1, 2 and 0 pairs; the waves begin with the four episodes from zero
    assert (result["base_stages"], result["base_success"]) == ((1 + 2 + 0 + 1) / 4, 1 / 4)
    assert (result["base_stages_sampled"], result["base_success_sampled"]) == ((2 + 0 + 1 + 2) / 4, 2 / 4)
    (run,) = (tmp_path / "runs").iterdir()
    slot = torch.load(run / "replay0.pt", weights_only=True)
    assert slot["reward"].T.tolist() == [[1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]]
    assert slot["stage"].T.tolist() == [[0, 1, 1, 1], [0, 0, 2, 2], [0, 0, 0, 0]]
    assert slot["valid"].T.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert slot["reached"].T.tolist() == [[1] * 4, [2] * 4, [0] * 4]
    assert slot["terminated"].T[:, :3].tolist() == [[0, 0, 1], [0, 1, 1], [0, 0, 1]]


# ----------------------------------------------------------------------------------- order of imports
FAKE = """
import sys
if "torch" in sys.modules:
    raise ImportError("PyTorch was imported before isaacgym modules")
"""


def python(statement, path):
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", statement], env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("first, imported, reason", [("", True, "furniture-bench "), ("import torch; ", False, "Isaac Gym was not imported: ")])
def test_isaac_gym_is_imported_before_torch(tmp_path, first, imported, reason):
    (tmp_path / "isaacgym.py").write_text(FAKE)
    result = python(f"{first}import sys, rldt_furniture; print('isaacgym' in sys.modules, rldt_furniture.isaac_missing())", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{imported} {reason}")


def test_pretraining_imports_isaac_gym_before_torch_too(tmp_path):
    (tmp_path / "isaacgym.py").write_text(FAKE + "print('imported')\nsys.exit(0)\n")
    result = python("import pretrain_fm", tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "imported\n", "")


def test_isaac_gym_of_another_python_is_no_obstacle(tmp_path):
    (tmp_path / "isaacgym.py").write_text("raise RuntimeError('No gym module found for the active version of Python (3.11)')")
    result = python("import rldt_furniture; print(rldt_furniture.isaac_missing())", tmp_path)
    assert (result.returncode, result.stdout) == (0, "Isaac Gym was not imported: it needs Python 3.8 and must come before torch\n"), result.stderr
