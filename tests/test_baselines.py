import csv
import dataclasses
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from pickle_bomb import LOADED, Bomb

import rldt_gym
from baselines import best_of_n_gym, dppo_gym, fpo_gym, qam_gym, reinflow_gym
from demos import dataset

PPO = {"reinflow": reinflow_gym, "dppo": dppo_gym, "fpo": fpo_gym}
OFF_POLICY = {"qam": qam_gym, "best_of_n": best_of_n_gym}
SCRIPTS = PPO | OFF_POLICY
WALL = ("wall_s", "rollout_s", "critic_s", "actor_s", "update_s")
LOSS = {"reinflow": "losses/policy", "dppo": "losses/policy", "fpo": "losses/policy", "qam": "losses/adjoint", "best_of_n": "losses/critic"}
ACTOR = {"qam": "update_actor", "best_of_n": "update_critic"}  # what a run calls in every update


# ------------------------------------------------------------------------------------ the shared skeleton
def shared(module, name):
    """Source of a function or class, without the docstring's and comments' words."""
    return inspect.getsource(getattr(module, name))


SKELETON = (
    "autocast average_gradients get_demonstrations write_atomically write_rows plot_curve git_commit parse_args record_video load_policy"
).split()
CRITIC = "Critic Replay td_lambda update_critic".split()


@pytest.mark.parametrize("name, function", [
    *[(name, function) for name in SCRIPTS for function in SKELETON],
    *[(name, function) for name in OFF_POLICY for function in CRITIC],
    *[(name, function) for name in ("qam", "reinflow", "fpo") for function in ("evaluate", "pretrain", "save_base", "get_base")],
    ("qam", "collect"), ("qam", "FlowPolicy"), ("fpo", "FlowPolicy"), ("qam", "load_base"), ("fpo", "load_base"), ("best_of_n", "critic_target"),
    *[(name, function) for name in ("dppo", "fpo") for function in ("gae", "RewardScale", "Value", "normalize", "update_value")],
])  # fmt: skip
def test_what_is_no_part_of_the_method_is_the_same_code(name, function):
    original = reinflow_gym if function in ("gae", "RewardScale", "Value", "normalize", "update_value") else rldt_gym
    assert shared(SCRIPTS[name], function) == shared(original, function)


@pytest.mark.parametrize("name", SCRIPTS)
def test_arguments_that_rldt_has_too_come_in_the_same_order_with_a_docstring(name):
    ours, theirs = (
        [field.name for field in dataclasses.fields(module.Args)] for module in (SCRIPTS[name], rldt_gym)
    )
    common = [field for field in ours if field in theirs]
    assert common == [field for field in theirs if field in ours]
    assert {"env_id", "preset", "base", "iterations", "num_envs", "rollout_chunks", "zero_fraction", "eval_every"} <= set(common)
    source = inspect.getsource(SCRIPTS[name].Args)
    for field in ours:
        following = source.split(f"\n    {field}: ")[1].split("\n")[1]
        assert following.startswith('    """'), field


@pytest.mark.parametrize("name", SCRIPTS)
def test_paper_preset_changes_known_fields_only_and_flags_win(name):
    module = SCRIPTS[name]
    assert set(module.PAPER) <= {field.name for field in dataclasses.fields(module.Args)}
    assert module.parse_args([]) == module.Args()
    assert module.parse_args(["--preset=paper"]) == module.Args(preset="paper", **module.PAPER)
    args = module.parse_args(["--preset", "paper", "--rollout-chunks", "7"])
    assert (args.rollout_chunks, args.iterations) == (7, module.PAPER["iterations"])


@pytest.mark.parametrize("task, expected", [("Hopper-v4", (4.5e-5, 0.44, 6.5e-4, 0)), ("Walker2d-v4", (4e-4, 1.0, 4e-3, 5)), ("HalfCheetah-v4", (3e-5, 0.5, 3e-4, 10))])
def test_reinflow_takes_the_official_step_sizes_of_the_task(task, expected):
    args = reinflow_gym.resolve(reinflow_gym.parse_args(["--preset=paper", f"--env-id={task}"]))
    assert (args.actor_lr, args.actor_lr_end, args.value_lr, args.warmup_iterations) == expected
    flags = {"actor_lr": 1e-4, "actor_lr_end": 0.7, "value_lr": 2e-3, "warmup_iterations": 3}
    for name, value in flags.items():  # an explicit flag wins, and leaves the others
        args = reinflow_gym.resolve(reinflow_gym.parse_args(["--preset=paper", f"--env-id={task}", f"--{name.replace('_', '-')}={value}"]))
        assert {key: getattr(args, key) for key in flags} == dict(zip(flags, expected, strict=True)) | {name: value}


@pytest.mark.parametrize("module", [dppo_gym, reinflow_gym])
def test_paper_preset_has_the_official_step_counts_and_clipping(module):
    args = module.resolve(module.parse_args(["--preset=paper", "--env-id=Hopper-v4"]))
    assert (args.clip, args.batch, args.epochs, args.lr_warmup) == (0.01, 50_000, 5, 10)
    assert args.actor_lr == {dppo_gym: 1e-4, reinflow_gym: 4.5e-5}[module]


def test_paper_presets_have_the_settings_of_the_paper_that_compares_them():
    values = lambda module, *flags: module.resolve(module.parse_args(["--preset=paper", "--env-id=Hopper-v4", "--device=cpu", *flags]))
    assert values(qam_gym).inv_temp == 0.3
    fpo, fpopp = (values(fpo_gym, f"--form={form}") for form in ("fpo", "fpo++"))
    assert (fpo.samples, fpo.clip, fpopp.samples, fpopp.clip, fpopp.loss_clamp) == (8, 0.05, 16, 0.01, 20)
    assert values(fpo_gym, "--samples=5").samples == 5


@pytest.mark.parametrize("preset", ["laptop", "paper"])
def test_qam_learns_its_critic_from_the_same_rollouts_with_the_same_settings_as_rldt(preset):
    ours, theirs = (vars(module.resolve(module.parse_args([f"--preset={preset}", "--device=cpu"]))) for module in (qam_gym, rldt_gym))
    differ = {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]}
    assert differ <= {"exp_name", "actor_lr", "actor_steps", "actor_batch", "actor_warmup", "max_grad_norm"}
    critic = {key for key in theirs if key.startswith(("critic_", "rollout_", "zero_", "warmup_", "td_", "buffer_", "num_", "exploration_", "segment"))}
    assert len(critic) > 12 and critic <= ours.keys()


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_iterations_only_the_wall_budget_ends_a_run(name):
    iterations = lambda *flags: SCRIPTS[name].resolve(SCRIPTS[name].parse_args(["--env-id=Hopper-v4", *flags])).iterations
    assert iterations() < 100 < 1_000_000 < iterations("--wall-budget-s=9")
    assert iterations("--wall-budget-s=9", "--iterations=7") == 7


# ------------------------------------------------------------------------------------ tiny runs
COMMON = dict(
    env_id="Hopper-v4", chunk=2, euler_steps=4, actor_width=16, time_dim=8, device="cpu", seed=3, num_envs=4, rollout_chunks=12,
    iterations=4, eval_every=3, eval_episodes=2, final_eval_episodes=3,
)  # fmt: skip
TINY = {
    **{name: COMMON | dict(batch=16, epochs=2, value_width=16, lr_warmup=1, actor_lr=1e-3) for name in PPO},
    **{name: COMMON | dict(buffer_iterations=2, rounds=2, critic_steps=2, critic_batch=16, critic_width=16, segments=8, segment_chunks=4,
                           warmup_iterations=1, warmup_factor=1) for name in OFF_POLICY},
}  # fmt: skip
TINY["fpo"] |= dict(samples=3)
TINY["qam"] |= dict(actor_steps=1, actor_batch=8, actor_lr=1e-3, actor_warmup=2)
TINY["best_of_n"] |= dict(candidates=3)


def make_args(name, base, runs, **changes):
    fields = TINY[name] | dict(base=base, runs=runs) | changes
    return SCRIPTS[name].parse_args([f"--{key.replace('_', '-')}={value}" for key, value in fields.items()])


def metrics(run):
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return [{key: value for key, value in row.items() if key not in WALL} for row in rows]


def only(folder):
    (run,) = folder.iterdir()
    return run


@pytest.fixture(scope="session")
def finished(tiny_base, tmp_path_factory):
    """Directory and result of one complete tiny run of each script, made when first asked for; not to be written to."""
    made = {}

    def get(name):
        if name not in made:
            runs = tmp_path_factory.mktemp(name)
            result = SCRIPTS[name].main(make_args(name, tiny_base, runs))
            made[name] = only(runs), result
        return made[name]

    return get


@pytest.mark.parametrize("name", SCRIPTS)
def test_run_writes_what_a_run_of_rldt_writes(finished, finished_run, name):
    run, returned = finished(name)
    assert {path.name.split(".")[0] for path in run.iterdir()} >= {"args", "metrics", "checkpoint", "policy", "result", "curve"}
    result = json.loads((run / "result.json").read_text())
    assert result == json.loads(json.dumps(returned))
    assert set(result) == set(finished_run[1])
    assert result["method"] == SCRIPTS[name].Args().exp_name
    rows = metrics(run)
    assert [row["eval_return"] != "" for row in rows] == [True, False, False, True, True]
    assert rows[-1][LOSS[name]] == ""
    assert rows[2][LOSS[name]] != ""
    assert result["final_return"] == pytest.approx(float(rows[-1]["eval_return"]))
    assert result["base_return_sampled"] == pytest.approx(float(rows[0]["eval_return_sampled"]))
    shared_columns = {"iteration", "env_steps", "train_return", "eval_return", "eval_return_sampled", "diagnostics/reward_scale"}
    assert shared_columns <= set(rows[0])


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "best_of_n"])
def test_base_policy_is_evaluated_as_rldt_evaluates_it(finished, finished_run, name):
    # ReinFlow clips the mean of each step, so only the others start from the very numbers
    ours, theirs = finished(name)[1], finished_run[1]
    tolerance = 0.5 if name == "reinflow" else 1e-6
    for key in ("base_return", "base_return_sampled"):
        assert ours[key] == pytest.approx(theirs[key], rel=tolerance)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("chosen", [0, 1])
def test_best_policy_is_measured_again_as_it_was_on_episodes_that_did_not_choose_it(scripted_evaluations, tiny_base, tmp_path, name, chosen):
    returns = [[9.0, 8.0], [8.0, 9.0]][chosen]
    episodes, policies = scripted_evaluations(SCRIPTS[name], [*returns, 1.0, 5.0])  # base, iteration 3, final, measured again
    result = SCRIPTS[name].main(make_args(name, tiny_base, tmp_path))
    assert (result["base_return"], result["final_return"], result["best_return"], result["best_return_sampled"]) == (returns[0], 1.0, 5.0, 4.0)
    assert not any(episodes[-1] & others for others in episodes[:-1])
    for key, value in policies[chosen].state_dict().items():
        assert torch.equal(policies[-1].state_dict()[key], value)
    saved = SCRIPTS[name].load_policy(only(tmp_path) / "best_policy.pt", "cpu")
    if name == "best_of_n":
        assert [policy.candidates for policy in policies] == [1, 3, 3, [1, 3][chosen]]
        assert saved.candidates == [1, 3][chosen]


@pytest.mark.parametrize("name", SCRIPTS)
def test_run_stopped_by_ctrl_c_and_resumed_equals_one_never_stopped(monkeypatch, finished, tiny_base, tmp_path, name):
    module, calls = SCRIPTS[name], []
    function = ACTOR.get(name, "update_actor")
    update = getattr(module, function)

    def pressed(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, pressed)
        with pytest.raises(SystemExit) as stop:
            module.main(make_args(name, tiny_base, tmp_path))
    run = only(tmp_path)
    command = f"python -m baselines.{name}_gym --resume {run}"
    assert str(stop.value).endswith(f"Continue with: {command}")
    assert not (run / "result.json").exists()
    result = module.main(module.parse_args(command.split()[3:]))
    assert metrics(run) == metrics(finished(name)[0])
    for key in ("base_return", "final_return", "best_return", "env_steps"):
        assert result[key] == finished(name)[1][key]


KILLED = """
import importlib, os, signal, sys
import torch

module = importlib.import_module("baselines." + sys.argv[1])
saves, save = 0, torch.save

def counted(saved, path):
    global saves
    saves += 1
    if saves == 3:
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    save(saved, path)

torch.save = counted
module.main(module.parse_args(sys.argv[2:]))
"""


def test_run_killed_while_it_saves_and_resumed_equals_one_never_killed(finished, tiny_base, tmp_path):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in (TINY["dppo"] | dict(base=tiny_base, runs=tmp_path)).items()]
    process = subprocess.run([sys.executable, "-c", KILLED, "dppo_gym", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    run = only(tmp_path)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["state"]["iteration"] == 2
    dppo_gym.main(dppo_gym.parse_args(["--resume", str(run)]))
    assert metrics(run) == metrics(finished("dppo")[0])


@pytest.mark.parametrize("name", SCRIPTS)
def test_evaluating_a_run_gives_the_returns_of_its_last_evaluation(finished, name):
    run, result = finished(name)
    seed = 3  # the run's
    module = SCRIPTS[name]
    scores = module.main(module.parse_args([f"--evaluate={run}", "--final-eval-episodes=3", f"--seed={seed}", "--device=cpu"]))
    assert scores == {"zero": result["final_return"], "noise": result["final_return_sampled"]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_wall_budget_ends_the_run_with_its_final_evaluation(finished, tiny_base, tmp_path, name):
    module = SCRIPTS[name]
    result = module.main(make_args(name, tiny_base, tmp_path, iterations=1000, wall_budget_s=1e-6))  # spent after the first evaluation
    run = only(tmp_path)
    rows = metrics(run)
    assert [int(row["iteration"]) for row in rows] == [0, 1]
    assert rows[-1]["eval_return"] != ""
    assert result["env_steps"] == 0
    assert module.main(module.parse_args(["--resume", str(run)]))["final_return"] == result["final_return"]  # nothing is added
    assert metrics(run) == rows


@pytest.mark.parametrize("content", [b"", b"garbage", "half", "pickle"])
@pytest.mark.parametrize("name, file, flag", [("reinflow", "checkpoint.pt", "--resume"), ("best_of_n", "policy.pt", "--evaluate")])
def test_damaged_file_stops_with_its_name(finished, tmp_path, name, file, flag, content):
    import pickle

    run = shutil.copytree(finished(name)[0], tmp_path / "copy")
    if content == "half":
        content = (run / file).read_bytes()[: (run / file).stat().st_size // 2]
    elif content == "pickle":
        content = pickle.dumps(Bomb())
    (run / file).write_bytes(content)
    module = SCRIPTS[name]
    with pytest.raises(SystemExit, match=f"{file}: cannot be loaded"):
        module.main(module.parse_args([flag, str(run)]))
    assert LOADED == []


@pytest.mark.parametrize("name, field, message", [
    ("reinflow", dict(epochs=0), "--epochs must be at least 1, got 0"),
    ("reinflow", dict(sigma_min=0.3), "--sigma-min"),
    ("dppo", dict(tuned_steps=9), "--tuned-steps must be at most --euler-steps"),
    ("dppo", dict(batch=0), "--batch must be at least 1, got 0"),
    ("fpo", dict(samples=-1), "--samples must be at least 1, got -1"),
    ("best_of_n", dict(candidates=0), "--candidates must be at least 1, got 0"),
    ("best_of_n", dict(buffer_iterations=0), "--buffer-iterations must be at least 1, got 0"),
    ("fpo", dict(actor_depth=4), "--actor-depth must be odd and at least 3"),
    ("qam", dict(actor_batch=0), "--actor-batch must be at least 1, got 0"),
    ("dppo", dict(eval_episodes=0), "--eval-episodes must be at least 1, got 0"),
    ("qam", dict(rounds=0), "--rounds must be at least 1, got 0"),
])  # fmt: skip
def test_flags_out_of_range_stop_with_their_name(name, field, message):
    with pytest.raises(SystemExit, match=message):
        SCRIPTS[name].resolve(SCRIPTS[name].Args(**field))


@pytest.mark.parametrize("name", SCRIPTS)
def test_base_policy_of_another_chunk_or_file_stops_in_one_line(tiny_base, tmp_path, name):
    with pytest.raises(SystemExit, match="has chunk 2, the run wants 3"):
        SCRIPTS[name].main(make_args(name, tiny_base, tmp_path, chunk=3))
    (tmp_path / "mine.safetensors").write_bytes(b"garbage")
    with pytest.raises(SystemExit, match=r"mine\.safetensors: not a base policy"):
        SCRIPTS[name].main(make_args(name, tmp_path / "mine.safetensors", tmp_path / "runs"))


def test_a_flow_is_no_base_for_the_diffusion(tiny_base, tmp_path):
    with pytest.raises(SystemExit, match="has form flow, the run wants diffusion"):
        dppo_gym.main(make_args("dppo", tiny_base, tmp_path, form="diffusion"))


def test_two_processes_train_one_policy_on_their_own_rollouts(tiny_base, tmp_path):
    fields = TINY["reinflow"] | dict(base=tiny_base, runs=tmp_path, iterations=2)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in fields.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "baselines.reinflow_gym", *flags]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    run = only(tmp_path)
    first, second = (torch.load(run / file, weights_only=True) for file in ("checkpoint.pt", "checkpoint1.pt"))
    assert first["state"]["wall_s"] == second["state"]["wall_s"]
    for part in ("policy", "noise_net", "value"):
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), (part, key)
    assert first["reward_scale"]["var"] == second["reward_scale"]["var"] != 1
    assert json.loads((run / "result.json").read_text())["env_steps"] > 2 * 4 * 12  # processes, environments, chunks of two steps


# ------------------------------------------------------------------------------------ every method learns
class Track(gym.Env):
    """The action should be half the observation, which is drawn anew in each of the 8 steps; reward -|a - o / 2|^2."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.obs = 0, self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        reward = -float(np.square(action - self.obs / 2).sum())
        self.steps, self.obs = self.steps + 1, self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs, reward, False, self.steps == 8, {}


gym.register("Track-v0", lambda: Track())
SMALL = dict(env_id="Track-v0", backend="gymnasium", chunk=1, euler_steps=8, actor_width=32, time_dim=8, device="cpu", bf16=False, seed=1,
             num_envs=20, eval_every=100, eval_episodes=10, final_eval_episodes=20, zero_fraction=0.0)  # fmt: skip
ON_POLICY = dict(iterations=12, rollout_chunks=16, batch=320, epochs=5, value_width=32, lr_warmup=1, clip=0.1, actor_lr=2e-3, actor_lr_end=1.0)
CRITICS = dict(iterations=6, rollout_chunks=16, buffer_iterations=6, rounds=4, critic_steps=16, critic_batch=64, critic_width=32, critic_lr=3e-3,
               gamma=0.0, td_lambda=0.0, segments=16, segment_chunks=8, warmup_iterations=1, warmup_factor=2)  # fmt: skip
LEARNING = {
    "reinflow": ("reinflow", ON_POLICY | dict(value_lr=3e-3)),
    "dppo": ("dppo", ON_POLICY),
    "dppo diffusion": ("dppo", ON_POLICY | dict(form="diffusion")),
    "fpo": ("fpo", ON_POLICY | dict(form="fpo")),
    "fpo++": ("fpo", ON_POLICY),
    "qam": ("qam", CRITICS | dict(actor_steps=8, actor_batch=64, actor_lr=3e-3, actor_lr_end=1.0, inv_temp=30.0)),
    "best_of_n": ("best_of_n", CRITICS | dict(candidates=16)),
}


@pytest.fixture(scope="session")
def weak_base(tmp_path_factory):
    """Base policies, a flow and a diffusion, whose actions N(0, 0.5^2) do not look at the observation."""
    rng = np.random.default_rng(0)
    obs, action = rng.uniform(-1, 1, (2000, 2)), rng.normal(0, 0.5, (2000, 2)).clip(-1, 1)
    obs[:2], action[:2] = [[-1, -1], [1, 1]], [[-1, -1], [1, 1]]  # the scaling is that of the spaces
    data = dataset.Demonstrations(obs.astype(np.float32), action.astype(np.float32), np.array([2000]))
    made = {}

    def get(form):
        if form not in made:
            torch.manual_seed(0)
            keys = ("chunk", "euler_steps", "actor_width", "time_dim", "device", "bf16")
            args = dppo_gym.Args(form=form, bc_epochs=60, bc_batch=128, **{key: SMALL[key] for key in keys})
            policy = dppo_gym.pretrain(dppo_gym.resolve(args), data, log=lambda line: None)
            made[form] = tmp_path_factory.mktemp(form) / "base.safetensors"
            dppo_gym.save_base(policy, made[form])
        return made[form]

    return get


@pytest.fixture(scope="session")
def flow_for_all(weak_base, tmp_path_factory):
    """The weak flow, as the scripts that know no `form` read it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("plain") / "base.safetensors"
    with safe_open(weak_base("flow"), "pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {key: file.get_tensor(key) for key in file.keys()}
    for key in ("form", "tuned_steps"):
        del config[key]
    save_file(state, path, metadata={"config": json.dumps(config)})
    return path


@pytest.mark.parametrize("method", LEARNING)
def test_method_improves_a_weak_base(weak_base, flow_for_all, tmp_path, method):
    name, changes = LEARNING[method]
    fields = SMALL | changes
    base = weak_base("diffusion") if method == "dppo diffusion" else flow_for_all
    module = SCRIPTS[name]
    result = module.main(module.Args(**fields, base=base, runs=tmp_path))
    # a reward of -(0.4^2 + 0.5^2 / 3) per dimension and step for actions that do not look, so about -4 in all
    assert -5 < result["base_return_sampled"] < -2.3
    assert result["final_return_sampled"] > -1.5


# ------------------------------------------------------------------------------------ the PPO family's parts
@st.composite
def rollouts(draw):
    """Rewards, ends and values (T, N) of rollouts, gamma and lambda; an end is a termination or a truncation."""
    T, N = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    reward, value, next_value = torch.randn(3, T, N, dtype=torch.float64, generator=generator)
    end = torch.tensor(draw(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=T * N, max_size=T * N))).view(T, N)
    next_value[:-1] = torch.where(end[:-1] == 0, value[1:], next_value[:-1])  # inside an episode s_{t+1} is the next state
    return reward, (end == 1).double(), (end == 2).double(), value, next_value, draw(st.floats(0, 1)), draw(st.floats(0, 1))


@given(rollouts())
def test_gae_is_the_exponential_average_of_the_n_step_advantages(rollout):
    reward, terminated, truncated, value, next_value, gamma, lam = rollout
    advantage = reinflow_gym.gae(*rollout)
    T, N = reward.shape
    for n in range(N):
        for t in range(T):
            last = next(i for i in range(t, T) if terminated[i, n] or truncated[i, n] or i == T - 1)
            total, n_step = 0.0, []
            for i in range(t, last + 1):
                total += gamma ** (i - t) * reward[i, n].item()
                bootstrap = 0.0 if terminated[i, n] else gamma ** (i - t + 1) * next_value[i, n].item()
                n_step.append(total + bootstrap - value[t, n].item())
            expected = sum((1 - lam) * lam**i * a for i, a in enumerate(n_step[:-1])) + lam ** (last - t) * n_step[-1]
            assert advantage[t, n].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_truncation_bootstraps_and_termination_does_not():
    one, zero = torch.ones(2, 1), torch.zeros(2, 1)
    end = torch.tensor([[1.0], [0.0]])
    assert reinflow_gym.gae(one, zero, end, zero, 10 * one, 0.9, 0.5)[0].item() == pytest.approx(1 + 0.9 * 10)
    assert reinflow_gym.gae(one, end, zero, zero, 10 * one, 0.9, 0.5)[0].item() == 1


def test_reward_scale_is_the_standard_deviation_of_the_discounted_returns_of_all_rollouts():
    scale, rng = reinflow_gym.RewardScale(3, 0.9), np.random.default_rng(0)
    running, everything = np.zeros(3), []
    for _ in range(4):
        reward, done = rng.normal(2, 5, (20, 3)).astype(np.float32), rng.random((20, 3)) < 0.1
        scaled = scale(torch.as_tensor(reward), torch.as_tensor(done).float())
        for r, d in zip(reward, done, strict=True):
            running = 0.9 * running + r
            everything.append(running.copy())
            running[d] = 0
        np.testing.assert_allclose(scaled, reward / np.std(everything), rtol=1e-4)
    scale.count.fill_(1e12)  # what comes now does not move the deviation
    outliers = scale(torch.tensor([[1e3, -1e3, 1.0]]), torch.zeros(1, 3))
    assert outliers[0].tolist() == pytest.approx([10, -10, 1 / np.std(everything)], rel=1e-4)


class LinearFlow(torch.nn.Module):
    """v(x, t, s) = x A + t b + s C, whose every quantity has a closed form."""

    time_dim = 8

    def __init__(self, obs_dim, size):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.A, self.b, self.C = (torch.nn.Parameter(0.3 * torch.randn(*shape, generator=generator)) for shape in ((size, size), (size,), (obs_dim, size)))
        self.time_mlp = torch.nn.Linear(8, 8)

    def forward(self, x, t, obs):
        return x @ self.A + t[..., None] * self.b + obs @ self.C


def linear_policy(module, **config):
    policy = module.FlowPolicy(**dict(obs_dim=11, action_dim=3, chunk=2, euler_steps=4, width=8, depth=3, time_dim=8) | config)
    policy.velocity = LinearFlow(11, 6)
    if hasattr(policy, "frozen"):
        policy.frozen = LinearFlow(11, 6)
    return policy


def normal_log_density(x, mean, std):
    return -0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * math.log(2 * math.pi)


def rolled_out(name, rollout_chunks=3, **changes):
    """A policy with a linear flow, one rollout of Hopper by it, and the arguments."""
    module = SCRIPTS[name]
    fields = {key: value for key, value in TINY[name].items() if key not in ("iterations",)} | dict(rollout_chunks=rollout_chunks, bf16=False)
    args = module.resolve(module.Args(**fields | dict(zero_fraction=0.0) | changes))
    envs = module.VectorEnv("Hopper-v4", 4, 2, seed=5)
    envs.reset()
    extra = dict(form=args.form, tuned_steps=args.tuned_steps) if name == "dppo" else {}
    policy = linear_policy(module, euler_steps=args.euler_steps, **extra)
    policy.obs_min.fill_(-5), policy.obs_max.fill_(5)
    torch.manual_seed(2)
    if name == "reinflow":
        noise_net = module.NoiseNet(8, 11, 6, 16, args.sigma_min)
        torch.manual_seed(2)
        rollout, *_ = module.collect(policy, noise_net, envs, [], np.zeros(4), 0.2, args)
        return policy, noise_net, rollout, args
    rollout, *_ = module.collect(policy, envs, [], np.zeros(4), args)
    return policy, rollout, args


def test_reinflow_draws_its_chain_on_the_grid_on_which_it_computes_log_probabilities():
    policy, noise_net, rollout, args = rolled_out("reinflow", rollout_chunks=1)
    torch.manual_seed(2)
    x, obs, K = torch.randn(4, 6), rollout["obs"][0], 4
    flow, expected, log_prob = policy.velocity, [x], normal_log_density(x.numpy(), 0, 1).sum(1)
    entropy = np.full(4, 6 * 0.5 * math.log(2 * math.pi * math.e))
    with torch.no_grad():
        for k in range(K):
            time = flow.time_mlp(reinflow_gym.time_embedding(torch.full((4,), k / K), 8))
            raw = noise_net.layers(torch.cat([time, obs], 1)).tanh()
            log_variance = math.log(0.1**2) + (math.log(0.2**2) - math.log(0.1**2)) * (raw + 1) / 2
            sigma = torch.exp(log_variance / 2)
            assert ((sigma > 0.1) & (sigma < 0.2)).all()
            mean = (x + (x @ flow.A + k / K * flow.b + obs @ flow.C) / K).clamp(-1, 1)
            x = mean + sigma * torch.randn(4, 6).clamp(-3, 3)
            if k == K - 1:
                x = x.clamp(-1, 1)
            expected.append(x)
            log_prob += normal_log_density(x.numpy(), mean.numpy(), sigma.numpy()).sum(1)
            entropy += (0.5 * np.log(2 * math.pi * math.e * sigma.numpy() ** 2)).sum(1)
    torch.testing.assert_close(rollout["chain"][0], torch.stack(expected, 1))
    ours, rate = reinflow_gym.chain_log_prob(policy, noise_net, obs, rollout["chain"][0], 0.2, args)
    np.testing.assert_allclose(ours.detach(), np.clip(log_prob / (5 * 6), -1, 1), rtol=1e-5)
    np.testing.assert_allclose(rate.detach(), entropy / (5 * 6), rtol=1e-5)


def test_reinflow_holds_the_limit_of_its_noise_and_lowers_it_along_a_cosine():
    args = reinflow_gym.Args(device="cpu", sigma_min=0.08, sigma_max=0.16, sigma_hold=0.35, sigma_end=0.7)
    limit = lambda spent: reinflow_gym.sigma_limit(spent, args)
    assert limit(0) == limit(0.35) == pytest.approx(0.16)
    assert limit(1) == limit(1.5) == pytest.approx(0.08 + 0.7 * 0.08)
    assert limit(0.35 + 0.65 / 2) == pytest.approx((0.16 + 0.136) / 2)  # half way of a cosine
    assert limit(0.35 + 0.65 / 3) == pytest.approx(0.16 - 0.024 / 4)  # (1 - cos 60 degrees) / 2
    official = reinflow_gym.resolve(reinflow_gym.parse_args(["--preset=paper", "--env-id=Hopper-v4", "--device=cpu"]))
    assert [round(reinflow_gym.sigma_limit(spent, official), 3) for spent in (0, 0.35, 1)] == [0.24, 0.24, 0.198]


def test_log_probabilities_of_points_far_from_their_means_are_cut_off():
    policy, noise_net, rollout, args = rolled_out("reinflow", rollout_chunks=1)
    chain = rollout["chain"][0].clone()
    chain[0, 2:] += 5  # beyond any noise
    ours, _ = reinflow_gym.chain_log_prob(policy, noise_net, rollout["obs"][0], chain, 0.2, args)
    assert ours[0] == -1 and ours[1] > -1
    near, rollout, args = rolled_out("dppo", rollout_chunks=1)
    batch = dppo_gym.make_batch(near, rollout, rollout["reward"], rollout["reward"], args)
    mean = batch["x_next"] - 0.1 * torch.linspace(-4, 4, 6)  # so that the six numbers lie at -4 to 4 standard deviations
    near.step = lambda network, x, k, obs: (mean, torch.full((len(x),), 0.01))
    density = normal_log_density(0.1 * np.linspace(-4, 4, 6), 0, 0.1)
    assert density.min() < -5
    np.testing.assert_allclose(dppo_gym.step_log_prob(near, batch, args), np.full(len(mean), np.clip(density, -5, 2).mean()), rtol=1e-4)
    near.step = lambda network, x, k, obs: (batch["x_next"], torch.full((len(x),), 0.01))
    low = dataclasses.replace(args, sigma=0.01)  # whose greatest log-density is 3.7
    np.testing.assert_allclose(dppo_gym.step_log_prob(near, batch, low), np.full(len(mean), 2.0))


def test_dppo_draws_and_scores_the_last_steps_of_the_flow_around_the_tuned_and_the_first_along_the_frozen_network():
    policy, rollout, args = rolled_out("dppo", rollout_chunks=1, tuned_steps=3, sigma=0.2)
    with torch.no_grad():
        policy.frozen.b += 1.0
    torch.manual_seed(2)
    envs = dppo_gym.VectorEnv("Hopper-v4", 4, 2, seed=5)
    envs.reset()
    rollout, *_ = dppo_gym.collect(policy, envs, [], np.zeros(4), args)
    torch.manual_seed(2)
    x, obs = torch.randn(4, 6), rollout["obs"][0]
    expected, log_prob, tuned, K = [], [], policy.velocity, 4
    with torch.no_grad():
        for k in range(K):
            flow = policy.frozen if k == 0 else tuned
            mean = x + (x @ flow.A + k / K * flow.b + obs @ flow.C) / K
            noise = torch.randn(4, 6).clamp(-3, 3)
            if k > 0:
                expected.append(x)
            x = mean if k == 0 else mean + 0.2 * noise
            if k > 0:
                log_prob.append(np.clip(normal_log_density(x.numpy(), mean.numpy(), 0.2), -5, 2).mean(1))
    torch.testing.assert_close(rollout["chain"][0], torch.stack([*expected, x], 1))
    batch = dppo_gym.make_batch(policy, rollout, rollout["reward"], rollout["reward"], args)
    assert batch["k"].tolist() == [1, 2, 3] * 4
    np.testing.assert_allclose(batch["old_log_prob"], np.stack(log_prob, 1).ravel(), rtol=1e-4, atol=1e-6)
    assert torch.equal(batch["obs"].view(4, 3, 11)[:, 1], obs)


def first_update(name, bf16, **changes):
    """Metrics of an update on the batch that the policy has just drawn, and of the next one on the same batch."""
    module, parts = SCRIPTS[name], rolled_out(name, rollout_chunks=8, bf16=bf16, **changes)
    policy, args = parts[0], parts[-1]
    torch.manual_seed(0)
    policy.velocity = rldt_gym.VelocityMLP(6, 11, 16, 3, 8)
    if name == "dppo":
        policy.frozen.load_state_dict(LinearFlow(11, 6).state_dict())
    rollout = parts[-2]
    advantage = torch.randn(8, 4)
    if name == "reinflow":
        batch = module.make_batch(policy, parts[1], rollout, advantage, advantage, 0.2, args)
    else:
        batch = module.make_batch(policy, rollout, advantage, advantage, args)
    i = torch.randperm(len(batch["obs"]))[:13]  # in another order and number than the old log-probabilities were computed in
    batch = {key: value[i] for key, value in batch.items()}
    optimizer = torch.optim.Adam(policy.velocity.parameters(), 0.01)
    run = {
        "reinflow": lambda: module.update_actor(policy, parts[1], optimizer, batch, 0.2, args),
        "dppo": lambda: module.update_actor(policy, optimizer, batch, args),
        "fpo": lambda: module.update_actor(policy.velocity, optimizer, batch, args),
    }[name]
    return run(), run()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name, changes", [
    ("reinflow", {}), ("dppo", {}), ("dppo", dict(form="diffusion", euler_steps=6)), ("fpo", dict(form="fpo")), ("fpo", dict(form="fpo++")),
])  # fmt: skip
def test_ratio_of_the_first_minibatch_is_exactly_one(name, changes, bf16):
    first, second = first_update(name, bf16, clip=1e-9, **changes)
    assert first["diagnostics/kl"] == 0
    assert first["diagnostics/clip_fraction"] == 0  # of a clipping range that lets nothing but 1 through
    assert second["diagnostics/kl"] > 0
    assert second["diagnostics/clip_fraction"] > 0.5
    if name != "dppo":  # then the loss is minus the mean of normalised advantages, which is 0
        assert first["losses/policy"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name, changes", [("reinflow", {}), ("dppo", {}), ("fpo", dict(form="fpo")), ("fpo", dict(form="fpo++"))])
def test_half_precision_blurs_the_ratios_of_the_laptop_presets_only_a_little(name, changes):
    module = SCRIPTS[name]
    args = module.resolve(module.Args(num_envs=20, rollout_chunks=50, device="cpu", **changes))
    envs = module.VectorEnv("Hopper-v4", args.num_envs, args.chunk, seed=5)
    envs.reset()
    policy = module.load_base(dataset.DEMOS / "Hopper-v4/base.safetensors", args, envs)
    torch.manual_seed(2)
    noise = [module.NoiseNet(args.time_dim, 11, policy.action_size, 16, args.sigma_min)] if name == "reinflow" else []  # and the limit of sigma
    limit = [0.2] if name == "reinflow" else []
    rollout, *_ = module.collect(policy, *noise, envs, [], np.zeros(args.num_envs), *limit, args)
    advantage = torch.randn(rollout["reward"].shape)
    batch = module.make_batch(policy, *noise, rollout, advantage, advantage, *limit, args)

    @torch.no_grad()
    def log_likelihood(bf16):
        given = dataclasses.replace(args, bf16=bf16)
        if name == "reinflow":
            return module.chain_log_prob(policy, *noise, batch["obs"], batch["chain"], *limit, given)[0]
        if name == "dppo":
            return module.step_log_prob(policy, batch, given)
        losses = module.cfm_losses(policy.velocity, batch, given)
        return -losses.mean(-1) if args.form == "fpo" else -losses

    before = {bf16: log_likelihood(bf16) for bf16 in (False, True)}
    optimizer = torch.optim.Adam(policy.velocity.parameters(), args.actor_lr)
    for _ in range(5):
        module.update_actor(policy.velocity if name == "fpo" else policy, *noise, optimizer, batch, *limit, args)
    exact, rounded = (log_likelihood(bf16) - before[bf16] for bf16 in (False, True))
    error = rounded - exact
    assert error.std() < 0.1 * exact.std()
    assert error.std() < 0.1 * args.clip
    assert error.mean().abs() < 0.05 * exact.std()


def test_dppo_discounts_the_advantage_by_the_denoising_steps_that_follow():
    policy, rollout, args = rolled_out("dppo", tuned_steps=4, gamma_denoising=0.5)
    batch = dppo_gym.make_batch(policy, rollout, torch.randn(3, 4), torch.zeros(3, 4), args)
    advantage = (batch["advantage"] - batch["advantage"].mean()) / batch["advantage"].std()
    weight = torch.tensor([0.125, 0.25, 0.5, 1.0]).repeat(12)
    expected = torch.autograd.grad((weight * advantage * dppo_gym.step_log_prob(policy, batch, args)).mean(), policy.velocity.A)[0]
    optimizer = torch.optim.SGD([*policy.velocity.parameters()], 0.1)
    before = policy.velocity.A.detach().clone()
    policy.velocity.time_mlp.requires_grad_(False)
    for p in policy.velocity.time_mlp.parameters():
        p.grad = torch.zeros_like(p)
    zero = optimizer.zero_grad
    optimizer.zero_grad = lambda: zero(set_to_none=False)
    dppo_gym.update_actor(policy, optimizer, batch, args)
    torch.testing.assert_close(policy.velocity.A.detach(), before + 0.1 * expected, rtol=1e-4, atol=1e-7)


def test_diffusion_steps_are_the_posterior_of_the_forward_process():
    # x_k = sqrt(abar_k) a + sqrt(1 - abar_k) eps: for actions N(0, s^2) the exact noise prediction is linear, and the
    # chain of posteriors must carry N(0, abar_k s^2 + 1 - abar_k) from each k to k + 1
    K, s = 6, 0.3
    policy = dppo_gym.FlowPolicy(1, 1, 1, K, 8, 3, 4, form="diffusion", tuned_steps=3)
    level = [math.cos((1 - k / K + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2 for k in range(K + 1)]
    np.testing.assert_allclose(policy.alpha_bar[1:], level[1:], rtol=1e-5)
    assert policy.alpha_bar[0] < 1e-3

    def exact(x, t, obs):
        k = (t * K).round().long()
        signal = policy.alpha_bar[k]
        return (1 - signal).sqrt() * x / (signal * s**2 + 1 - signal)  # E[eps | x]

    x, var = torch.tensor([[0.5]]), 1.0
    for k in range(K):
        mean, std = policy.step(exact, x, torch.tensor(k), torch.zeros(1, 1))
        signal, after = policy.alpha_bar[k].item(), policy.alpha_bar[k + 1].item()
        var = signal * s**2 + 1 - signal
        covariance = math.sqrt(signal * after) * s**2 + (1 - after) * math.sqrt(signal / after)  # of x_k and x_{k+1}
        assert mean.item() == pytest.approx(0.5 * covariance / var, rel=1e-3)
        # the posterior variance given a, plus that of the mean of a given x_k, is the whole conditional variance
        a_var = s**2 * (1 - signal) / var
        slope = math.sqrt(after) * (1 - signal / after) / (1 - signal)
        assert std.item() ** 2 + slope**2 * a_var == pytest.approx(after * s**2 + 1 - after - covariance**2 / var, rel=1e-3, abs=1e-6)


def test_diffusion_clones_actions_that_depend_on_the_observation():
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (3000, 2)).astype(np.float32)
    action = (0.5 * obs + 0.2 * rng.normal(size=obs.shape)).astype(np.float32)
    data = dataset.Demonstrations(obs, action, np.array([3000]))
    fields = dict(device="cpu", chunk=1, form="diffusion", actor_width=64, time_dim=16, bc_epochs=60, bc_batch=128, bf16=False)
    policy = dppo_gym.pretrain(dppo_gym.resolve(dppo_gym.Args(**fields)), data, log=lambda line: None)
    with torch.no_grad():
        drawn = policy.to_env(policy.sample(policy.normalize(obs)))[:, 0]
        again = policy.to_env(policy.sample(policy.normalize(obs), torch.zeros(3000, 2)))[:, 0]
        once_more = policy.to_env(policy.sample(policy.normalize(obs), torch.zeros(3000, 2)))[:, 0]
    residual = drawn - 0.5 * obs
    assert residual.mean() == pytest.approx(0, abs=0.05)
    assert residual.std() == pytest.approx(0.2, abs=0.05)
    assert np.abs(again - 0.5 * obs).mean() < 0.1  # from 0 along the means: the middle of the density
    np.testing.assert_array_equal(again, once_more)


# ------------------------------------------------------------------------------------ FPO
def gaussian_flow(mean, s):
    """The exact velocity of the straight path from N(0, 1) to N(mean, s^2)."""
    def velocity(x, t, obs):
        t = t[..., None]
        return mean + (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2) * (x - t * mean)
    return velocity


def test_fpo_ratio_on_gaussian_flows_is_a_power_of_the_likelihood_ratio_and_the_weighted_one_is_it():
    # E over eps of L at time t is w(t) (a - mean)^2 + const, w = (1 - t)^2 / (t^2 s^2 + (1 - t)^2)^2. Plainly averaged
    # over t, as FPO does, the log-ratio is W = int w dt times the squares' difference; weighted by t / (1 - t), which
    # makes it the evidence bound, it is the true log-likelihood ratio, 1 / (2 s^2) times that difference.
    s, old, new, n = 0.6, -0.2, 0.3, 400_000
    action = torch.tensor([[0.5], [-0.4]])
    torch.manual_seed(0)
    t = (torch.arange(n) + 0.5) / n  # an even grid in place of draws, less noise
    batch = dict(obs=torch.zeros(2, 1), action=action, noise=torch.randn(2, n, 1), t=t.expand(2, -1))
    args = fpo_gym.Args(device="cpu", bf16=False, loss_clamp=math.inf)
    log_ratio = fpo_gym.cfm_losses(gaussian_flow(old, s), batch, args) - fpo_gym.cfm_losses(gaussian_flow(new, s), batch, args)
    squares = (action - old).square()[:, 0] - (action - new).square()[:, 0]
    W = ((1 - t) ** 2 / (t**2 * s**2 + (1 - t) ** 2) ** 2).mean()
    torch.testing.assert_close(log_ratio.mean(1), W * squares, rtol=0.05, atol=0.01)
    true = torch.distributions.Normal(new, s).log_prob(action)[:, 0] - torch.distributions.Normal(old, s).log_prob(action)[:, 0]
    torch.testing.assert_close((log_ratio * t / (1 - t)).mean(1), true, rtol=0.05, atol=0.01)


def test_fpo_clips_and_fpo_plus_plus_pulls_the_ratio_back_where_the_advantage_is_negative():
    ratio = torch.tensor([[0.5, 0.95, 1.0, 1.05, 2.0]])
    plus, minus = torch.full((1, 1), 2.0), torch.full((1, 1), -2.0)
    fpo, fpopp = (fpo_gym.Args(form=form, clip=0.1) for form in ("fpo", "fpo++"))
    torch.testing.assert_close(fpo_gym.surrogate(ratio, plus, fpo), torch.tensor([[1.0, 1.9, 2.0, 2.1, 2.2]]))
    torch.testing.assert_close(fpo_gym.surrogate(ratio, minus, fpo), torch.tensor([[-1.8, -1.9, -2.0, -2.1, -4.0]]))
    torch.testing.assert_close(fpo_gym.surrogate(ratio, plus, fpopp), fpo_gym.surrogate(ratio, plus, fpo))
    torch.testing.assert_close(fpo_gym.surrogate(ratio, minus, fpopp), -2 * ratio - 2 * (ratio - 1) ** 2 / 0.2)
    best = torch.linspace(0.5, 1.5, 1001)[None]  # of a negative advantage the maximum lies at the lower end of the region
    assert best[0, fpo_gym.surrogate(best, minus, fpopp).argmax()].item() == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("form, preset, clip", [("fpo", "laptop", 0.05), ("fpo", "paper", 0.05), ("fpo++", "laptop", 0.04), ("fpo++", "paper", 0.01)])
def test_fpo_takes_the_trust_region_of_its_form_unless_told_otherwise(form, preset, clip):
    assert fpo_gym.resolve(fpo_gym.Args(form=form, preset=preset, device="cpu")).clip == clip
    assert fpo_gym.resolve(fpo_gym.Args(form=form, clip=0.2, device="cpu")).clip == 0.2


@pytest.mark.parametrize("form", ["fpo", "fpo++"])
def test_fpo_update_takes_the_ratio_of_the_old_loss_over_the_new_one_and_bounds_it(form):
    # losses fall from 3 to 2 on the first action and rise from 1 to 50 on the second
    args = fpo_gym.Args(form=form, device="cpu", clip=0.5, log_ratio_clamp=4.0, max_grad_norm=1e9, bf16=False)
    shift = torch.nn.Parameter(torch.zeros(()))
    old, new = torch.tensor([[3.0, 3.0], [1.0, 1.0]]), torch.tensor([[2.0, 2.0], [50.0, 50.0]])
    seen, original = [], fpo_gym.surrogate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fpo_gym, "cfm_losses", lambda velocity, batch, args: new + shift)
        patch.setattr(fpo_gym, "surrogate", lambda ratio, *rest: seen.append(ratio.detach()) or original(ratio, *rest))
        velocity = torch.nn.Module()
        velocity.shift = shift
        fpo_gym.update_actor(velocity, torch.optim.SGD([shift], 0.0), dict(old_losses=old, advantage=torch.tensor([1.0, -1.0])), args)
    assert seen[0][0].flatten().tolist() == pytest.approx([math.e] * seen[0][0].numel())
    assert seen[0][1].flatten().tolist() == pytest.approx([math.exp(-4)] * seen[0][1].numel())


def test_fpo_compares_losses_at_the_same_pairs_and_bounds_them():
    policy, rollout, args = rolled_out("fpo", samples=5)
    batch = fpo_gym.make_batch(policy, rollout, torch.zeros(3, 4), torch.zeros(3, 4), args)
    assert batch["noise"].shape == (12, 5, 6)
    assert set(batch["t"].flatten().tolist()) <= {0.0, 0.25, 0.5, 0.75}
    x = (1 - batch["t"][..., None]) * batch["noise"] + batch["t"][..., None] * batch["action"][:, None]
    v = policy.velocity(x, batch["t"], batch["obs"][:, None])
    expected = (v - (batch["action"][:, None] - batch["noise"])).square().mean(-1)
    torch.testing.assert_close(batch["old_losses"], expected.detach().clamp_max(20), rtol=1e-4, atol=1e-5)
    args.loss_clamp = 1.0
    assert fpo_gym.cfm_losses(policy.velocity, batch, args).max() <= 1


# ------------------------------------------------------------------------------------ QAM
class Quadratic(torch.nn.Module):
    """Q(s, a) = -|a - target|^2 / 2 twice, with a difference of 1."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, obs, action):
        q = -0.5 * (action - self.target).square().sum(-1)
        return torch.stack([q, q - 1])


def test_lean_adjoint_is_the_product_of_the_jacobians():
    torch.manual_seed(0)
    K, B, D = 5, 3, 4
    base = rldt_gym.VelocityMLP(D, 2, 16, 3, 8, activation="mish").double()
    obs, points = torch.randn(B, 2).double(), 0.5 * torch.randn(K + 1, B, D).double()
    critic = Quadratic(torch.full((D,), 0.3))
    adjoint, q, grad_q = qam_gym.lean_adjoint(base, critic, obs, points, 2.5)
    assert adjoint.shape == (K, B, D)
    torch.testing.assert_close(grad_q, torch.where(points[-1].abs() < 1, 0.3 - points[-1].clamp(-1, 1), 0.0).double())
    torch.testing.assert_close(q, critic(obs, points[-1].clamp(-1, 1)))
    for b in range(B):
        g = -2.5 * grad_q[b]
        for k in reversed(range(K)):
            t = torch.tensor((k + 1) / K).double()
            drift = lambda x: 2 * base(x[None], t, obs[b : b + 1])[0] - x / t
            g = g + torch.autograd.functional.jacobian(drift, points[k, b]).T @ g / K
            torch.testing.assert_close(adjoint[k, b], g, rtol=1e-6, atol=1e-8)


def test_adjoint_loss_is_zero_where_the_velocity_is_the_base_moved_against_the_adjoint():
    torch.manual_seed(0)
    K, B, D = 4, 3, 2
    base, points, adjoint, obs = LinearFlow(2, D), torch.randn(K + 1, B, D), torch.randn(K, B, D), torch.randn(B, 2)
    sigma2 = torch.tensor([2 * (1 - k / K + 1 / K) / (k / K + 1 / K) for k in range(K)])[:, None, None]
    right = lambda x, t, s: base(x, t, s) - sigma2 / 2 * adjoint
    assert qam_gym.adjoint_losses(right, base, obs, points, adjoint).sum().item() == pytest.approx(0, abs=1e-8)
    losses = qam_gym.adjoint_losses(base, base, obs, points, adjoint)  # |sigma g|^2 of each step, mean over states
    torch.testing.assert_close(losses, (sigma2 * adjoint.square()).sum((1, 2)) / B)


def test_memoryless_process_carries_the_base_density():
    # started and run with the exact velocity of N(0.4, 0.5^2), its end has that density, whatever it started from
    flow = gaussian_flow(0.4, 0.5)
    torch.manual_seed(0)
    x0 = torch.randn(20_000, 1)
    points = qam_gym.sample_memoryless(flow, flow, torch.zeros(20_000, 1), x0, 64)
    assert points.shape == (65, 20_000, 1)
    assert points[-1].mean().item() == pytest.approx(0.4, abs=0.03)
    assert points[-1].std().item() == pytest.approx(0.5, abs=0.03)
    assert abs(torch.corrcoef(torch.stack([x0[:, 0], points[-1][:, 0]]))[0, 1].item()) < 0.1


def test_qam_tilts_the_base_by_the_critic():
    # base N(0, 0.5^2), Q = -(a - 0.3)^2 / 2 and inverse temperature b: the optimum is Gaussian with precision 4 + b and
    # mean 0.3 b / (4 + b), whose velocity differs from the base's by a linear function of x at each step
    b, K = 4.0, 48
    base = gaussian_flow(0.0, 0.5)

    class Moved(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope, self.shift = torch.nn.Parameter(torch.zeros(K)), torch.nn.Parameter(torch.zeros(K))

        def forward(self, x, t, obs):
            k = (t * K).round().long()
            return base(x, t.expand(x.shape[:-1]), obs) + self.slope[k][..., None] * x + self.shift[k][..., None]

    velocity, fixed = Moved(), lambda x, t, obs: base(x, t.expand(x.shape[:-1]), obs)
    optimizer = torch.optim.Adam(velocity.parameters(), 0.1)
    args = qam_gym.Args(device="cpu", bf16=False, euler_steps=K, inv_temp=b)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 80)
        qam_gym.update_actor(velocity, fixed, Quadratic(torch.tensor([0.3])), optimizer, torch.zeros(512, 1), torch.randn(512, 1), args)
    action = qam_gym.sample(velocity, torch.zeros(20_000, 1), torch.randn(20_000, 1), K)
    assert action.mean().item() == pytest.approx(0.3 * b / (4 + b), abs=0.03)
    assert action.std().item() == pytest.approx(1 / math.sqrt(4 + b), abs=0.03)


def test_qam_critic_target_is_the_mean_less_half_a_standard_deviation_at_clipped_actions():
    args = qam_gym.Args(device="cpu", bf16=False, gamma=0.9, td_lambda=0.0)
    policy = linear_policy(qam_gym)
    shape = (2, 3)
    batch = dict(reward=torch.zeros(shape), terminated=torch.zeros(shape), truncated=torch.zeros(shape), next_obs=5 * torch.randn(2, 3, 11))
    seen = []

    class Recorder(Quadratic):
        def forward(self, obs, action):
            seen.append(action)
            return super().forward(obs, action)

    y = qam_gym.critic_target(policy, Recorder(torch.zeros(6)), batch, 1.0, args)
    (action,) = seen
    assert action.abs().max() == 1
    torch.testing.assert_close(y.flatten(), 0.9 * (-0.5 * action.square().sum(1) - 0.5 - 0.5 * 0.5))


# ------------------------------------------------------------------------------------ best of N
def test_best_of_n_takes_the_candidate_with_the_greatest_smaller_q_and_starts_the_first_one_where_told():
    config = dict(obs_dim=2, action_dim=2, chunk=1, euler_steps=4, width=8, depth=3, time_dim=4)
    critic = dict(width=8, depth=2, layer_norm=True, init="default")
    policy = best_of_n_gym.FlowPolicy(**config, candidates=5, critic=critic)
    obs, x0 = torch.randn(7, 2), torch.zeros(7, 2)
    with torch.no_grad():
        chosen = policy.sample(obs, x0, torch.Generator().manual_seed(3))
        start = torch.randn(7, 5, 2, generator=torch.Generator().manual_seed(3))
        start[:, 0] = 0
        for b in range(7):
            candidates = rldt_gym.sample(policy.velocity, obs[b].expand(5, -1), start[b], 4)
            q = policy.critic(obs[b].expand(5, -1), candidates).min(0).values
            torch.testing.assert_close(chosen[b], candidates[q.argmax()])
        policy.candidates = 1
        torch.testing.assert_close(policy.sample(obs, x0), rldt_gym.sample(policy.velocity, obs, x0, 4))


def test_best_of_n_leaves_the_base_as_it_was(finished, tiny_base):
    from safetensors.torch import load_file

    saved = torch.load(finished("best_of_n")[0] / "checkpoint.pt", weights_only=True)
    for key, value in load_file(tiny_base).items():
        assert torch.equal(saved["policy"][key], value)
