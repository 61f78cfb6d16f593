"""common/settings.py and common/runs.py: a toy script runs, is interrupted everywhere, and goes on."""

import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT, SAVE_FIGURE, metrics
from fakes import same, small_policy
from hypothesis import given
from hypothesis import strategies as st
from pickle_bomb import LOADED, Bomb
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rldt_gym
from common import checkpoints, runs
from common.checkpoints import Ring, load_parts, read_checked, save_parts, write_atomically
from common.flow import FlowPolicy
from common.runs import Run, derive_seed
from common.settings import Count, Seed, Share, Size, Threads, Weight, launch, parse_args, set_up


@dataclass
class Args:
    # the run
    preset: Literal["small", "large"] = "small"  # defaults
    seed: Seed = 1  # of the noise
    iterations: Size = 7  # of training
    wall_budget_s: Weight = 0.0  # seconds
    runs: Path = Path("runs")  # directory
    device: str = "cpu"  # cpu or cuda
    threads: Threads = 1  # of torch
    quick: bool = True  # or slow
    precision: Literal["auto", "bfloat16", "float32"] = "float32"  # of products
    track: bool = False  # log elsewhere
    resume: Path | None = None  # run to continue
    evaluate: Path | None = None  # run to evaluate

    # learning
    data: str | None = None  # where from
    rate: Weight = 0.1  # step size
    decay: Share = 0.5  # of something
    eval_episodes: Count = 2  # of an evaluation
    final_eval_episodes: Count = 5  # of the first and the last one


PRESETS = {"large": dict(iterations=70, rate=0.2, quick=False)}


def parse(*argv):
    return parse_args(Args, PRESETS, "A toy.\n", [str(word) for word in argv])


class Toy(torch.nn.Linear):
    """A policy of four numbers."""

    info = property(lambda self: dict(task="toy", eval_score=-7.0, loss=0.5))  # scores of the base
    saved = {}  # noqa: RUF012, by file

    def save(self, path, **info):
        self.saved[path.name] = info
        save_file(self.state_dict(), path)


def score(policy, episodes, seed):
    """Best at iteration 3: the bias starts below 0.5 and moves on to 1."""
    return {"eval_score": -(policy.bias - 0.5).square().item()}


def train(args, during=lambda iteration, row: None):
    """A script in miniature: iterations 0, 3, 6 and the last evaluate, the others train on a ring."""
    set_up(args)
    run = Run(args, "toy")
    policy = Toy(3, 1)
    optimizer = torch.optim.Adam(policy.parameters(), args.rate)
    ring, state = Ring(2, {"x": (4, 3)}, "cpu"), dict(env_steps=0)
    run.checkpoints(state, policy, optimizer=optimizer, ring=ring)
    for iteration, spent in run.iterations():
        row = {}
        if iteration % 3 == 0 or spent == 1:
            row |= run.evaluate("eval_score", score)
        else:
            ring.next()["x"].normal_()
            state["env_steps"] += 4
            with run.timer(row, "critic_s"):
                for slot in range(ring.filled):
                    loss = (policy(ring.slots["x"][slot]) - 1).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    run.add({"losses/toy": loss.detach()})
        during(iteration, row)
        run.log(row, state["env_steps"])
        run.save()
    return run.finish("eval_score", score, task="toy")


@pytest.fixture
def args(tmp_path):
    return Args(runs=tmp_path / "runs")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Directory and result of a toy run that nobody disturbed."""
    parent = tmp_path_factory.mktemp("whole")
    result = train(Args(runs=parent))
    assert result["best_score"] > max(result["base_score"], result["final_score"])
    return next(parent.iterdir()), result


def assert_same(run, result, whole):
    assert metrics(run) == metrics(whole[0])
    for key in whole[1].keys() - {"date", "wall_s", "args", "commit"}:
        assert result[key] == whole[1][key], key
    for key, value in load_file(whole[0] / "policy.safetensors").items():
        assert torch.equal(load_file(run / "policy.safetensors")[key], value)


# ---------------------------------------------------------------------------------- arguments
def test_a_preset_sets_the_defaults_and_flags_win():
    assert parse() == Args()
    for argv in ["--preset=large", "--rate=0.3"], ["--rate", "0.3", "--preset", "large"]:
        assert parse(*argv) == Args(preset="large", iterations=70, rate=0.3, quick=False)
    assert parse("--preset=large", "--quick").quick
    assert parse("--data=large") == Args(data="large")  # a text that has a preset's name is none


def test_resume_and_evaluate_take_the_stored_arguments(tmp_path):
    stored = dict(preset="large", iterations=9, quick=False, data="my data --x=1", threads=2, rate=0.7)
    stored = vars(Args(**stored, device="cuda:3"))
    (tmp_path / "args.json").write_text(json.dumps(stored | dict(script="test_runs"), default=str))
    args = parse("--resume", tmp_path, "--threads=4", "--device=cpu", "--rate=0.7")
    assert vars(args) == stored | dict(resume=tmp_path, threads=4, device="cpu")
    for flag, kept in {"--seed=99": 1, "--rate=0.1": 0.7, "--preset=small": "large"}.items():
        with pytest.raises(SystemExit, match=f"{flag.partition('=')[0]}: a run goes on with {kept}"):
            parse("--resume", tmp_path, flag)
    args = parse("--evaluate", tmp_path, "--seed=99", "--quick", "--threads=4")
    assert vars(args) == stored | dict(evaluate=tmp_path, seed=99, quick=True, threads=4)  # flags win


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("content", [None, "", '{"seed": 3'])
def test_a_directory_without_readable_arguments_is_no_run(tmp_path, flag, content):
    if content is not None:
        (tmp_path / "args.json").write_text(content)
    with pytest.raises(SystemExit, match=f"{tmp_path}: not a run directory"):
        parse(flag, tmp_path)


# ---------------------------------------------------------------------------------- processes
def test_set_up_takes_device_threads_and_seed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device, message in ("cuda:1", "torch sees no such device"), ("foo", "must be auto, cpu"):
        with pytest.raises(SystemExit, match=f"--device {device}:.*{message}"):
            set_up(Args(device=device))
    with pytest.raises(SystemExit, match="--track needs"):
        set_up(Args(track=True))
    args, draws = Args(device="auto", threads=2), []
    for args.seed in 1, 1, 2:
        set_up(args)
        draws.append(torch.rand(3).tolist())
    assert (args.device, torch.get_num_threads()) == ("cpu", 2)
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("asked, slow, chosen", [
    ("auto", torch.float32, "bfloat16"), ("auto", torch.bfloat16, "float32"),
    ("bfloat16", torch.bfloat16, "bfloat16"),
])  # fmt: skip
def test_precision_is_the_faster_one_unless_it_is_given(monkeypatch, asked, slow, chosen):
    timed = lambda product, **_: [3, 2 if product.__defaults__[0].dtype == slow else 1, 3]
    monkeypatch.setattr(timeit, "repeat", timed)
    args = Args(precision=asked)
    set_up(args)
    assert args.precision == chosen


ALLOCATION = """
import resource, torch
from common.settings import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        tensors = [torch.zeros(2**20) for _ in range(8)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_memory()
faults()
print(faults())
"""


def test_memory_of_tensors_is_not_asked_for_again_and_again():
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc's first choice, which it may change
    command = [sys.executable, "-c", ALLOCATION]
    faults = int(subprocess.check_output(command, text=True, cwd=ROOT, env=env))
    assert faults < 100  # pages; without it, 163 000


@pytest.mark.parametrize("device, alone, together", [
    ("auto", "cuda:0", "cuda:1"), ("cuda:3", "cuda:3", "cuda:1"), ("cpu", "cpu", "cpu"),
])  # fmt: skip
def test_each_process_takes_a_gpu_of_its_own(monkeypatch, device, alone, together):
    backends = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)  # which would start CUDA
    begin = lambda backend, timeout: backends.append((backend, timeout.days))
    monkeypatch.setattr(runs.dist, "init_process_group", begin)
    args = [Args(device=device, precision="float32") for _ in range(2)]
    set_up(args[0])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    set_up(args[1])
    assert [a.device for a in args] == [alone, together]
    assert backends == [("gloo" if device == "cpu" else "nccl", 7)]  # they wait while the first clones


@given(seed=st.integers(0, 2**32 - 1), other=st.integers(0, 2**32 - 1), purpose=st.text(max_size=9))
def test_derived_seeds_fit_every_simulator_and_differ(seed, other, purpose):
    torch.manual_seed(seed)
    derived = derive_seed(seed, purpose, 3)
    assert 0 <= derived < 2**30 and derived == derive_seed(seed, purpose, 3)
    others = [derive_seed(seed, purpose, 4), derive_seed(seed, purpose + "x", 3)]
    if seed != other:
        others.append(derive_seed(other, purpose, 3))
    assert derived not in others


@pytest.mark.parametrize("error, text", [
    (KeyboardInterrupt(), "Stopped"), (FloatingPointError("Q became nan"), "Q became nan"),
    (torch.OutOfMemoryError("on CUDA"), "on CUDA"), (MemoryError("9 EiB"), "9 EiB"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "memory: you tried to"),
])  # fmt: skip
def test_known_failures_are_one_line_and_others_are_raised(monkeypatch, error, text):
    def main(args):
        raise error

    monkeypatch.setattr("sys.argv", ["toy"])
    with pytest.raises(SystemExit) as stop:
        launch(main, Args, PRESETS, "A toy.")
    assert text in str(stop.value) and "\n" not in str(stop.value)
    error = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="of ours"):
        launch(main, Args, PRESETS, "A toy.")


def test_a_replay_that_does_not_fit_is_refused_with_its_size():
    with pytest.raises(SystemExit, match=r"The replay would take 3\.73e\+03 GiB; .* GiB are free"):
        Ring(1000, {"x": (1000, 1000, 1000)}, "cpu")


# -------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("name", ["checkpoint0.5.pt", "checkpoint0.ring0", "metrics.csv"])
def test_full_disk_stops_the_run_which_then_goes_on(args, only_run, whole, name):
    def fill(iteration, row):
        if iteration == 4:
            (only_run() / f"{name}.partial").symlink_to("/dev/full")

    with pytest.raises(SystemExit, match=f"Cannot write .*{name}.*The last good file is kept"):
        train(args, fill)
    run = only_run()
    assert not list(run.glob("*.partial"))
    assert [path.name for path in run.glob("checkpoint*.pt")] == ["checkpoint0.4.pt"]
    for number in "9.old", "9 copy":  # somebody's own
        (run / f"checkpoint0.{number}.pt").touch()
    assert_same(run, train(Args(resume=run)), whole)


def test_a_directory_that_cannot_be_written_stops():
    with pytest.raises(SystemExit, match="--runs /proc/rldt: cannot be written"):  # not even by root
        train(Args(runs=Path("/proc/rldt")))
    for write in lambda path: path.write_text("text"), lambda path: torch.save({}, path):
        with pytest.raises(SystemExit, match="Cannot write /proc/rldt"):
            write_atomically(Path("/proc/rldt"), write)


OWNER = dict(script="toy")


def test_a_checkpoint_of_a_machine_with_more_gpus_is_read(monkeypatch, tmp_path):
    path, states, restored = tmp_path / "checkpoint0.1.pt", [torch.zeros(16, dtype=torch.uint8)] * 2, []
    fakes = dict(get_rng_state_all=lambda: states, set_rng_state_all=restored.extend)
    for name, fake in (fakes | dict(device_count=lambda: 1)).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    save_parts(path, OWNER, {})
    load_parts(path, OWNER, {}, "cpu")
    assert len(restored) == 1


def test_saving_writes_only_the_newest_slot_of_a_ring(tmp_path):
    ring = Ring(3, {"x": (2,)}, "cpu")
    for i in range(5):
        ring.next()["x"].fill_(i)
        save_parts(tmp_path / "c.pt", OWNER, dict(ring=ring))
        held = read_checked(tmp_path / f"c.ring{i % 3}", OWNER, "cpu")["newest"]["x"]
        assert held.tolist() == [i, i]
        assert held.untyped_storage().nbytes() == 2 * 4  # a view would drag the whole ring along
        ring.slots["x"][(i + 1) % 3] = 99  # not the newest: must not reach the disk
    held = [read_checked(tmp_path / f"c.ring{slot}", OWNER, "cpu") for slot in range(3)]
    assert [content["newest"]["x"][0].item() for content in held] == [3, 4, 2]


@pytest.mark.filterwarnings("ignore:Detected pickle")
@pytest.mark.parametrize("content", [b"", b"garbage", "half", "bomb", None])
@pytest.mark.parametrize("name", ["checkpoint0.8.pt", "checkpoint0.ring1"])
def test_a_damaged_or_missing_file_cannot_be_resumed_and_says_so(tmp_path, whole, name, content):
    run = shutil.copytree(whole[0], tmp_path / "copy")
    if content == "half":
        content = (run / name).read_bytes()[:300]
    if content == "bomb":
        content = pickle.dumps(Bomb())
    (run / name).unlink() if content is None else (run / name).write_bytes(content)
    if (name, content) == ("checkpoint0.8.pt", None):
        return assert_same(run, train(Args(resume=run)), whole)  # killed before the first save: anew
    with pytest.raises(SystemExit, match=rf"{name}: cannot be resumed"):
        train(Args(resume=run))
    assert LOADED == []


def test_a_checkpoint_of_other_settings_script_version_or_world_is_refused(args, only_run, monkeypatch):
    train(args)
    again = Args(resume=only_run())
    for field, value in ("rate", 0.3), ("seed", 2), ("data", "other.hdf5"):
        with pytest.raises(SystemExit, match=f"it is of a run with another {field}"):
            train(replace(again, **{field: value}))
    stored = only_run() / "args.json"
    stored.write_text(stored.read_text().replace('"test_runs"', '"qam"'))
    with pytest.raises(SystemExit, match="a run of qam, not of test_runs"):
        parse("--resume", only_run())
    monkeypatch.setattr(checkpoints, "FORMAT", "0")
    with pytest.raises(SystemExit, match="a run with another format"):
        train(again)
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runs.dist, "broadcast_object_list", lambda paths: None)
    monkeypatch.setattr(runs.dist, "init_process_group", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="no iteration was saved by all 2 processes"):
        train(again)


# --------------------------------------------------------------------------------------- runs
def test_eight_runs_that_start_at_once_have_directories_of_their_own_with_their_arguments(args):
    with ThreadPoolExecutor(8) as pool:
        paths = {*pool.map(lambda i: Run(args, "a/b__../../x").path, range(8))}
    assert len(paths) == 8
    paths.add(Run(args, "toy__1").path)
    assert any(path.name.startswith("toy__1__") for path in paths)
    for path in paths:
        assert path.parent == args.runs
        assert json.loads((path / "args.json").read_text())["runs"] == str(args.runs)


def test_the_base_policy_is_made_once_and_networks_to_come_are_the_same(args):
    run, policy, made, drawn = Run(args, "toy"), small_policy(rldt_gym), [], []
    policy.info = dict(task="toy")
    make = lambda checkpoint: made.append(checkpoint.touch()) or policy
    for _ in range(2):
        kept = run.keep_base(make, FlowPolicy)
        drawn.append(torch.rand(3).tolist())
        assert same(kept, policy.state_dict()) and kept.info == policy.info
    assert len(made) == 1 and drawn[0] == drawn[1]
    assert {path.name for path in run.path.iterdir()} == {"args.json", "base.safetensors"}


@pytest.mark.parametrize("iterations, budget, shares", [
    (4, 0.0, [0, 0.25, 0.5, 0.75, 1]), (4, 100.0, [0, 0.25, 0.5, 0.75, 1]),
    (0, 8.0, [0, 0.375, 0.75, 1]), (4, 8.0, [0, 0.375, 0.75, 1]),
])  # fmt: skip
def test_the_budget_that_ends_first_ends_the_run_and_is_spent_once(
    args, monkeypatch, iterations, budget, shares
):
    args.iterations, args.wall_budget_s = iterations, budget
    clock, run, seen = SimpleNamespace(now=0.0), Run(args, "toy"), []
    run.checkpoints(dict(env_steps=0), Toy(1, 1))
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    for each, _ in zip(run.iterations(), range(20), strict=False):
        clock.now += 3  # seconds
        run.log({}, 0)
        seen.append(each)  # (iteration, spent)
        clock.now += 100  # between iterations: does not count
    assert seen == [*enumerate(shares)]


def test_log_averages_what_was_added_and_sums_what_was_timed(args, monkeypatch):
    seconds = itertools.count()  # one passes with each look at the clock
    clock = SimpleNamespace(strftime=time.strftime, perf_counter=lambda: next(seconds))
    monkeypatch.setattr(runs, "time", clock)
    run = Run(args, "toy")
    run.checkpoints(dict(env_steps=0), Toy(1, 1))
    for (iteration, _), name in zip(run.iterations(), "ab", strict=False):
        row = {name: 5.0}
        for i in range(3):
            with run.timer(row, "part_s"):
                run.add({"x": torch.tensor(10.0 * iteration + i), "y": torch.tensor(1.0)})
        run.log(row, 7)
    names = "env_steps", "x", "y", "part_s", "a", "b"
    found = [[row[name] for name in names] for row in metrics(run.path)]
    assert found == [["7", "1.0", "1.0", "3.0", "5.0", ""], ["7", "11.0", "1.0", "3.0", "", "5.0"]]


def test_time_in_which_the_first_process_evaluates_counts_in_all(monkeypatch, args):
    run = Run(args, "toy")
    run.checkpoints(dict(env_steps=0), Toy(1, 1))
    assert next(run.iterations()) == (0, 0.0)
    run.world = 2
    monkeypatch.setattr(runs.dist, "barrier", lambda: time.sleep(0.2))
    run.log({}, 0)
    assert run.progress["wall_s"] >= 0.2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stops_with_its_name(args, only_run, whole, value):
    with pytest.raises(SystemExit, match=f"other became {value}.*is from before"):
        train(args, lambda iteration, row: row.update(other=value) if iteration == 4 else None)
    run = only_run()
    assert metrics(run) == metrics(whole[0])[:4]
    assert_same(run, train(Args(resume=run)), whole)


# --------------------------------------------------------------------------- results
def script_scores(args, scores):
    """A run whose evaluations give these scores; also weight, episodes and seed of each of them."""
    measured, scores = [], iter(scores)
    run, policy = Run(args, "toy"), Toy(1, 1)
    run.checkpoints(dict(env_steps=0), policy)

    def measure(policy, episodes, seed):
        measured.append((policy.weight.item(), episodes, seed))
        score = next(scores)
        return {"eval_score": score, "eval_other": -score}

    for iteration, _ in run.iterations():
        torch.nn.init.constant_(policy.weight, iteration)
        run.log(run.evaluate("eval_score", measure), iteration)
    return run.path, measured, run.finish("eval_score", measure, task="toy")


def test_the_best_policy_is_kept_and_measured_again(args, monkeypatch):
    monkeypatch.setattr(plt, "savefig", SAVE_FIGURE)
    args.iterations, other = 3, plt.figure()
    run, measured, result = script_scores(args, [1.0, 9.0, 9.0, 5.0, 8.0])
    weights, episodes, seeds = zip(*measured, strict=True)
    assert weights == (0, 1, 2, 3, 1)  # again the first of the best
    assert episodes == (5, 2, 2, 5, 5)
    assert len({*seeds[:4]}) == 1 and seeds[4] != seeds[0]
    for name, score in ("base", 1.0), ("final", 5.0), ("best", 8.0):
        assert (result[f"{name}_score"], result[f"{name}_other"]) == (score, -score)
    for file, score in ("policy", 5.0), ("best_policy", 8.0):
        known = dict(task="toy", script="test_runs", eval_score=score, eval_other=-score)
        assert Toy.saved[f"{file}.safetensors"] == known
    assert load_file(run / "best_policy.safetensors")["weight"].item() == 1
    assert load_file(run / "policy.safetensors")["weight"].item() == 3
    assert json.loads((run / "result.json").read_text()) == result
    assert result["task"] == "toy" and result["args"]["iterations"] == 3
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", result["commit"])
    assert result["versions"]["torch"] == torch.__version__
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG") and not other.axes
    plt.close(other)


def test_the_last_policy_is_the_best_where_none_does_better(args):
    args.iterations = 2
    run, _, result = script_scores(args, [1.0, 4.0, 4.0])  # it is not measured again
    assert result["best_score"] == result["final_score"] == 4
    assert not (run / "best_policy.safetensors").exists()
    run, measured, result = script_scores(args, [1.0, 9.0, 5.0, 4.5])  # it was luck
    assert measured[3][0] == 1 and result["best_score"] == 5
    assert not (run / "best_policy.safetensors").exists()


# ------------------------------------------------------------------------- interrupted, continued
class Killed(BaseException):
    """What stands for SIGKILL in this process: nothing catches it."""


@pytest.mark.parametrize("renamed", [False, True])
def test_a_run_killed_at_any_write_goes_on_as_if_it_was_not(args, monkeypatch, tmp_path, whole, renamed):
    replace, count, last = Path.replace, SimpleNamespace(writes=0), -1

    def counted(partial, path):
        count.writes += 1
        if renamed or count.writes != last:
            replace(partial, path)
        if count.writes == last:
            raise Killed

    monkeypatch.setattr(Path, "replace", counted)
    train(args)
    total = count.writes
    assert total > 20  # arguments, rows, slots, checkpoints, the result
    for last in range(2 - renamed, total + 1):
        args.runs, count.writes = tmp_path / str(last), 0
        with pytest.raises(Killed):
            train(args)
        (run,) = args.runs.iterdir()
        assert_same(run, train(Args(resume=run)), whole)


@pytest.mark.parametrize("presses, stopped, saved", [(1, SystemExit, 5), (2, KeyboardInterrupt, 4)])
def test_ctrl_c_finishes_the_iteration_and_a_second_one_stops_at_once(
    args, only_run, whole, presses, stopped, saved
):
    def press(iteration, row):
        for _ in range(presses if iteration == 4 else 0):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(stopped) as stop:
        train(args, press)
    run = only_run()
    assert [path.name for path in run.glob("checkpoint*.pt")] == [f"checkpoint0.{saved}.pt"]
    if stopped is SystemExit:
        assert str(stop.value).endswith(f"Continue with --resume {run}")
    assert_same(run, train(Args(resume=run)), whole)
    with pytest.raises(KeyboardInterrupt):  # a run that is over swallows none
        os.kill(os.getpid(), signal.SIGINT)


def test_tensorboard_holds_the_rows_and_one_that_is_logged_twice_once(args, only_run, monkeypatch):
    def killed(self):
        if self.progress["iteration"] == 5:  # logged, not saved
            self.writer.flush()
            raise Killed
        save_parts(self.checkpoint(self.progress["iteration"]), self.identity, self.parts)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "save", killed)
        train(args)
    train(Args(resume=only_run()))
    events = EventAccumulator(str(only_run()))  # of both processes
    events.Reload()
    rows = [row for row in metrics(only_run()) if row["losses/toy"]]
    expected = [(int(row["env_steps"]), pytest.approx(float(row["losses/toy"]))) for row in rows]
    assert [(event.step, event.value) for event in events.Scalars("losses/toy")] == expected
    assert {"charts/eval_score", "charts/wall_s"} <= set(events.Tags()["scalars"])
