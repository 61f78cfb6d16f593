"""How fast the environments are, and how fast whole runs train. Run it on an idle machine.

    python -m benchmark.throughput gym robomimic furniture
    python -m benchmark.throughput gym --no-envs --device cuda --extra="--precision float32"
    python -m benchmark.throughput steps --against 980ffc2    # the parts of an iteration, of two commits

Rows of benchmark/results/throughput.csv of the same case, device and threads are replaced; others stay.

env        environment steps per second: of Gym per backend, of robomimic and furniture per number of
           environments. Chunks are random; furniture repeats those of the scripted assembler
training   of a run's iterations after its first, without evaluations: rates of environment and gradient
           steps (calls of an optimiser's step), and the peak memory of the whole run
steps      of Walker2d's default iteration: milliseconds of one call of each part, its matrix products in
           GFLOP, and the share of what a product of 4096 x 1024 x 1024 reaches; both commits take turns
"""

import importlib
import inspect
import itertools
import json
import multiprocessing
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.tensorboard import SummaryWriter

from baselines import families
from benchmark.run import GYM, METHODS
from benchmark.tools import RESULTS, markdown, provenance, replace_rows
from common.settings import parse_args
from envs.vector import VectorEnv, envpool_has

KEY = ("family", "name", "variant", "task", "preset", "unit", "threads", "device", "args")
Rows = list[tuple]  # name, variant, task, value, unit


@dataclass
class Args:
    families: tyro.conf.Positional[tuple[str, ...]]  # of: gym, robomimic, furniture, steps
    envs: bool = True  # time the environments
    training: bool = True  # time runs
    methods: tuple[str, ...] = tuple(METHODS)  # that are trained on Gym
    tasks: tuple[str, ...] = GYM  # of Gym
    numbers: tuple[int, ...] = (1, 2, 4, 8)  # of simulators of robomimic and environments of furniture
    device: str = "cpu"  # torch device of the runs
    threads: int = 1  # CPU threads
    seconds: float = 10.0  # least time per measurement of the environments
    measured: int = 4  # training iterations that are measured
    extra: str = ""  # flags for the runs, as --extra="--precision float32"
    against: str = "HEAD"  # commit whose steps are timed beside those of the checkout
    out: Path = RESULTS / "throughput.csv"  # CSV to write


def rate(envs, chunks: np.ndarray, seconds: float) -> float:
    """Environment steps per second of chunks (T, N, chunk, action_dim), the first reset left out."""
    steps, spent = 0, 0.0
    while spent < seconds:
        envs.reset(0)
        for actions in chunks:
            start = time.perf_counter()
            steps += envs.step(actions).length.sum()
            spent += time.perf_counter() - start
    envs.close()
    return steps / spent


def random_chunks(envs, count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, envs.num_envs, 4, envs.action_dim))


def gym_envs(args: Args) -> Rows:
    rows = []
    for task in args.tasks:
        for backend in ("envpool", "gymnasium") if envpool_has(task) else ("gymnasium",):
            envs = VectorEnv(task, 20, args.threads, backend)
            value = rate(envs, random_chunks(envs, 50), args.seconds)
            rows.append(("env", backend, task, value, "env steps/s"))
    return rows


def robomimic_envs(args: Args) -> Rows:
    from envs.robomimic import RobomimicVectorEnv, choose_renderer

    choose_renderer()
    rows = []
    for kind in ("state", "image"):
        for n in args.numbers:
            envs = RobomimicVectorEnv(n, task="square", images=kind == "image")
            value = rate(envs, random_chunks(envs, 10), args.seconds)
            rows.append(("env", f"{kind} {n}", "square", value, "env steps/s"))
    return rows


def furniture_envs(args: Args) -> Rows:
    from demos.make_furniture_demos import ASSEMBLERS, run_episode
    from envs.furniture_mujoco import FurnitureEnv, FurnitureVectorEnv

    rows, seeds = [], range(max(args.numbers))
    for task, assembler in ASSEMBLERS.items():
        env = FurnitureEnv(task, "low")
        found = [run_episode(env, assembler, seed, noise=0.0)["actions"] for seed in seeds]
        count = min(map(len, found)) // 8
        chunks = np.stack([actions[: 8 * count].reshape(count, 8, -1) for actions in found], 1)
        for n in args.numbers:
            envs = FurnitureVectorEnv(n, task, "low", threads=args.threads)
            value = rate(envs, chunks[:, :n], args.seconds)
            rows.append(("env", str(n), task, value, "control steps/s"))
    return rows


def resident_mib(process: psutil.Process) -> float:
    """Memory of a process and its children in MiB, shared pages once."""
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try:
            total += p.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
            continue
    return total / 2**20


def counted_run(name: str, flags: list[str], path: Path):
    """Runs a script; writes env steps, gradient steps and seconds of each iteration's end."""
    module, add_scalar = importlib.import_module(name), SummaryWriter.add_scalar
    count, marks = 0, {}

    def counted(*_):
        nonlocal count
        count += 1

    def recorded(self, tag, value, env_steps, *rest):
        marks.setdefault(env_steps, (count, time.perf_counter()))
        add_scalar(self, tag, value, env_steps, *rest)

    register_optimizer_step_post_hook(counted)
    SummaryWriter.add_scalar = recorded
    own, shared = (module.Args, module.PRESETS, "", flags), getattr(module, "SHARED", None)
    module.main(families.parse_args(shared, *own) if shared else parse_args(*own))
    path.write_text(json.dumps(sorted(marks.items())))


def train(variant: str, task: str, name: str, flags: str, args: Args) -> Rows:
    """Rates of a short run over its last `measured` iterations, and its peak memory."""
    flags += f" --warmup-iterations 1 --iterations {args.measured + 3} --threads {args.threads}"
    flags += f" --eval-every 1000 --eval-episodes 8 --final-eval-episodes 8 --device {args.device}"
    with tempfile.TemporaryDirectory() as folder:
        path, words = Path(folder, "marks.json"), shlex.split(f"{flags} {args.extra} --runs {folder}")
        context = multiprocessing.get_context("spawn")
        process, peak = context.Process(target=counted_run, args=(name, words, path)), 0.0
        process.start()
        while process.is_alive():
            peak = max(peak, resident_mib(psutil.Process(process.pid)))
            process.join(0.25)
        if process.exitcode:
            raise SystemExit(f"{name} {flags} failed")
        marks = json.loads(path.read_text())
    (first, (updates, start)), (last, (more_updates, end)) = marks[-1 - args.measured], marks[-1]
    updates, seconds = more_updates - updates, end - start
    values = {
        "env steps/s": (last - first) / seconds,
        "gradient steps/s": updates / seconds,
        "gradient steps/1000 env steps": 1000 * updates / (last - first),
        "s/iteration": seconds / args.measured,
        "MiB": peak,
    }
    return [("training", variant, task, value, unit) for unit, value in values.items()]


def runs(family: str, args: Args) -> list[tuple[str, str, str, str]]:
    """What `train` takes for each run of a family."""
    found = []
    if family == "gym":
        for task, method in itertools.product(args.tasks, args.methods):
            name, flags = METHODS[method]
            flags += f" --env-id {task}" + (" --critic-iterations 0" if method == "sac" else "")
            found.append((method, task, name.replace("rldt", "rldt_gym"), flags))
    if family == "robomimic":
        for kind, n in itertools.product(("state", "image"), args.numbers):
            flags = f"--task square --obs {kind} --num-envs {n}"
            found.append((f"{kind} {n}", "square", "rldt_robomimic", flags))
    if family == "furniture":
        for task in ("one_leg", "lamp"):
            found.append(("rldt", task, "rldt_furniture", f"--furniture {task}"))
    return found


def step_times(threads: int, seconds: float, device: str):
    """Prints for each part of an iteration its calls, and milliseconds and GFLOP of one, as JSON."""
    import copy
    import json
    import time

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import rldt_gym as script

    torch.set_default_device(device)
    args = script.Args(env_id="Walker2d-v4", device=device, threads=threads)
    script.set_up(args)
    policy = script.FlowPolicy.load(script.dataset.DEMOS / args.env_id / "base.safetensors").to(device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    critic = script.Critic(policy.obs_dim, policy.action_size, True)
    target = copy.deepcopy(critic).requires_grad_(False)
    adam = lambda network: torch.optim.Adam(network.parameters(), 1e-5, fused=True)
    actor_adam, critic_adam = adam(policy.velocity), adam(critic)
    T, L, B = script.SEGMENT, args.segments, args.critic_batch
    batch = {name: torch.rand(T, L) for name in ("reward", "terminated", "truncated")}
    batch["next_obs"] = torch.randn(T, L, policy.obs_dim)
    obs, action, y = torch.randn(B, policy.obs_dim), torch.randn(B, policy.action_size), torch.randn(B)
    products = torch.float32 if getattr(args, "precision", "") == "float32" else torch.bfloat16
    a, b = torch.randn(4096, 1024, dtype=products), torch.randn(1024, 1024, dtype=products)
    parts = {
        "ceiling": lambda: a @ b,
        "critic_target": lambda: script.critic_target(policy, target, batch, 1.0, 0.5, args),
        "update_critic": lambda: script.update_critic(critic, target, critic_adam, obs, action, y, args),
        "update_actor": lambda: script.update_actor(
            policy, reference, critic, actor_adam, obs[: args.actor_batch], args),
    }  # fmt: skip
    steps = dict(update_critic=args.critic_steps, update_actor=args.actor_steps)
    calls = dict(ceiling=0, critic_target=1) | steps  # a round
    found = {}
    for name, part in parts.items():
        part()
        with FlopCounterMode(display=False) as counter:
            part()
        times = []
        while sum(times) < seconds:
            start = time.perf_counter()
            part()
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        median = sorted(times)[len(times) // 2]
        found[name] = args.rounds * calls[name], 1e3 * median, counter.get_total_flops() / 1e9
    print(json.dumps(found))


def compare_steps(args: Args) -> Rows:
    """Times the parts in this checkout and in that of another commit, five times in turns."""
    code = f"{inspect.getsource(step_times)}\nstep_times({args.threads}, 1.0, {args.device!r})"
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "other")
        subprocess.run(["git", "worktree", "add", "-q", "--detach", other, args.against], check=True)
        places, found = {"checkout": Path.cwd(), args.against: other}, defaultdict(list)
        for _, (variant, place) in itertools.product(range(5), places.items()):
            out = subprocess.check_output([sys.executable, "-c", code], cwd=place)
            found[variant].append(json.loads(out))
        subprocess.run(["git", "worktree", "remove", "--force", other], check=True)
    rows = []
    for variant, tries in found.items():
        total = 0.0
        for name in tries[0]:
            calls, milliseconds, gflop = np.median([tried[name] for tried in tries], 0)
            ceiling = np.median([gflop / ms for _, ms, gflop in (tried["ceiling"] for tried in tries)])
            rows.append(("steps", variant, name, milliseconds, "ms"))
            rows.append(("steps", variant, name, gflop, "GFLOP"))
            rows.append(("steps", variant, name, gflop / milliseconds / ceiling, "of ceiling"))
            total += calls * milliseconds / 1e3
        rows.append(("steps", variant, "iteration", total, "s"))
    return rows


def main(args: Args):
    torch.set_num_threads(args.threads)
    timed = {"gym": gym_envs, "robomimic": robomimic_envs, "furniture": furniture_envs}
    timed["steps"] = compare_steps
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu"
    source = provenance() | dict(threads=args.threads, device=device, preset="laptop", args=args.extra)
    for family in args.families:
        rows = timed[family](args) if args.envs else []
        for run in runs(family, args) if args.training else ():
            rows += train(*run, args)
        columns = ("name", "variant", "task", "value", "unit")
        named = [source | {"family": family} | dict(zip(columns, row, strict=True)) for row in rows]
        print(markdown([{column: row[column] for column in columns} for row in named]))
        replace_rows(args.out, named, KEY)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
