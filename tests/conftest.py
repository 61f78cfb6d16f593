import csv
import dataclasses
import os
import signal
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fakes import small_policy
from hypothesis import settings
from safetensors.torch import load_file

import rldt_gym
from baselines import families
from common.settings import parse_args

ROOT = Path(__file__).resolve().parents[1]
DEVICE = os.environ.get("TEST_DEVICE", "cpu")  # of small runs
WALL_COLUMNS = ("wall_s", "rollout_s", "critic_s", "actor_s", "update_s")

SAVE_FIGURE, plt.savefig = plt.savefig, lambda path: None  # takes longer than most runs

settings.register_profile("rldt", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("rldt")


def parse(script, argv):
    """What a script makes of a command line."""
    command = script.Args, script.PRESETS, script.__doc__, [str(word) for word in argv]
    if hasattr(script, "SHARED"):  # a baseline
        return families.parse_args(script.SHARED, *command)
    return parse_args(*command)


def metrics(run):
    """The rows of metrics.csv without the columns of wall time."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return [{key: value for key, value in row.items() if key not in WALL_COLUMNS} for row in rows]


def assert_same(run, expected):
    """Equal to the last bit: the metrics, and the weights of the final policy."""
    assert metrics(run) == metrics(expected)
    weights = load_file(expected / "policy.safetensors")
    for key, value in load_file(run / "policy.safetensors").items():
        assert torch.equal(value, weights[key]), key


@pytest.fixture(autouse=True)
def _same_start_for_every_test(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    handler = signal.getsignal(signal.SIGINT)  # main() replaces it
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A small random Hopper policy, chunk 2 and K = 4, in a file."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        policy = small_policy(rldt_gym, 11, 3)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    policy.save(path, env_id="Hopper-v4")
    return path


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Files of small random policies of chunk 4, one for each task of short_runs.py."""
    from short_runs import TASKS  # which imports this file

    folder, paths = tmp_path_factory.mktemp("bases"), {}
    for task, (script, obs_dim, action_dim, _) in TASKS.items():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            policy = small_policy(script, obs_dim, action_dim, chunk=4, cameras=int(task == "image"))
        paths[task] = folder / f"{task}.safetensors"
        policy.save(paths[task])
    return paths


@pytest.fixture(scope="session")
def tiny_flags(tiny_base):
    """Flags of a Hopper run of six iterations that takes about a second."""
    flags = dict(
        env_id="Hopper-v4", base=tiny_base, device=DEVICE, precision="float32", seed=3, iterations=6,
        num_envs=4, rollout_chunks=12, buffer_iterations=2, eval_every=4, eval_episodes=2,
        final_eval_episodes=3, rounds=2, critic_steps=2, critic_batch=16, segments=8,
        warmup_iterations=1, actor_steps=1, actor_batch=8, n_particles=3, actor_lr=1e-3,
    )  # fmt: skip
    return [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]


@pytest.fixture
def tiny_args(tiny_flags, tmp_path):
    """Makes the arguments of a tiny run below tmp_path; keywords change fields."""

    args = parse(rldt_gym, [*tiny_flags, f"--runs={tmp_path / 'runs'}"])
    return lambda **changes: dataclasses.replace(args, **changes)


@pytest.fixture
def only_run(tmp_path):
    """The one run directory below tmp_path."""
    from short_runs import only_run  # which imports this file

    return lambda parent=tmp_path / "runs": only_run(parent)


@pytest.fixture(scope="session")
def finished_run(tiny_flags, tmp_path_factory):
    """The directory and the returned result of one complete tiny run; read it, do not write to it."""
    parent = tmp_path_factory.mktemp("finished")
    handler, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    result = rldt_gym.main(parse(rldt_gym, [*tiny_flags, f"--runs={parent}"]))
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(threads)
    (run,) = parent.iterdir()
    return run, result


@pytest.fixture
def d4rl_arrays():
    """Two episodes, of 5 and 4 steps, as D4RL stores them."""
    rng = np.random.default_rng(0)
    terminals, timeouts = np.zeros(9, bool), np.zeros(9, bool)
    terminals[4], timeouts[8] = True, True
    arrays = dict(observations=rng.normal(size=(9, 3)), actions=rng.uniform(-1, 1, (9, 2)))
    arrays["rewards"] = rng.normal(size=9)
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    return arrays | dict(terminals=terminals, timeouts=timeouts)
