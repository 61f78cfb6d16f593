"""Speed and memory of rldt_robomimic.py: simulators, image encoder, sampler and update steps.

    python -m benchmark.throughput_robomimic            # writes benchmark/results/throughput_robomimic.csv and a figure

env            environment steps of random chunks, per number of workers, without and with images; `robosuite` is one process
               that calls robosuite's own env.step and, with images, renders in every step, as robomimic's environment does
memory         of the main process and the workers at the end of the same, in MiB: pages that only they hold (USS)
encode         images through the encoder, forward, and forward and backward
sample         actions of `batch` states with P particles; `once` encodes each state once, `per-step` in every Euler step, and
               `per-particle` in every Euler step for every particle, which is what a velocity network that contains the encoder does
update         critic and actor updates at the preset's batches, per setting of --encoder

Medians of interleaved repeats for all but `env` and `memory`. Run it on an idle machine.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro

import rldt_robomimic as script
from benchmark.tools import COLORS, IMAGES, RESULTS, provenance, pyplot, save_figure, write_csv
from envs.robomimic import IMAGE_SIZE, MODEL_SEED, TASKS, RobomimicVectorEnv, choose_renderer, make_robosuite


@dataclass
class Args:
    task: str = "square"
    """Task."""
    workers: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of simulator processes."""
    env_seconds: float = 15.0
    """Least time per measurement of the simulators."""
    batch: int = 64
    """States per encoding and per call of the sampler."""
    threads: int = 2
    """CPU threads of torch."""
    repeats: int = 5
    """Interleaved repeats, of which the median is taken."""
    device: str = "cpu"
    """Torch device."""
    out: Path = RESULTS / "throughput_robomimic.csv"
    """CSV to write."""
    images: Path = IMAGES
    """Directory for the figure."""


def time_workers(task: str, images: bool, workers: int, seconds: float) -> tuple[float, float]:
    """Environment steps per second, resets left out, and memory in MiB."""
    envs = RobomimicVectorEnv(workers, task=task, images=images, stop_on_success=False)
    everyone, rng = np.ones(workers, bool), np.random.default_rng(0)
    envs.reset(np.arange(workers), everyone)
    envs.step(np.zeros((workers, envs.chunk, envs.action_dim)), everyone)
    steps, spent = 0, 0.0
    while spent < seconds:
        for _ in range(10):
            chunks = rng.uniform(-1, 1, (workers, envs.chunk, envs.action_dim))
            start = time.perf_counter()
            envs.step(chunks, everyone)
            spent, steps = spent + time.perf_counter() - start, steps + workers * envs.chunk
        envs.reset(np.arange(workers), everyone)
    process = psutil.Process()
    memory = sum(p.memory_full_info().uss for p in [process, *process.children(recursive=True)]) / 2**20
    envs.close()
    return steps / spent, memory


def time_robosuite(task: str, images: bool, seconds: float) -> float:
    """Environment steps per second of robosuite's own step in one process."""
    np.random.seed(MODEL_SEED)  # noqa: NPY002
    env = make_robosuite(task, images, fast_render=True)
    rng, steps = np.random.default_rng(0), 0
    env.reset()
    env.step(np.zeros(env.action_dimension))
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            env.step(rng.uniform(-1, 1, env.action_dimension))
        steps += 10
    elapsed = time.perf_counter() - start
    env.env.close()
    return steps / elapsed


def medians(cases: dict[tuple, tuple], repeats: int) -> dict[tuple, float]:
    """{name: (call, items)} -> items per second, the median of interleaved repeats."""
    times = {name: [] for name in cases}
    for call, _ in cases.values():
        call()
    for _ in range(repeats):
        for name, (call, _) in cases.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: items / statistics.median(times[name]) for name, (_, items) in cases.items()}


def network_cases(args: Args) -> dict[tuple, tuple]:
    spec, B = TASKS[args.task], args.batch
    state_dim, action_dim = 9 * spec.robots, 7 * spec.robots
    observe = lambda n: {
        "state": torch.randn(n, state_dim, device=args.device),
        "rgb": torch.randint(0, 256, (n, 3 * len(spec.cameras), IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=args.device),
    }
    cases = {}
    for bf16 in (True, False):
        cfg = script.resolve(script.Args(task=args.task, obs="image", bf16=bf16, device=args.device, threads=args.threads))
        variant, P, K = "bf16" if bf16 else "fp32", cfg.n_particles, cfg.euler_steps
        new = lambda: script.FlowPolicy(state_dim, action_dim, len(spec.cameras), cfg.chunk, K, cfg.actor_width, cfg.actor_depth, cfg.time_dim)
        policy, obs = new().to(args.device), observe(B)

        def forward(policy=policy, obs=obs, cfg=cfg):
            with torch.no_grad(), script.autocast(cfg):
                return policy.encode(obs)

        def backward(policy=policy, obs=obs, cfg=cfg):
            with script.autocast(cfg):
                loss = policy.encode(obs).square().sum()
            loss.backward()

        cases["encode", f"forward, {variant}"] = forward, B * len(spec.cameras)
        cases["encode", f"forward and backward, {variant}"] = backward, B * len(spec.cameras)
        if not bf16:
            continue
        repeated = {name: value.repeat_interleave(P, 0) for name, value in obs.items()}

        @torch.no_grad()
        def sample(how, policy=policy, obs=obs, repeated=repeated, cfg=cfg):
            with script.autocast(cfg):
                x = torch.randn(B * P, policy.action_size, device=args.device)
                cond = policy.encode(obs).repeat_interleave(P, 0)
                for k in range(K):
                    if how == "per-step" and k:
                        cond = policy.encode(obs).repeat_interleave(P, 0)
                    elif how == "per-particle":
                        cond = policy.encode(repeated)
                    x = x + policy.velocity(x, torch.full((), k / K, device=args.device), cond) / K

        for how in ("once", "per-step", "per-particle"):
            cases["sample", how] = lambda how=how, sample=sample: sample(how), B * P

        for encoder in ("frozen", "shared", "own"):
            cfg_e = replace(cfg, encoder=encoder)
            actor = new().to(args.device)
            own = script.Encoder(len(spec.cameras), state_dim).to(args.device) if encoder == "own" else None
            critic = script.Critic(actor.cond_dim, actor.action_size, cfg.critic_width, cfg.critic_depth, True, "default", own).to(args.device)
            target, reference = script.copy.deepcopy(critic), script.copy.deepcopy(actor).requires_grad_(False)
            if encoder == "frozen":
                actor.encoder.requires_grad_(False)
            seen = lambda n, encoder=encoder, actor=actor: {"state": torch.randn(n, actor.cond_dim)} if encoder == "frozen" else observe(n)
            critic_obs, actor_obs = seen(cfg.critic_batch), seen(cfg.actor_batch)
            action, y = torch.randn(cfg.critic_batch, actor.action_size), torch.rand(cfg.critic_batch)
            critic_opt = torch.optim.Adam(critic.parameters(), fused=True)
            actor_opt = torch.optim.Adam([p for p in actor.parameters() if p.requires_grad], fused=True)
            cases["critic_update", encoder] = (
                lambda a=(critic, target, actor, critic_opt, critic_obs, action, y, cfg_e): script.update_critic(*a), 1)  # fmt: skip
            cases["actor_update", encoder] = (
                lambda a=(actor, reference, critic, actor_opt, actor_obs, cfg_e): script.update_actor(*a), 1)  # fmt: skip
    return cases


def plot(rows: list[dict], args: Args):
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    pick = lambda name: {row["variant"]: row["value"] for row in rows if row["name"] == name}
    for images, color, label in (("state", COLORS["blue"], "state"), ("image", COLORS["orange"], "with images")):
        values = {int(v.split()[1]): x for v, x in pick("env").items() if v.startswith(images) and "robosuite" not in v}
        axes[0].plot(list(values), list(values.values()), "o-", color=color, label=label)
        axes[0].axhline(pick("env")[f"{images} robosuite"], color=color, ls="--", lw=1)
        memory = {int(v.split()[1]): x / 1024 for v, x in pick("memory").items() if v.startswith(images)}
        axes[1].plot(list(memory), list(memory.values()), "o-", color=color, label=label)
    axes[0].set(xlabel="workers", ylabel="environment steps/s", title="simulators (dashed: robosuite's own step)", ylim=(0, None))
    axes[1].set(xlabel="workers", ylabel="GiB", title="memory", ylim=(0, None))
    axes[0].legend()
    sample = pick("sample")
    axes[2].bar(["once\nper state", "per ODE\nstep", "per step and\nparticle"], list(sample.values()), color=COLORS["green"])
    axes[2].set(ylabel="actions/s", title="sampler, by when images are encoded")
    for i, value in enumerate(sample.values()):
        axes[2].text(i, value, f"{value:.0f}", ha="center", va="bottom", fontsize=9)
    save_figure(figure, args.images / "throughput_robomimic.png")


def main(args: Args):
    torch.set_num_threads(args.threads)
    choose_renderer()
    rows, source = [], provenance()
    add = lambda name, variant, value, unit: rows.append(dict(name=name, variant=variant, value=value, unit=unit, task=args.task,
                                                              threads=args.threads, device=args.device, **source))  # fmt: skip
    for obs in ("state", "image"):
        for workers in args.workers:
            speed, memory = time_workers(args.task, obs == "image", workers, args.env_seconds)
            add("env", f"{obs} {workers}", speed, "env steps/s")
            add("memory", f"{obs} {workers}", memory, "MiB")
            print(f"{obs}, {workers} workers: {speed:.0f} env steps/s, {memory:.0f} MiB", flush=True)
    for (name, variant), value in medians(network_cases(args), args.repeats).items():
        unit = {"encode": "images/s", "sample": "actions/s"}.get(name, "updates/s")
        add(name, variant, value, unit)
        print(f"{name}, {variant}: {value:.4g} {unit}", flush=True)
    for obs in ("state", "image"):  # last: it opens a renderer in this process
        add("env", f"{obs} robosuite", time_robosuite(args.task, obs == "image", args.env_seconds), "env steps/s")
    write_csv(args.out, rows)
    plot(rows, args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
