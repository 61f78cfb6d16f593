"""rldt_gym.py: whole runs, interruption, rollouts, the base policy and the command line."""

import dataclasses
import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import DEVICE, ROOT, assert_same, metrics, parse
from fakes import recorded
from safetensors.torch import load_file
from short_runs import checkpoint, kept_rollout

import rldt_gym
from common.flow import FlowPolicy
from demos import dataset
from demos.dataset import Demonstrations
from envs.vector import VectorEnv

NETWORK = dict(chunk=2, euler_steps=4, width=16, depth=3, time_dim=8)
TINY_PRETRAINING = dict(epochs=1, batch=32, lr=1e-3) | NETWORK


# ------------------------------------------------------------------------------------ whole runs
def test_run_keeps_arguments_policies_and_results(finished_run, tiny_base):
    run, result = finished_run
    assert run.name.startswith("Hopper-v4__rldt__3__")
    args = json.loads((run / "args.json").read_text())
    assert {field.name for field in dataclasses.fields(rldt_gym.Args)} <= set(args)
    assert args["seed"] == 3
    base, policy = (load_file(run / f"{name}.safetensors") for name in ("base", "policy"))
    given = load_file(tiny_base)
    for key, value in checkpoint(run)["policy"].items():
        assert torch.equal(policy[key], value.cpu())
        assert torch.equal(base[key], given[key])
        assert torch.equal(policy[key], base[key]) == (not key.startswith("velocity"))
    assert result["task"] == "Hopper-v4"


def test_rewards_are_scaled_by_their_running_magnitude(tiny_args, monkeypatch, only_run):
    used = recorded(monkeypatch, rldt_gym, "critic_target", lambda *args: args[3])
    rldt_gym.main(tiny_args(iterations=5, eval_every=9, buffer_iterations=9))
    magnitudes = []
    for i, row in enumerate(metrics(only_run())[1:5]):
        magnitudes.append(kept_rollout(only_run(), i)["reward"].abs().mean().item())
        weights = [0.99**age for age in reversed(range(i + 1))]
        scale = np.average(magnitudes, weights=weights)
        assert float(row["diagnostics/reward_scale"]) == pytest.approx(scale, rel=1e-6)
        assert used[2 * i : 2 * i + 2] == [float(row["diagnostics/reward_scale"])] * 2


def test_rollouts_without_a_reward_leave_the_scale_as_it_is():
    state = dict(reward_scale=1.0, rewarded=0)
    scales = [rldt_gym.average_magnitude(state, torch.tensor([x, -x])) for x in (0.0, 4.0, 0.0, 4.0)]
    assert scales == pytest.approx([1, 4, 4, 4])


def test_field_is_in_units_of_the_gradient_at_first(tiny_args, monkeypatch, only_run):
    units = recorded(monkeypatch, rldt_gym, "update_actor", lambda *args: args[-1])
    rldt_gym.main(tiny_args(iterations=5, eval_every=9))
    rows = [row for row in metrics(only_run()) if row["diagnostics/grad_q_norm"]]
    first, steps = float(rows[0]["diagnostics/grad_q_norm"]), len(units) // len(rows)
    assert units[:steps] == [0] * steps and len(rows) > 1
    assert units[steps:] == [pytest.approx(first)] * (len(units) - steps)
    assert float(rows[1]["diagnostics/grad_q_norm"]) != pytest.approx(first)


def test_critic_takes_more_steps_and_a_longer_lambda_before_the_actor_starts(tiny_args, monkeypatch):
    lambdas = []
    target = lambda *args: lambdas.append(args[4]) or args[2]["obs"].sum(-1)  # a target for each row
    monkeypatch.setattr(rldt_gym, "critic_target", target)
    steps = recorded(monkeypatch, rldt_gym, "update_critic", lambda *args: (len(lambdas), *args[3:6]))
    rldt_gym.main(tiny_args(iterations=4, eval_every=9, warmup_iterations=2))  # trains three times
    assert lambdas == [0.95] * 4 + [0.5] * 2
    assert [[step[0] for step in steps].count(i + 1) for i in range(6)] == [6] * 4 + [2] * 2
    for _, obs, action, y in steps:
        assert (len(obs), len(action)) == (16, 16)
        torch.testing.assert_close(obs.sum(-1), y)


# ------------------------------------------------------------------------------- two processes
def without(flags, *names):
    return [flag for flag in flags if not flag.startswith(tuple(f"--{name}=" for name in names))]


WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
import rldt_gym
from common import runs
from common.settings import parse_args

parent, pretraining, *flags = sys.argv[1:]
rldt_gym.PRETRAINING["laptop"] = json.loads(pretraining)
collect, rollouts = rldt_gym.collect, []


def main(*flags):
    rldt_gym.main(parse_args(rldt_gym.Args, rldt_gym.PRESETS, "", flags))


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
    first, second = checkpoint(whole), checkpoint(whole, 1)
    for name in "policy", "critic", "target", "actor_optimizer":
        assert str(first[name]) == str(second[name])
    assert not torch.equal(first["rng"], second["rng"])
    assert first["state"]["reward_scale"] == second["state"]["reward_scale"]
    assert not torch.equal(*(kept_rollout(whole, 0, rank)["obs"] for rank in (0, 1)))
    with pytest.raises(SystemExit, match="another processes"):  # a run of two processes is none of one
        rldt_gym.main(parse(rldt_gym, ["--resume", whole]))


# --------------------------------------------------------------------------------- evaluation
def test_evaluation_counts_first_episodes_only(tiny_args, tiny_base):
    args = tiny_args(precision="float32")
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
def test_a_rollout_explores_and_stores_what_was_executed(tiny_args, tiny_base):
    args = tiny_args(precision="float32", rollout_chunks=60, zero_fraction=1.0)
    envs, policy = VectorEnv("Hopper-v4", 4), FlowPolicy.load(tiny_base).to(DEVICE)
    envs.reset(5)
    slot = rldt_gym.Replay(args, policy).next()
    steps, returns = rldt_gym.collect(policy, envs, slot, args)
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
def demonstrations(episodes=12, length=30, seed=0):
    """Actions that are a linear function of the observations."""
    obs = np.random.default_rng(seed).uniform(-1, 1, (episodes * length, 3)).astype(np.float32)
    actions = np.stack([obs[:, 0] - obs[:, 1], 0.5 * obs[:, 2]], 1)
    return Demonstrations(obs, actions, np.arange(1, episodes + 1) * length)


def pretrain(data, **changes):
    settings = dict(epochs=1, batch=64, lr=1e-3, chunk=1, euler_steps=4, width=32, depth=3, time_dim=8)
    return rldt_gym.pretrain(rldt_gym.Args(device="cpu"), data, None, **settings | changes)


def test_a_shipped_policy_acts_as_when_it_was_made():
    policy = FlowPolicy.load(dataset.DEMOS / "Hopper-v4" / "base.safetensors")
    args = rldt_gym.Args(device="cpu", precision="float32")
    found = rldt_gym.evaluate(policy, args, 5, 0)["eval_return"]  # one episode deviates by 87
    assert found == pytest.approx(policy.info["return_zero"], abs=120)


def test_pretraining_chunks_are_consecutive_and_stay_inside_an_episode(monkeypatch):
    seen = recorded(monkeypatch, rldt_gym, "flow_matching_loss", lambda *args: args[1:])
    steps = np.arange(40, dtype=np.float32)  # episodes of 3, 17 and 20 steps
    ends = np.array([3, 20, 40])
    actions = np.stack([steps, np.digitize(steps, ends)], 1).astype(np.float32)  # (step, episode)
    data = Demonstrations(steps[:, None], actions, ends)
    assert pretrain(data, chunk=4, epochs=60, batch=32).info == dict(env_id="Hopper-v4")
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


def test_base_policy_of_another_task_stops(tiny_args):
    with pytest.raises(SystemExit, match=r"base\.safetensors: its env_id is Hopper-v4, not HalfChee"):
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
