import csv
import dataclasses
import itertools
import json
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DEVICE, ROOT, WALL_COLUMNS
from pickle_bomb import LOADED, Bomb
from safetensors import safe_open
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import demos.train_demonstrator
import pretrain_fm
import rldt_furniture
import rldt_gym
import rldt_robomimic
from demos import dataset


def metrics(run):
    """The rows of metrics.csv without the columns of wall time."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return [{key: value for key, value in row.items() if key not in WALL_COLUMNS} for row in rows]


def saved_state(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["state"]


def resume(run):
    return rldt_gym.main(rldt_gym.parse_args(["--resume", str(run)]))


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished_run[0], tmp_path / "copy")


# ------------------------------------------------------------------------------------ whole runs
def test_run_writes_every_file(finished_run):
    run, _ = finished_run
    assert not list(run.glob("*.partial"))
    args = json.loads((run / "args.json").read_text())
    assert set(args) == {field.name for field in dataclasses.fields(rldt_gym.Args)}
    assert args["seed"] == 3
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    policy = rldt_gym.load_policy(run / "policy.pt", "cpu")
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["state"]["iteration"] == 7
    for key, value in policy.state_dict().items():
        assert torch.equal(value, checkpoint["policy"][key].cpu())
    assert run.name.startswith("Hopper-v4__rldt__3__")


def test_result_agrees_with_the_metrics(finished_run):
    run, returned = finished_run
    result, rows = json.loads((run / "result.json").read_text()), metrics(run)
    assert result == json.loads(json.dumps(returned))
    assert result["task"] == "Hopper-v4"
    assert result["base_return"] == pytest.approx(float(rows[0]["eval_return"]))
    assert result["base_return_sampled"] == pytest.approx(float(rows[0]["eval_return_sampled"]))
    assert result["final_return"] == pytest.approx(float(rows[-1]["eval_return"]))
    assert result["final_return_sampled_std"] == pytest.approx(float(rows[-1]["eval_return_sampled_std"]))
    assert result["best_return"] >= result["final_return"]
    assert result["env_steps"] == int(rows[-1]["env_steps"])
    assert {"torch", "numpy", "gymnasium", "mujoco", "python"} <= set(result["versions"])


def test_best_policy_is_measured_again_on_episodes_that_did_not_choose_it(scripted_evaluations, tiny_flags, tmp_path):
    episodes, policies = scripted_evaluations(rldt_gym, [7.0, 9.0, 1.0, 5.0])  # base, iteration 3, final, measured again
    result = rldt_gym.main(rldt_gym.parse_args([*tiny_flags, f"--runs={tmp_path}", "--eval-every=3"]))
    assert (result["base_return"], result["final_return"], result["best_return"]) == (7.0, 1.0, 5.0)
    assert not any(episodes[-1] & others for others in episodes[:-1])
    for key, value in policies[1].state_dict().items():
        assert torch.equal(policies[-1].state_dict()[key], value)


def test_metrics_have_a_row_per_iteration_and_train_and_evaluation_columns_in_turn(finished_run):
    rows = metrics(finished_run[0])
    assert [int(row["iteration"]) for row in rows] == list(range(7))
    for i, row in enumerate(rows):
        assert (row["eval_return"] != "") == (i in (0, 4, 6))
        assert (row["losses/critic"] != "") == (i in (1, 2, 3, 5))
        assert (row["losses/transport"] != "") == (i in (2, 3, 5))  # the actor waits for one training iteration
    steps = np.diff([int(row["env_steps"]) for row in rows])
    assert (steps[[3, 5]] == 0).all()  # evaluations do not count
    trained = steps[[0, 1, 2, 4]]
    assert ((trained > 4 * 12) & (trained <= 4 * 12 * 2)).all()  # envs, chunks, at most two steps each
    assert float(rows[1]["diagnostics/base_distance"]) == 0
    assert float(rows[5]["diagnostics/base_distance"]) > 0


def test_tensorboard_holds_the_scalars_of_the_metrics(finished_run):
    run, _ = finished_run
    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {
        "charts/eval_return",
        "charts/eval_return_sampled",
        "losses/critic",
        "losses/transport",
        "diagnostics/q",
    } <= set(tags)
    expected = [(int(r["env_steps"]), float(r["losses/critic"])) for r in metrics(run) if r["losses/critic"]]
    assert [(e.step, e.value) for e in events.Scalars("losses/critic")] == [(s, pytest.approx(v)) for s, v in expected]


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(finished_run, tiny_args, tmp_path):
    runs = []
    for seed in (3, 4):
        rldt_gym.main(tiny_args(seed=seed, runs=tmp_path / str(seed)))
        runs += list((tmp_path / str(seed)).iterdir())
    assert metrics(runs[0]) == metrics(finished_run[0])
    assert metrics(runs[1]) != metrics(finished_run[0])


@pytest.mark.parametrize("changes", [
    dict(backend="gymnasium", td_lambda=0.0, critic_layer_norm=False, critic_init="normal", exploration_steps=0),
    dict(transport_loss="authors", kernel="delta", reference="pretrained", bf16=False, n_particles=1),
])  # fmt: skip
def test_run_with_the_other_choices_ends_with_finite_numbers(tiny_args, only_run, changes):
    result = rldt_gym.main(tiny_args(iterations=3, **changes))
    assert np.isfinite([result["final_return"], result["final_return_sampled"]]).all()
    assert float(metrics(only_run())[2]["diagnostics/base_distance"]) > 0


@pytest.mark.parametrize("reference, moves", [("previous", True), ("pretrained", False)])
def test_reference_follows_the_actor_only_where_it_is_the_previous_policy(tiny_args, only_run, reference, moves):
    rldt_gym.main(tiny_args(iterations=3, reference=reference))
    checkpoint = torch.load(only_run() / "checkpoint.pt", weights_only=True)
    actor = {k.removeprefix("velocity."): v for k, v in checkpoint["policy"].items() if k.startswith("velocity.")}
    same = all(torch.equal(value, actor[key]) for key, value in checkpoint["reference"].items())
    assert same == moves


# ---------------------------------------------------------------------- interrupted and continued
KILLED = """
import os, signal, sys
import torch
import rldt_gym

saves, save, update = 0, torch.save, rldt_gym.update_critic

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(saved, path):
    global saves
    saves += 1
    if sys.argv[1] == "saving" and saves == 3:
        path.write_bytes(b"half a file")
        kill()
    save(saved, path)

def interrupted(*args):
    if sys.argv[1] == "training" and saves == 3:
        kill()
    return update(*args)

torch.save, rldt_gym.update_critic = counted, interrupted
rldt_gym.main(rldt_gym.parse_args(sys.argv[2:]))
"""


@pytest.mark.parametrize("when, saved", [("training", 3), ("saving", 2)])
def test_run_killed_and_resumed_gives_the_metrics_of_one_never_killed(
    finished_run, tiny_flags, tmp_path, only_run, when, saved
):
    command = [sys.executable, "-c", KILLED, when, *tiny_flags, f"--runs={tmp_path / 'runs'}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    run = only_run()
    assert saved_state(run)["iteration"] == saved
    assert not (run / "result.json").exists()
    result = resume(run)
    assert metrics(run) == metrics(finished_run[0])
    for key in ("base_return", "final_return", "best_return", "best_return_sampled", "env_steps"):
        assert result[key] == finished_run[1][key]
    for name in ("policy", "critic", "target", "reference"):
        expected = torch.load(finished_run[0] / "checkpoint.pt", weights_only=True)[name]
        for key, value in torch.load(run / "checkpoint.pt", weights_only=True)[name].items():
            assert torch.equal(value, expected[key]), (name, key)


def test_ctrl_c_finishes_the_iteration_saves_and_names_the_command_that_continues(
    monkeypatch, finished_run, tiny_args, only_run
):
    update, calls = rldt_gym.update_critic, []

    def pressed(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(rldt_gym, "update_critic", pressed)
    with pytest.raises(SystemExit) as stop:
        rldt_gym.main(tiny_args())
    run = only_run()
    assert str(stop.value).endswith(f"Continue with: python rldt_gym.py --resume {run}")
    assert "Stopped after iteration 1, saved" in str(stop.value)
    assert len(calls) == 2 * 2  # both rounds of the first training iteration
    assert saved_state(run)["iteration"] == 2
    argv = str(stop.value).split("rldt_gym.py ")[1].split()
    rldt_gym.main(rldt_gym.parse_args(argv))
    assert metrics(run) == metrics(finished_run[0])
    events = EventAccumulator(str(run))  # those of both processes
    events.Reload()
    assert len(events.Scalars("losses/critic")) == 4


def test_second_ctrl_c_stops_at_once(monkeypatch, tiny_args, only_run):
    calls = []

    def pressed(*args):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    monkeypatch.setattr(rldt_gym, "update_critic", pressed)
    with pytest.raises(KeyboardInterrupt):
        rldt_gym.main(tiny_args())
    assert len(calls) == 2
    assert saved_state(only_run())["iteration"] == 1


def test_nan_in_a_loss_stops_with_its_name_and_keeps_the_last_checkpoint(
    monkeypatch, finished_run, tiny_args, only_run
):
    update, calls = rldt_gym.update_critic, []

    def broken(*args):
        calls.append(1)
        nan = {"losses/critic": torch.tensor(torch.nan)} if len(calls) == 6 else {}
        return update(*args) | nan

    with monkeypatch.context() as patch:
        patch.setattr(rldt_gym, "update_critic", broken)
        with pytest.raises(FloatingPointError, match=r"losses/critic became nan in iteration 2.*checkpoint\.pt"):
            rldt_gym.main(tiny_args())
    run = only_run()
    assert saved_state(run)["iteration"] == 2
    assert len(metrics(run)) == 2
    resume(run)
    assert metrics(run) == metrics(finished_run[0])


def test_full_disk_stops_with_the_file_and_keeps_the_old_one(monkeypatch, finished_run, tiny_args, only_run):
    save, calls = torch.save, []

    def full(saved, path):
        calls.append(1)
        if len(calls) == 3:
            path.write_bytes(b"as much as fits")
            raise OSError(28, "No space left on device")
        save(saved, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(SystemExit, match=r"Cannot write .*checkpoint\.pt.*No space left.*disk full"):
            rldt_gym.main(tiny_args())
    run = only_run()
    assert saved_state(run)["iteration"] == 2
    assert not list(run.glob("*.partial"))
    resume(run)
    assert metrics(run) == metrics(finished_run[0])


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("PytorchStreamWriter failed writing file")])
def test_write_atomically_keeps_the_old_file_when_the_new_one_fails(tmp_path, error):
    path = tmp_path / "file"
    rldt_gym.write_atomically(path, lambda p: p.write_text("old"))

    def fail(partial):
        partial.write_text("half")
        raise error

    with pytest.raises(SystemExit, match="The last good file is kept"):
        rldt_gym.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"garbage", "half", "pickle"])
@pytest.mark.parametrize("name, flag", [("checkpoint.pt", "--resume"), ("policy.pt", "--evaluate")])
def test_damaged_file_stops_with_its_name(copied_run, content, name, flag):
    path = copied_run / name
    if content == "half":
        content = path.read_bytes()[: path.stat().st_size // 2]
    elif content == "pickle":
        content = pickle.dumps(Bomb())
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"{name}: cannot be loaded"):
        rldt_gym.main(rldt_gym.parse_args([flag, str(copied_run)]))
    assert LOADED == []


def test_missing_checkpoint_stops_with_its_name(copied_run):
    (copied_run / "checkpoint.pt").unlink()
    with pytest.raises(SystemExit, match=r"checkpoint\.pt: cannot be loaded"):
        resume(copied_run)


def test_resuming_what_is_no_run_directory_says_so(tmp_path):
    with pytest.raises(SystemExit, match="not a run directory"):
        resume(tmp_path)


def test_wall_budget_ends_the_run_with_its_final_evaluation(tiny_args, only_run):
    result = rldt_gym.main(tiny_args(iterations=0, wall_budget_s=1e-6))  # spent after the first evaluation
    rows = metrics(only_run())
    assert [int(row["iteration"]) for row in rows] == [0, 1]
    assert rows[-1]["eval_return"] != "" and result["env_steps"] == 0
    assert resume(only_run())["final_return"] == result["final_return"]
    assert metrics(only_run()) == rows  # nothing is added


def test_step_size_and_progress_follow_the_time_spent_where_that_ends_the_run(tiny_args, monkeypatch, capsys):
    clock, rates, update = itertools.count(), [], rldt_gym.update_actor

    def recorded(velocity, reference, critic, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return update(velocity, reference, critic, optimizer, *rest)

    monkeypatch.setattr(rldt_gym, "update_actor", recorded)
    monkeypatch.setattr(rldt_gym.time, "perf_counter", lambda: float(next(clock)))  # a second a call
    rldt_gym.main(tiny_args(iterations=0, wall_budget_s=60.0, actor_warmup=1, actor_lr=1.0e-3, actor_lr_end=0.1))
    assert rates == sorted(rates, reverse=True) and rates[0] > 5e-4 > rates[-1] > 1e-4
    shown = [int(n) for n in re.findall(r"(\d+)/60 \[", capsys.readouterr().err)]  # seconds of 60
    assert shown == sorted(shown) and shown[0] == 0 and shown[-1] == 60 and any(10 < n < 50 for n in shown)


def test_resuming_a_finished_run_writes_its_result_again(finished_run, copied_run):
    (copied_run / "result.json").unlink()  # as if killed between the last checkpoint and the result
    (copied_run / "policy.pt").unlink()
    result = resume(copied_run)
    assert metrics(copied_run) == metrics(finished_run[0])
    for key in ("base_return", "final_return", "best_return", "best_return_sampled", "env_steps"):
        assert result[key] == finished_run[1][key]
    assert (copied_run / "policy.pt").exists()


def test_resuming_with_damaged_arguments_names_the_file(copied_run):
    (copied_run / "args.json").write_text('{"env_id": "Hop')
    with pytest.raises(SystemExit, match=r"args\.json"):
        resume(copied_run)


def test_resume_takes_the_stored_arguments_and_says_which_flags_it_does_not_use(copied_run, capsys):
    args = rldt_gym.resolve(rldt_gym.parse_args(["--resume", str(copied_run), "--seed", "99"]))
    stored = json.loads((copied_run / "args.json").read_text())
    assert args.seed == stored["seed"] == 3
    assert args.actor_width == stored["actor_width"] == 16
    assert "not used: --seed\n" in capsys.readouterr().out
    rldt_gym.resolve(rldt_gym.parse_args(["--resume", str(copied_run)]))
    assert "not used" not in capsys.readouterr().out


# --------------------------------------------------------------------------------- evaluation
def test_evaluating_a_run_gives_the_returns_of_its_last_evaluation(finished_run, capsys):
    run, result = finished_run
    seed = 3  # the run's
    scores = rldt_gym.main(rldt_gym.parse_args([f"--evaluate={run}", "--final-eval-episodes=3", f"--seed={seed}"]))
    assert scores == {"zero": result["final_return"], "noise": result["final_return_sampled"]}
    printed = capsys.readouterr().out
    assert f"{scores['zero']:.0f} +-" in printed
    assert "3 episodes from x_0 = 0" in printed


def test_evaluation_counts_first_episodes_only(tiny_args, tiny_base):
    args = rldt_gym.resolve(tiny_args())
    envs = rldt_gym.VectorEnv("Hopper-v4", 6, 2, seed=21)
    policy = rldt_gym.load_base(tiny_base, args, envs)
    returns = rldt_gym.evaluate(policy, args, 3, 21)["zero"]
    obs, total, alive = envs.reset(), np.zeros(6), np.ones(6, bool)
    generator = torch.Generator(args.device).manual_seed(21)
    while alive.any():
        x0 = torch.randn(6, 6, device=args.device, generator=generator)
        x0[:3] = 0
        with torch.no_grad(), rldt_gym.autocast(args):
            chunks = policy.to_env(policy.sample(policy.normalize(obs), x0))
        _, reward, terminated, truncated, _ = envs.step(chunks)
        total += reward * alive
        alive &= ~(terminated | truncated)
        obs = envs.obs
    np.testing.assert_allclose(returns, total[:3], rtol=0.05)  # other matrix shapes, other rounding in bfloat16


# ----------------------------------------------------------------------------------- rollouts
def rollout(tiny_args, tiny_base, **changes):
    args = rldt_gym.resolve(tiny_args(bf16=False, **changes))
    envs = rldt_gym.VectorEnv("Hopper-v4", args.num_envs, args.chunk, seed=5)
    envs.reset()
    policy, replay, tape, returns = (
        rldt_gym.load_base(tiny_base, args, envs),
        rldt_gym.Replay(args, 11, 6),
        [],
        np.zeros(4),
    )
    torch.manual_seed(2)
    steps, finished = rldt_gym.collect(policy, envs, replay.rollout(), tape, returns, args)
    return policy, envs, replay.newest(), tape, returns, steps, finished


@pytest.mark.parametrize("exploration_steps, noisy", [(0, False), (1, False), (4, True)])
def test_exploration_adds_noise_only_from_steps_before_the_last(tiny_args, tiny_base, exploration_steps, noisy):
    policy, _, slot, *_ = rollout(tiny_args, tiny_base, exploration_steps=exploration_steps, zero_fraction=0.0)
    torch.manual_seed(2)
    with torch.no_grad():
        clean = policy.sample(slot["obs"][0])
    assert torch.allclose(slot["action"][0], clean, atol=1e-5) != noisy


@pytest.mark.parametrize("fraction, count", [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_share_of_the_environments_acts_from_zero(tiny_args, tiny_base, fraction, count):
    policy, _, slot, *_ = rollout(tiny_args, tiny_base, exploration_steps=0, zero_fraction=fraction)
    with torch.no_grad():
        deterministic = policy.sample(slot["obs"], torch.zeros(12, 4, 6, device=DEVICE))
    same = (slot["action"] - deterministic).abs().amax((0, 2)) < 1e-5
    assert same.tolist() == [True] * count + [False] * (4 - count)


def test_rollout_stores_what_was_executed(tiny_args, tiny_base):
    policy, envs, slot, tape, returns, steps, finished = rollout(tiny_args, tiny_base, rollout_chunks=60)
    again = rldt_gym.VectorEnv("Hopper-v4", 4, 2, seed=5)
    obs, total, count, ended = again.reset(), np.zeros(4), 0, []
    for t, chunks in enumerate(tape):
        np.testing.assert_array_equal(chunks, policy.to_env(slot["action"][t]))
        torch.testing.assert_close(slot["obs"][t], policy.normalize(obs))
        next_obs, reward, terminated, truncated, length = again.step(chunks)
        torch.testing.assert_close(slot["next_obs"][t], policy.normalize(next_obs))
        np.testing.assert_allclose(slot["reward"][t].cpu(), reward, rtol=1e-6)
        np.testing.assert_array_equal(slot["terminated"][t].cpu(), terminated)
        np.testing.assert_array_equal(slot["truncated"][t].cpu(), truncated)
        total, count, done = total + reward, count + length.sum(), terminated | truncated
        ended += total[done].tolist()
        total[done] = 0
        obs = again.obs
    assert len(tape) == 60
    assert steps == count
    assert len(ended) >= 4
    assert finished == ended
    np.testing.assert_array_equal(returns, total)
    np.testing.assert_array_equal(envs.obs, obs)


# -------------------------------------------------------------------------------- base policy
def test_base_policy_of_another_chunk_stops_in_one_line_that_names_both(tiny_args):
    with pytest.raises(SystemExit) as stop:
        rldt_gym.main(tiny_args(chunk=4))
    assert "has chunk 2, the run wants 4" in str(stop.value)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    "field, value", [("euler_steps", 8), ("actor_width", 32), ("actor_depth", 5), ("time_dim", 16)]
)
def test_base_policy_of_other_sizes_stops(tiny_args, field, value):
    with pytest.raises(SystemExit, match=rf"has {field.removeprefix('actor_')} \d+, the run wants {value}"):
        rldt_gym.main(tiny_args(**{field: value}))


def test_base_policy_of_another_task_stops(tiny_args):
    with pytest.raises(SystemExit, match="has obs_dim 11, the run wants 17"):
        rldt_gym.main(tiny_args(env_id="HalfCheetah-v4"))


@pytest.mark.parametrize("config", ["{", "[]", '{"obs_dim": 11}', '{"depth": 4}'])
def test_base_policy_with_a_damaged_config_stops_with_its_name(tiny_args, tiny_base, tmp_path, config):
    path = tmp_path / "mine.safetensors"
    with safe_open(tiny_base, "pt") as file:
        state, stored = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])
    if config == '{"depth": 4}':
        config = json.dumps(stored | {"depth": 4})
    save_file(state, path, metadata={"config": config})
    with pytest.raises(SystemExit, match=r"mine\.safetensors: not a base policy"):
        rldt_gym.main(tiny_args(base=path))


@pytest.mark.parametrize("content", [b"", b"garbage that is no safetensors file", "half", None])
def test_damaged_or_missing_base_policy_stops_with_its_name(tiny_args, tiny_base, tmp_path, content):
    path = tmp_path / "mine.safetensors"
    if content is not None:
        path.write_bytes(tiny_base.read_bytes()[:2000] if content == "half" else content)
    with pytest.raises(SystemExit, match=r"mine\.safetensors: not a base policy"):
        rldt_gym.main(tiny_args(base=path))


def test_demonstrations_of_other_sizes_stop(tiny_args, tmp_path, d4rl_arrays):
    import h5py

    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key, value in d4rl_arrays.items():
            file[key] = value
    with pytest.raises(SystemExit, match=r"sizes \(3, 2\) are not Hopper-v4's \(11, 3\)"):
        rldt_gym.main(tiny_args(base=None, dataset=str(tmp_path / "a.hdf5")))


def test_base_policy_round_trip(tmp_path, tiny_args):
    args = rldt_gym.resolve(tiny_args())
    policy = rldt_gym.FlowPolicy(11, 3, 2, 4, 16, 3, 8)
    policy.obs_min.uniform_(-3, -2), policy.action_max.uniform_(2, 3)
    rldt_gym.save_base(policy, tmp_path / "deeper" / "b.safetensors", env_id="Hopper-v4")
    copy = rldt_gym.load_base(tmp_path / "deeper" / "b.safetensors", args, rldt_gym.VectorEnv("Hopper-v4", 1))
    assert copy.config == policy.config
    for key, value in policy.state_dict().items():
        assert torch.equal(copy.state_dict()[key].cpu(), value)


def test_policy_scales_observations_and_actions_by_the_demonstrations():
    policy = rldt_gym.FlowPolicy(2, 2, chunk=3, euler_steps=4, width=8, depth=3, time_dim=4)
    policy.obs_min.copy_(torch.tensor([-2.0, 0.0])), policy.obs_max.copy_(torch.tensor([4.0, 10.0]))
    policy.action_min.copy_(torch.tensor([-0.5, -1.0])), policy.action_max.copy_(torch.tensor([0.5, 3.0]))
    obs = np.array([[-2, 0], [4, 10], [1, 5]], np.float32)
    torch.testing.assert_close(policy.normalize(obs), torch.tensor([[-1.0, -1], [1, 1], [0, 0]]), atol=1e-6, rtol=0)
    action = torch.tensor([[-1.0, -1, 1, 1, 0, 0]])  # three actions of two dimensions, one after the other
    np.testing.assert_allclose(policy.to_env(action), [[[-0.5, -1], [0.5, 3], [0, 1]]], atol=2e-6)


def demonstrations(episodes=12, length=30):
    """Actions that are a linear function of the observations."""
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (episodes * length, 3)).astype(np.float32)
    actions = np.stack([obs[:, 0] - obs[:, 1], 0.5 * obs[:, 2]], 1)
    return dataset.Demonstrations(obs, actions, np.arange(1, episodes + 1) * length)


def pretrain(data, **changes):
    fields = dict(device="cpu", chunk=1, euler_steps=4, actor_width=32, time_dim=8, bc_batch=64, bc_ema=0.9, bf16=False)
    return rldt_gym.pretrain(rldt_gym.Args(**fields | changes), data, log=lambda line: None)


def test_pretraining_lowers_the_validation_loss_and_learns_the_demonstrators_actions():
    data = demonstrations()
    torch.manual_seed(0)
    short = pretrain(data, bc_epochs=1)
    torch.manual_seed(0)
    long = pretrain(data, bc_epochs=150)
    assert long.validation_loss < 0.5 * short.validation_loss

    def error(policy):
        with torch.no_grad():
            action = policy.sample(policy.normalize(data.observations), torch.zeros(len(data.actions), 2))
        return np.abs(policy.to_env(action)[:, 0] - data.actions).mean()

    assert error(long) < 0.25 * error(short)


def test_pretrained_policy_keeps_the_scaling_of_the_data_or_of_the_file():
    data = demonstrations()
    policy = pretrain(data, bc_epochs=1)
    np.testing.assert_array_equal(policy.obs_min, data.observations.min(0))
    np.testing.assert_array_equal(policy.action_max, data.actions.max(0))
    data.normalization = {"obs_min": np.full(3, -5.0), "obs_max": np.full(3, 5.0),
                          "action_min": np.full(2, -7.0), "action_max": np.full(2, 7.0)}  # fmt: skip
    policy = pretrain(data, bc_epochs=1)
    assert policy.obs_min.tolist() == [-5] * 3
    assert policy.action_max.tolist() == [7] * 2


def test_pretraining_chunks_are_consecutive_and_stay_inside_an_episode(monkeypatch):
    seen, loss = [], rldt_gym.flow_matching_loss
    monkeypatch.setattr(rldt_gym, "flow_matching_loss", lambda v, a, o: seen.append((a, o)) or loss(v, a, o))
    steps = np.arange(40, dtype=np.float32)  # episodes of 3, 17 and 20 steps; actions = (step number, episode)
    ends = np.array([3, 20, 40])
    actions = np.stack([steps, np.digitize(steps, ends)], 1).astype(np.float32)
    policy = pretrain(dataset.Demonstrations(steps[:, None], actions, ends), chunk=4, bc_epochs=60, bc_batch=32)
    chunk = torch.cat([a for a, _ in seen]).view(-1, 4, 2)
    obs = torch.cat([o for _, o in seen])
    raw = ((chunk + 1) / 2 * (policy.action_max - policy.action_min + 1e-6) + policy.action_min).round()
    assert (raw[:, 1:, 0] - raw[:, :-1, 0] == 1).all()
    assert (raw[:, :, 1] == raw[:, :1, 1]).all()
    assert ((obs[:, 0] + 1) / 2 * 39).round().tolist() == raw[:, 0, 0].tolist()
    assert set(raw[:, 0, 0].int().tolist()) == {*range(3, 17), *range(20, 37)}  # every start but those too late


def test_demonstrations_shorter_than_a_chunk_stop():
    with pytest.raises(SystemExit, match=r"0 chunks .* as long as a chunk \(31 steps\)"):
        pretrain(demonstrations(), chunk=31)
    with pytest.raises(SystemExit, match=r"19 chunks to clone are too few"):
        pretrain(demonstrations(episodes=1, length=19))
    pretrain(demonstrations(episodes=1, length=20), bc_epochs=1, bc_batch=8)


def test_run_without_a_base_policy_pretrains_one_and_keeps_it(tiny_args, tmp_path, only_run):
    path = dataset.make(dataset.Args(env_id="Walker2d-v4", steps=400, num_envs=8, out=tmp_path / "a.hdf5"))
    args = tiny_args(env_id="Walker2d-v4", base=None, dataset=str(path), bc_epochs=2, bc_batch=32, iterations=2)
    rldt_gym.main(args)
    run = only_run()
    before = metrics(run)
    assert (run / "base.safetensors").exists()
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    low = dataset.load(path).observations.min(0)
    np.testing.assert_array_equal(checkpoint["policy"]["obs_min"].cpu(), low)
    assert len(before) == 3


# ------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("argv", [["--preset", "paper"], ["--preset=paper"]])
def test_paper_preset_sets_the_values_of_the_paper(argv):
    args = rldt_gym.parse_args(argv)
    paper = dict(
        n_particles=8, chunk=4, euler_steps=8, actor_width=512, actor_depth=3, time_dim=16, bc_epochs=200, bc_batch=128,
        iterations=70, num_envs=100, rollout_chunks=500, buffer_iterations=20, gamma=0.99, td_lambda=0.0,
        target_momentum=0.998, rounds=16, critic_steps=64, critic_batch=50_000, critic_lr=1e-3, critic_width=256,
        critic_depth=3, actor_steps=2, actor_lr=2e-5, actor_warmup=32, warmup_iterations=2, alpha=1e-3, kernel="rbf",
        consistency_weight=0.5, constraint_weight=0.2, fresh_fraction=0.33, value_samples=2, eval_every=5,
        preset="paper",
    )  # fmt: skip
    assert {key: getattr(args, key) for key in paper} == paper
    assert dataclasses.asdict(args) == dataclasses.asdict(rldt_gym.Args(preset="paper", **rldt_gym.PAPER))


def test_explicit_flags_win_over_the_preset():
    args = rldt_gym.parse_args(["--n-particles", "5", "--preset", "paper", "--critic-batch=64"])
    assert (args.n_particles, args.critic_batch, args.critic_steps) == (5, 64, 64)


def test_without_iterations_only_the_wall_budget_ends_a_run():
    iterations = lambda *flags: rldt_gym.resolve(rldt_gym.parse_args(["--env-id=Hopper-v4", *flags])).iterations
    assert iterations() == 25 and iterations("--wall-budget-s=9") > 1_000_000
    assert iterations("--wall-budget-s=9", "--iterations=7") == 7


def test_no_flags_give_the_defaults():
    assert rldt_gym.parse_args([]) == rldt_gym.Args()
    assert rldt_gym.parse_args(["--preset", "laptop"]) == rldt_gym.Args()


@pytest.mark.parametrize("name", [
    "chunk", "euler_steps", "n_particles", "num_envs", "rollout_chunks", "rounds", "segments", "value_samples",
    "critic_steps", "critic_batch", "actor_batch", "buffer_iterations", "eval_every", "eval_episodes", "final_eval_episodes",
])  # fmt: skip
def test_numbers_below_one_stop_with_the_flag(name):
    with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} must be at least 1, got 0"):
        rldt_gym.resolve(rldt_gym.Args(**{name: 0}))


@pytest.mark.parametrize("script", [rldt_gym, rldt_robomimic, rldt_furniture])
@pytest.mark.parametrize("depth", [1, 4])
def test_depths_that_blocks_cannot_have_stop_with_the_flag(script, depth):
    with pytest.raises(SystemExit, match=f"--actor-depth must be odd and at least 3 .* got {depth}"):
        script.resolve(script.Args(actor_depth=depth))


@pytest.mark.parametrize("steps", [-1, 9])
def test_exploration_from_steps_that_do_not_exist_stops(steps):
    with pytest.raises(SystemExit, match="--exploration-steps"):
        rldt_gym.resolve(rldt_gym.Args(exploration_steps=steps, euler_steps=8))


def test_segments_are_at_most_a_rollout_long():
    assert rldt_gym.resolve(rldt_gym.Args(segment_chunks=500, rollout_chunks=20)).segment_chunks == 20


def test_cuda_without_a_cuda_device_stops(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        rldt_gym.resolve(rldt_gym.Args(device="cuda"))


@pytest.mark.parametrize("argv, options", [
    (["rldt_gym.py"], rldt_gym.Args),
    (["pretrain_fm.py", "gym"], rldt_gym.Args),
    (["demos/dataset.py"], dataset.Args),
    (["demos/train_demonstrator.py"], demos.train_demonstrator.Args),
])  # fmt: skip
def test_help_exits_with_zero_and_mentions_every_field(monkeypatch, capsys, argv, options):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [*argv, "--help"])
    name = argv[0].removesuffix(".py").replace("/", ".")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, name, raising=False)
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(name, run_name="__main__")
    assert stop.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert argv[0].split("/")[0].removesuffix(".py") in text
    for field in dataclasses.fields(options):
        flag = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"{flag}(?![\w-])", text), flag
    if "gym" in argv:
        assert "--out" in text


@pytest.mark.parametrize("flags", [["--preset", "paper"], ["--preset=paper"], []])
@pytest.mark.parametrize("family, script", [("gym", rldt_gym), ("robomimic", rldt_robomimic), ("furniture", rldt_furniture)])
def test_pretraining_alone_takes_the_preset_and_flags_win(monkeypatch, tmp_path, family, script, flags):
    taken = []
    monkeypatch.setattr(pretrain_fm, family, lambda args, out: taken.append((args, out)))
    pretrain_fm.main([family, *flags, "--bc-batch=77", f"--out={tmp_path / 'a'}"])
    preset = script.Args(preset="paper", **script.PAPER) if flags else script.Args()
    assert taken == [(dataclasses.replace(preset, bc_batch=77), tmp_path / "a")]


def test_pretraining_alone_evaluates_where_the_demonstrations_do_not_start_and_makes_the_folder(scripted_evaluations, tiny_args, tmp_path):
    data = dataset.make(dataset.Args(env_id="Hopper-v4", steps=400, num_envs=8, out=tmp_path / "a.hdf5"))
    episodes, policies = scripted_evaluations(rldt_gym, [7.0])
    out = tmp_path / "new" / "base.safetensors"
    info = pretrain_fm.gym(tiny_args(dataset=str(data), bc_epochs=1, bc_batch=32, final_eval_episodes=50), out)
    assert (info["return_zero"], info["return_sampled"]) == (7.0, 6.0)
    assert len(episodes[0]) == 100 and min(episodes[0]) >= 1000  # the demonstrators' environments have seeds 0 to 99
    with safe_open(out, "pt") as file:
        assert all(torch.equal(file.get_tensor(key), value) for key, value in policies[0].state_dict().items())


# ---------------------------------------------------------------------------- several processes
@pytest.mark.parametrize("device", ["auto", "cuda:0"])
def test_each_process_takes_a_gpu_of_its_own_also_with_the_arguments_of_the_first(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert rldt_gym.resolve(rldt_gym.Args(device="cuda:3")).device == "cuda:3"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rldt_gym.resolve(rldt_gym.Args(device=device)).device == "cuda:1"
    assert rldt_gym.resolve(rldt_gym.Args(device="cpu")).device == "cpu"


def test_gradients_are_averaged_over_the_processes(monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    for p in parameters:
        p.grad = torch.randn_like(p)
    own = [p.grad.clone() for p in parameters]
    monkeypatch.setattr(rldt_gym.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(rldt_gym.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(rldt_gym.dist, "all_reduce", lambda flat: flat.add_(torch.arange(10.0)))  # the other's gradient
    rldt_gym.average_gradients(parameters)
    torch.testing.assert_close(parameters[0].grad, (own[0] + torch.arange(6.0).view(2, 3)) / 2)
    torch.testing.assert_close(parameters[1].grad, (own[1] + torch.arange(6.0, 10.0)) / 2)


@pytest.mark.parametrize("pretrained", ["given", "first"])
def test_two_processes_train_one_actor_on_their_own_rollouts(tiny_flags, tmp_path, only_run, pretrained):
    if pretrained == "first":
        data = dataset.make(dataset.Args(env_id="Hopper-v4", steps=400, num_envs=8, out=tmp_path / "a.hdf5"))
        tiny_flags = [*tiny_flags, "--pretrain", f"--dataset={data}", "--bc-epochs=2", "--bc-batch=32"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "rldt_gym.py"]
    process = subprocess.run(
        [*command, *tiny_flags, "--iterations=3", f"--runs={tmp_path / 'runs'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    run = only_run()
    result = json.loads((run / "result.json").read_text())
    assert result["env_steps"] == int(metrics(run)[-1]["env_steps"])
    first, second = (torch.load(run / name, weights_only=True) for name in ("checkpoint.pt", "checkpoint1.pt"))
    for name in ("policy", "critic", "target"):
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)
    assert float(metrics(run)[2]["diagnostics/base_distance"]) > 0
    assert not torch.equal(first["replay"]["obs"], second["replay"]["obs"])
    assert first["state"]["reward_scale"] == second["state"]["reward_scale"]
