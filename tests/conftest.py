import copy
import json
import os
import signal
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import settings

import rldt_gym

ROOT = Path(__file__).resolve().parents[1]
DEVICE = os.environ.get("TEST_DEVICE", "cpu")  # of the small runs of rldt_gym.py and rldt_furniture.py
WALL_COLUMNS = ("wall_s", "rollout_s", "critic_s", "actor_s")

settings.register_profile("rldt", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("rldt")


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
        policy = rldt_gym.FlowPolicy(11, 3, chunk=2, euler_steps=4, width=16, depth=3, time_dim=8)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    rldt_gym.save_base(policy, path, env_id="Hopper-v4")
    return path


@pytest.fixture(scope="session")
def tiny_flags(tiny_base):
    """Flags of a Hopper run of six iterations that takes about a second."""
    flags = dict(
        env_id="Hopper-v4", base=tiny_base, chunk=2, euler_steps=4, actor_width=16, time_dim=8, device=DEVICE, seed=3,
        iterations=6, num_envs=4, rollout_chunks=12, buffer_iterations=2, eval_every=4, eval_episodes=2,
        final_eval_episodes=3, rounds=2, critic_steps=2, critic_batch=16, critic_width=16, segments=8, segment_chunks=4,
        warmup_iterations=1, warmup_factor=1, actor_steps=1, actor_batch=8, n_particles=3, actor_lr=1e-3,
        actor_warmup=2,
    )  # fmt: skip
    return [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]


@pytest.fixture
def tiny_args(tiny_flags, tmp_path):
    """Makes the arguments of a tiny run below tmp_path; keywords change fields."""

    def make(**changes):
        args = rldt_gym.parse_args([*tiny_flags, f"--runs={tmp_path / 'runs'}"])
        for key, value in changes.items():
            assert hasattr(args, key)
            setattr(args, key, value)
        return args

    return make


@pytest.fixture
def only_run(tmp_path):
    """The one run directory below tmp_path."""

    def find(parent=tmp_path / "runs"):
        (run,) = parent.iterdir()
        return run

    return find


@pytest.fixture(scope="session")
def finished_run(tiny_flags, tmp_path_factory):
    """The directory and the returned result of one complete tiny run; read it, do not write to it."""
    runs = tmp_path_factory.mktemp("finished")
    handler, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    result = rldt_gym.main(rldt_gym.parse_args([*tiny_flags, f"--runs={runs}"]))
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(threads)
    (run,) = runs.iterdir()
    return run, result


@pytest.fixture
def d4rl_arrays():
    """Two episodes, of 5 and 4 steps, as D4RL stores them."""
    rng = np.random.default_rng(0)
    terminals, timeouts = np.zeros(9, bool), np.zeros(9, bool)
    terminals[4], timeouts[8] = True, True
    return dict(
        observations=rng.normal(size=(9, 3)).astype(np.float32),
        actions=rng.uniform(-1, 1, (9, 2)).astype(np.float32),
        rewards=rng.normal(size=9).astype(np.float32),
        terminals=terminals,
        timeouts=timeouts,
    )


@pytest.fixture
def scripted_evaluations(monkeypatch):
    """Replaces a script's `evaluate` by one that gives these returns in turn; the seeds of its episodes and its policies are recorded."""

    def replace(module, returns):
        episodes_of, policies, returns = [], [], iter(returns)

        def evaluate(policy, args, episodes, seed):
            episodes_of.append(set(range(seed, seed + 2 * episodes)))  # environment i has seed + i
            policies.append(copy.deepcopy(policy))
            value = next(returns)
            return {"zero": np.full(episodes, value), "noise": np.full(episodes, value - 1)}

        monkeypatch.setattr(module, "evaluate", evaluate)
        return episodes_of, policies

    return replace


def check_resumed_run_keeps_its_base(script, run):
    """Resumes a finished run whose base policy is no longer where its arguments say, and checks that it goes on from the one it kept."""
    stored = run / "args.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"base": str(run / "gone.safetensors")}))
    before = script.load_policy(run / "base_policy.pt", "cpu").state_dict()
    script.main(script.parse_args(["--resume", str(run)]))
    for key, value in script.load_policy(run / "base_policy.pt", "cpu").state_dict().items():
        assert torch.equal(value, before[key]), key
