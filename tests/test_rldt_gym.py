"""rldt_gym.py: whole runs, interruption, rollouts, the base policy and the command line."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import DEVICE, ROOT, assert_same, metrics, parse
from fakes import checkpoint
from safetensors.torch import load_file

import rldt_gym
from common import runs
from common.flow import FlowPolicy
from demos import dataset
from demos.dataset import Demonstrations
from envs.vector import VectorEnv

NETWORK = dict(chunk=2, euler_steps=4, width=16, depth=3, time_dim=8)
TINY_PRETRAINING = dict(epochs=1, batch=32, lr=1e-3) | NETWORK
ENDS = "return", "return_std", "return_sampled", "return_sampled_std"


def resume(run):
    return rldt_gym.main(parse(rldt_gym, ["--resume", run]))


def recorded(monkeypatch, name, of):
    """What `of(*args)` was at each call of rldt_gym's function."""
    calls, function = [], getattr(rldt_gym, name)

    def record(*args):
        calls.append(of(*args))
        return function(*args)

    monkeypatch.setattr(rldt_gym, name, record)
    return calls


# ------------------------------------------------------------------------------------ whole runs
def test_run_keeps_arguments_policies_and_results(finished_run, tiny_base):
    run, result = finished_run
    assert run.name.startswith("Hopper-v4__rldt__3__")
    args, rows = json.loads((run / "args.json").read_text()), metrics(run)
    assert set(args) == {field.name for field in dataclasses.fields(rldt_gym.Args)}
    assert args["seed"] == 3
    base, policy, given = (
        load_file(path) for path in (run / "base.safetensors", run / "policy.safetensors", tiny_base)
    )
    for key, value in checkpoint(run)["policy"].items():
        assert torch.equal(policy[key], value.cpu())
        assert torch.equal(base[key], given[key])
        assert torch.equal(policy[key], base[key]) == (not key.startswith("velocity"))
    for name, row in ("base", rows[0]), ("final", rows[-1]):
        for end in ENDS:
            assert result[f"{name}_{end}"] == float(row[f"eval_{end}"])
    assert result["best_return"] >= result["final_return"]
    assert (result["task"], result["env_steps"]) == ("Hopper-v4", int(rows[-1]["env_steps"]))


def test_best_policy_is_measured_again_on_other_episodes(scripted_evaluations, tiny_args):
    scores = [7.0, 9.0, 1.0, 5.0]  # base, iteration 3, final, measured again
    episodes, policies = scripted_evaluations(rldt_gym, scores)
    result = rldt_gym.main(tiny_args(eval_every=3))
    assert [result[f"{name}_return"] for name in ("base", "final", "best")] == [7.0, 1.0, 5.0]
    assert [len(some) for some in episodes] == [6, 4, 6, 6]
    assert not any(episodes[-1] & others for others in episodes[:-1])
    for key, value in policies[1].state_dict().items():
        assert torch.equal(policies[-1].state_dict()[key], value)


def test_iterations_evaluate_and_train_in_turn(finished_run):
    rows = metrics(finished_run[0])
    assert [int(row["iteration"]) for row in rows] == list(range(7))
    for i, row in enumerate(rows):
        assert (row["eval_return"] != "") == (i in (0, 4, 6))
        assert (row["losses/critic"] != "") == (i in (1, 2, 3, 5))
        assert (row["losses/transport"] != "") == (i in (2, 3, 5))  # the actor waits for one
    steps = np.diff([int(row["env_steps"]) for row in rows])
    assert (steps[[3, 5]] == 0).all()  # evaluations do not count
    trained = steps[[0, 1, 2, 4]]
    assert ((trained > 4 * 12) & (trained <= 4 * 12 * 2)).all()  # envs, chunks, at most two steps each
    distances = [float(rows[i]["diagnostics/base_distance"]) for i in (1, 2, 3, 5)]
    assert distances[0] == 0 and distances == sorted({*distances})


@pytest.mark.parametrize("changes", [
    dict(td_lambda=0.0, critic_layer_norm=False, exploration_steps=0, transport_loss="literal"),
    dict(kernel="delta", reference_every=0, bf16=False, n_particles=1, buffer_iterations=1),
    dict(seed=4),
])  # fmt: skip
def test_run_with_other_choices_moves_its_policy_elsewhere(tiny_args, only_run, finished_run, changes):
    rldt_gym.main(tiny_args(iterations=3, **changes))
    moved = metrics(only_run())[2]["diagnostics/base_distance"]
    assert float(moved) > 0 and moved != metrics(finished_run[0])[2]["diagnostics/base_distance"]


@pytest.mark.parametrize("every, follows", [(0, False), (1, True), (2, True), (3, False)])
def test_reference_follows_every_nth_iteration(tiny_args, only_run, every, follows):
    rldt_gym.main(tiny_args(iterations=3, eval_every=9, reference_every=every))  # trains twice
    saved = checkpoint(only_run())
    expected = saved["policy"] if follows else load_file(only_run() / "base.safetensors")
    for key, value in saved["reference"].items():
        assert torch.equal(value.cpu(), expected[key].cpu()), key


def test_training_episodes_are_never_those_of_an_evaluation(tiny_args, monkeypatch):
    seeds, reset = [], VectorEnv.reset

    def noted(envs, first):
        seeds.append({*range(first, first + envs.num_envs)})
        reset(envs, first)

    monkeypatch.setattr(VectorEnv, "reset", noted)
    rldt_gym.main(tiny_args(eval_every=2))
    evaluations, training = seeds[::2], seeds[1::2]  # training goes on from new seeds after each one
    assert len(training) == 4 and len(set.union(*training)) == 4 * 4
    assert not set.union(*training) & set.union(*evaluations)


def test_rewards_are_scaled_by_their_running_magnitude(tiny_args, monkeypatch, only_run):
    used = recorded(monkeypatch, "critic_target", lambda *args: args[3])
    rldt_gym.main(tiny_args(iterations=5, eval_every=9, buffer_iterations=9))
    rows, scale = metrics(only_run())[1:5], None
    for i, row in enumerate(rows):
        magnitude = checkpoint(only_run(), f"checkpoint.replay{i}")["reward"].abs().mean().item()
        scale = magnitude if scale is None else 0.99 * scale + 0.01 * magnitude
        assert float(row["diagnostics/reward_scale"]) == pytest.approx(scale, rel=1e-6)
        assert used[2 * i : 2 * i + 2] == [float(row["diagnostics/reward_scale"])] * 2


def test_critic_takes_more_steps_and_a_longer_lambda_before_the_actor_starts(tiny_args, monkeypatch):
    lambdas = []
    target = lambda *args: lambdas.append(args[4]) or args[2]["obs"].sum(-1)  # a target for each row
    monkeypatch.setattr(rldt_gym, "critic_target", target)
    steps = recorded(monkeypatch, "update_critic", lambda *args: (len(lambdas), *args[3:6]))
    rldt_gym.main(tiny_args(iterations=4, eval_every=9, warmup_iterations=2))  # trains three times
    assert lambdas == [0.95] * 4 + [0.5] * 2
    assert [[step[0] for step in steps].count(i + 1) for i in range(6)] == [6] * 4 + [2] * 2
    for _, obs, action, y in steps:
        assert (len(obs), len(action)) == (16, 16)
        torch.testing.assert_close(obs.sum(-1), y)


def test_actor_steps_grow_in_a_warm_up_and_shrink_with_what_is_spent(tiny_args, monkeypatch):
    rates = recorded(monkeypatch, "update_actor", lambda *args: args[3].param_groups[0]["lr"])
    rldt_gym.main(tiny_args(iterations=5, eval_every=9, actor_steps=10, actor_lr=1e-3, actor_lr_end=0.2))
    expected, step = [], 0
    for spent in 2 / 5, 3 / 5, 4 / 5:
        for _ in range(2 * 10):
            step += 1
            expected.append(1e-3 * (1 - 0.8 * spent) * min(1, step / 32))
    assert rates == pytest.approx(expected)


def test_without_iterations_the_task_or_the_wall_budget_ends_a_run(tiny_args, monkeypatch):
    taken = []
    monkeypatch.setattr(rldt_gym, "Run", lambda args, name: taken.append(args.iterations) or 1 / 0)
    for changes in {}, dict(env_id="Walker2d-v4"), dict(wall_budget_s=9.0):
        with pytest.raises(ZeroDivisionError):
            rldt_gym.main(tiny_args(**{"iterations": 0, **changes}))
    assert taken == [25, 85, 0]


# ---------------------------------------------------------------------- interrupted and continued
KILLED = """
import os, signal, sys
import rldt_gym
from common.flow import FlowPolicy

MOMENTS = dict(
    base=(FlowPolicy, "save", 1), critic=(rldt_gym, "update_critic", 15),
    actor=(rldt_gym, "update_actor", 3),
)


def kill_at(owner, name, call):
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


for moment, where in MOMENTS.items():
    pid = os.fork()
    if pid == 0:
        kill_at(*where)
        flags = [*sys.argv[2:], f"--runs={sys.argv[1]}/{moment}"]
        rldt_gym.main(rldt_gym.parse_args(rldt_gym.Args, rldt_gym.PRESETS, "", flags))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, moment
"""


@pytest.fixture(scope="module")
def killed_runs(tiny_flags, tmp_path_factory):
    """The directory of a tiny run for each moment at which one was killed."""
    parent = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, str(parent), *tiny_flags]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return {folder.name: next(folder.iterdir()) for folder in parent.iterdir()}


@pytest.mark.parametrize("moment, saved", [("base", None), ("critic", 2), ("actor", 3)])
def test_run_killed_and_resumed_equals_one_never_killed(killed_runs, finished_run, moment, saved):
    run = killed_runs[moment]
    if moment != "base":  # the run has kept a copy of its base policy by then
        stored = json.loads((run / "args.json").read_text())
        (run / "args.json").write_text(json.dumps(stored | {"base": "gone.safetensors"}))
    assert not (run / "result.json").exists()
    assert (run / "checkpoint.pt").exists() == (saved is not None)
    if saved is not None:
        assert checkpoint(run)["progress"]["iteration"] == saved
    result = resume(run)
    assert_same(run, finished_run[0])
    for key in finished_run[1].keys() - {"date", "wall_s", "args", "commit"}:
        assert result[key] == finished_run[1][key], key
    for name in "critic", "target", "reference", "actor_optimizer", "critic_optimizer", "envs", "state":
        assert str(checkpoint(run)[name]) == str(checkpoint(finished_run[0])[name])


def without(flags, *names):
    return [flag for flag in flags if not flag.startswith(tuple(f"--{name}=" for name in names))]


WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
import rldt_gym
from common import runs

parent, pretraining, *flags = sys.argv[1:]
rldt_gym.PRETRAINING["laptop"] = json.loads(pretraining)
collect, rollouts = rldt_gym.collect, []


def main(*flags):
    rldt_gym.main(rldt_gym.parse_args(rldt_gym.Args, rldt_gym.PRESETS, "", flags))


def pressed(*args):
    rollouts.append(1)
    if len(rollouts) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return collect(*args)


main(*flags, f"--runs={parent}/whole")
rank, x = dist.get_rank(), torch.nn.Parameter(torch.zeros(2, 3))
x.grad = torch.arange(6.0).view(2, 3) * (1 + 2 * rank)
runs.average_gradients([x])
assert runs.average(torch.tensor([1.0, 2.0]) * (1 + 2 * rank)).tolist() == [2, 4]
assert x.grad.tolist() == [[0, 2, 4], [6, 8, 10]]
rldt_gym.collect = pressed
try:
    main(*flags, f"--runs={parent}/parts")
except SystemExit as stop:
    print(stop)
rldt_gym.collect = collect
(run,) = Path(parent, "parts").iterdir()
main("--resume", str(run))
"""


def test_two_processes_train_one_policy_and_go_on_after_ctrl_c(tiny_flags, tmp_path, only_run):
    data = dataset.make(dataset.Args(env_id="Hopper-v4", steps=400, num_envs=8, out=tmp_path / "a.hdf5"))
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [tmp_path / "worker.py", tmp_path / "runs", json.dumps(TINY_PRETRAINING)]
    command += [*without(tiny_flags, "base", "device"), "--device=cpu"]
    command += [f"--dataset={data}"]  # the first process pretrains
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Continue with --resume") == 2
    whole, parts = only_run(tmp_path / "runs" / "whole"), only_run(tmp_path / "runs" / "parts")
    assert_same(parts, whole)
    rows = metrics(whole)
    assert float(rows[5]["diagnostics/base_distance"]) > 0
    assert 2 * 4 * 12 * 4 < int(rows[-1]["env_steps"]) <= 2 * 4 * 12 * 4 * 2
    first, second = checkpoint(whole), checkpoint(whole, "checkpoint1.pt")
    for name in "policy", "critic", "target", "actor_optimizer":
        assert str(first[name]) == str(second[name])
    assert not torch.equal(first["rng"], second["rng"])
    assert first["state"]["reward_scale"] == second["state"]["reward_scale"]
    slots = [checkpoint(whole, f"checkpoint{rank}.replay0")["obs"] for rank in ("", "1")]
    assert not torch.equal(*slots)
    with pytest.raises(SystemExit, match="other settings"):  # a run of two processes is none of one
        resume(whole)


# --------------------------------------------------------------------------------- evaluation
def test_evaluating_a_run_gives_its_final_numbers_to_the_last_digit(finished_run, capsys):
    run, result = finished_run
    scores = rldt_gym.main(parse(rldt_gym, ["--evaluate", run, f"--device={DEVICE}"]))
    assert scores == {f"eval_{end}": result[f"final_{end}"] for end in ENDS}
    assert str(scores["eval_return"]) in capsys.readouterr().out
    assert {path.name for path in run.parent.iterdir()} == {run.name}


def test_evaluation_counts_first_episodes_only(tiny_args, tiny_base):
    args = tiny_args(bf16=False)
    policy, envs = FlowPolicy.load(tiny_base).to(DEVICE), VectorEnv("Hopper-v4", 20)
    scores = rldt_gym.evaluate(policy, args, 10, 21)
    envs.reset(21)
    total, alive = np.zeros(20), np.ones(20, bool)
    generator = torch.Generator(DEVICE).manual_seed(21)
    while alive.any():
        x0 = torch.randn(20, 6, device=DEVICE, generator=generator)
        x0[:10] = 0
        step = envs.step(policy.to_env(policy.sample(policy.normalize(envs.obs), x0)))
        total += step.reward * alive
        alive &= ~(step.terminated | step.truncated)
    for name, values in ("eval_return", total[:10]), ("eval_return_sampled", total[10:]):
        assert scores[name] == pytest.approx(values.mean(), rel=1e-3)
        assert scores[f"{name}_std"] == pytest.approx(values.std(), rel=1e-2)


# ----------------------------------------------------------------------------------- rollouts
def test_exploration_noise_is_the_distance_to_the_expected_target_of_a_late_step():
    K, D, N = 8, 3, 200_000
    path = torch.randn(K + 1, D, dtype=torch.float64)
    trajectory = path[:, None].expand(-1, N, -1)
    for steps in 2, 5:
        noise = rldt_gym.explore(trajectory, rldt_gym.Args(exploration_steps=steps)) - path[-1]
        variance = 0.0
        for k in range(K - steps, K):
            a_dagger = path[k] + (1 - k / K) * K * (path[k + 1] - path[k])
            variance += (path[-1] - a_dagger).square().sum().item() / steps
        noise /= math.sqrt(variance)
        assert noise.mean(0).abs().max() < 0.01
        torch.testing.assert_close(noise.T @ noise / N, torch.eye(D).double(), rtol=0, atol=0.03)
    noise = rldt_gym.explore(trajectory, rldt_gym.Args(exploration_steps=2)) - path[-1]
    still = (noise.norm(dim=-1) < 1e-9).double().mean()  # the last step's expected target is the action
    assert still.item() == pytest.approx(0.5, abs=0.01)
    for steps in 0, 1:
        action = rldt_gym.explore(trajectory, rldt_gym.Args(exploration_steps=steps))
        torch.testing.assert_close(action, trajectory[-1])


def rollout(tiny_args, tiny_base, **changes):
    args = tiny_args(bf16=False, **changes)
    envs = rldt_gym.make_envs(args, args.num_envs)
    envs.reset(5)
    policy, replay = FlowPolicy.load(tiny_base).to(DEVICE), rldt_gym.Replay(args, 11, 6)
    steps, returns = rldt_gym.collect(policy, envs, replay.next(), args)
    return policy, envs, replay.newest(), steps, returns


@pytest.mark.parametrize("fraction, count", [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_a_share_of_the_environments_acts_from_zero(tiny_args, tiny_base, fraction, count):
    policy, _, slot, *_ = rollout(tiny_args, tiny_base, exploration_steps=0, zero_fraction=fraction)
    zeros = policy.sample(slot["obs"], torch.zeros(12, 4, 6, device=DEVICE))
    same = (slot["action"] - zeros).abs().amax((0, 2)) < 1e-5
    assert same.tolist() == [True] * count + [False] * (4 - count)


def test_a_rollout_explores_and_stores_what_was_executed(tiny_args, tiny_base):
    changes = dict(rollout_chunks=60, zero_fraction=1.0)
    policy, envs, slot, steps, returns = rollout(tiny_args, tiny_base, **changes)
    zeros = policy.sample(slot["obs"], torch.zeros(60, 4, 6, device=DEVICE))
    assert (slot["action"] != zeros).any(-1).float().mean() > 0.3  # half of the noise has length 0
    again = VectorEnv("Hopper-v4", 4)
    again.reset(5)
    total, count, ended = np.zeros(4), 0, []
    for t in range(60):
        torch.testing.assert_close(slot["obs"][t], policy.normalize(again.obs))
        step = again.step(policy.to_env(slot["action"][t]))
        torch.testing.assert_close(slot["next_obs"][t], policy.normalize(step.next_obs))
        for name in "reward", "terminated", "truncated":
            np.testing.assert_allclose(slot[name][t].cpu(), getattr(step, name), rtol=1e-6)
        total += step.reward
        count += step.length.sum()
        done = step.terminated | step.truncated
        ended += total[done].tolist()
        total[done] = 0
    assert (steps, returns) == (count, ended)
    assert len(ended) >= 4
    np.testing.assert_array_equal(envs.obs, again.obs)


# -------------------------------------------------------------------------------- base policy
def demonstrations(episodes=12, length=30):
    """Actions that are a linear function of the observations."""
    obs = np.random.default_rng(0).uniform(-1, 1, (episodes * length, 3)).astype(np.float32)
    actions = np.stack([obs[:, 0] - obs[:, 1], 0.5 * obs[:, 2]], 1)
    return Demonstrations(obs, actions, np.arange(1, episodes + 1) * length)


def pretrain(data, **changes):
    settings = dict(epochs=1, batch=64, lr=1e-3, chunk=1, euler_steps=4, width=32, depth=3, time_dim=8)
    return rldt_gym.pretrain(rldt_gym.Args(device="cpu", bf16=False), data, None, **settings | changes)


def test_pretraining_learns_the_demonstrators_actions():
    data, loss, error = demonstrations(), [], []
    for epochs in 1, 150:
        torch.manual_seed(0)
        policy = pretrain(data, epochs=epochs)
        action = policy.to_env(policy.sample(policy.normalize(data.observations), torch.zeros(360, 2)))
        loss.append(policy.info["validation_loss"])
        error.append(np.abs(action[:, 0] - data.actions).mean())
    assert loss[1] < 0.5 * loss[0]
    assert error[1] < 0.25 * error[0]


def test_pretraining_chunks_are_consecutive_and_stay_inside_an_episode(monkeypatch):
    seen = recorded(monkeypatch, "flow_matching_loss", lambda velocity, action, obs: (action, obs))
    steps = np.arange(40, dtype=np.float32)  # episodes of 3, 17 and 20 steps
    ends = np.array([3, 20, 40])
    actions = np.stack([steps, np.digitize(steps, ends)], 1).astype(np.float32)  # (step, episode)
    pretrain(Demonstrations(steps[:, None], actions, ends), chunk=4, epochs=60, batch=32)
    chunk = torch.cat([a for a, _ in seen]).view(-1, 4, 2)
    obs = torch.cat([o for _, o in seen])
    step, episode = ((chunk + 1) / 2 * torch.tensor([39.0, 2])).round().unbind(-1)
    assert (step[:, 1:] - step[:, :-1] == 1).all()
    assert (episode == episode[:, :1]).all()
    assert ((obs[:, 0] + 1) / 2 * 39).round().tolist() == step[:, 0].tolist()
    assert set(step[:, 0].int().tolist()) == {*range(3, 17), *range(20, 37)}  # but those too late


def test_demonstrations_of_fewer_than_20_chunks_stop():
    with pytest.raises(SystemExit, match="19 chunks of 2 steps are too few"):
        pretrain(demonstrations(episodes=1, length=20), chunk=2)
    pretrain(demonstrations(episodes=1, length=20), batch=8)


@pytest.mark.parametrize("changes, expected", [
    ({}, "shipped"), (dict(pretrain=True), "made"), (dict(dataset="a"), "made"), (dict(base=1), "given"),
    (dict(base=1, pretrain=True), "given"), (dict(env_id="Other-v4"), "made"),
])  # fmt: skip
def test_base_policy_is_given_shipped_or_made(tiny_args, monkeypatch, tmp_path, changes, expected):
    def policy(name):
        result = FlowPolicy(11, 3, chunk=2, euler_steps=4, width=8, time_dim=4)
        result.info = dict(name=name)
        return result

    monkeypatch.setattr(dataset, "DEMOS", tmp_path)
    monkeypatch.setattr(dataset, "get", lambda *_: None)
    monkeypatch.setattr(rldt_gym, "pretrain", lambda *_, **__: policy("made"))
    policy("shipped").save(tmp_path / "Hopper-v4" / "base.safetensors", name="shipped")
    policy("given").save(tmp_path / "given.safetensors", name="given")
    if "base" in changes:
        changes = changes | dict(base=tmp_path / "given.safetensors")
    args = tiny_args(**{"base": None, **changes})
    run = runs.Run(args, "test")
    assert rldt_gym.get_base(args, run, VectorEnv("Hopper-v4", 1)).info["name"] == expected
    assert FlowPolicy.load(run.path / "base.safetensors").info["name"] == expected


def test_base_policy_of_another_task_stops(tiny_args):
    with pytest.raises(SystemExit, match=r"base\.safetensors: .* other sizes .* HalfCheetah-v4"):
        rldt_gym.main(tiny_args(env_id="HalfCheetah-v4"))


def test_own_environment_and_demonstrations(tmp_path, monkeypatch, tiny_flags, only_run, d4rl_arrays):
    monkeypatch.setitem(rldt_gym.PRETRAINING, "laptop", TINY_PRETRAINING)
    d4rl_arrays["observations"] = d4rl_arrays["observations"][:, :2]
    with h5py.File(tmp_path / "own.hdf5", "w") as file:
        for key, value in d4rl_arrays.items():
            file[key] = np.tile(value, (4, *[1] * (value.ndim - 1)))
    task = "test_baselines:Track-v0"  # which importing that module registers
    flags = f"--env-id={task}", f"--dataset={tmp_path / 'own.hdf5'}", "--iterations=3"
    flags = *without(tiny_flags, "base", "env-id"), *flags, f"--runs={tmp_path / 'runs'}"
    result = rldt_gym.main(parse(rldt_gym, flags))
    base = FlowPolicy.load(only_run() / "base.safetensors")
    assert (base.obs_dim, base.action_dim, base.chunk) == (2, 2, 2)
    np.testing.assert_array_equal(base.obs_min, d4rl_arrays["observations"].min(0))
    assert result["task"] == task
    assert result["env_steps"] == 2 * 4 * 12 * 2  # no episode ends inside a chunk
    assert -1000 < result["final_return"] < 0
    assert float(metrics(only_run())[2]["diagnostics/base_distance"]) > 0


# ------------------------------------------------------------------------------- command line
def test_every_number_has_bounds():
    for field in dataclasses.fields(rldt_gym.Args):
        if type(field.default) in (int, float):
            with pytest.raises(SystemExit, match=f"--{field.name.replace('_', '-')} -1"):
                parse(rldt_gym, [f"--{field.name.replace('_', '-')}=-1"])


def test_settings_are_few_and_help_shows_all_of_them_on_two_screens(capsys):
    fields = dataclasses.fields(rldt_gym.Args)
    assert len(fields) <= 46
    with pytest.raises(SystemExit):
        parse(rldt_gym, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 100
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert flags == [f"--{field.name.replace('_', '-')}" for field in fields]
    sections = {above for above, line in itertools.pairwise(lines) if line.startswith("  --")}
    assert {"the run", "base policy", "critic", "actor"} <= sections
