"""How fast the training steps are, against this machine's matrix products and against plain versions.

    python -m benchmark.throughput                      # writes benchmark/results/throughput.csv

All cases are measured in one run, in interleaved repeats, and the medians are reported:

matmul             the best of several F.linear sizes, per dtype: the machine's ceiling
env                environment steps, per task and backend
rollout            sampled actions with exploration noise, num_envs at a time
critic_target      TD(lambda) targets of one round, per transition
critic_update      one step of both critics and their targets
actor_update       one step of the actor, sampling of its trajectories included
training_iteration composed from the medians of the above at the settings of rldt_gym.py

Variants: `rldt` is the shipped step (bfloat16 autocast, also with --preset paper, whose default it is not);
`rldt-fp32` the same with --no-bf16 (on CUDA its products, like those of `plain` and of the ceiling, are TF32);
`rldt-compile` the same as `rldt` with --compile; `rldt-graphs`, on CUDA, compiled to CUDA graphs; `plain` the same mathematics written the plain way in this file: eager fp32, two
separate critics, Adam without foreach or fused, Polyak averaging parameter by parameter, one velocity pass
each for transport and constraint, particles sampled anew, and the velocity of the exploration noise
evaluated again. `plain` is batched over states and particles like the shipped step and leaves out its
diagnostics, so it is a fair opponent.

Floating-point operations are counted for matrix products only, 2 per multiply-add. V, T: a forward pass of
the velocity's trunk and of its time MLP for one point; C: of both critics. Backward is twice forward, less
what is not needed: the critic's gradient with respect to its inputs (C1, its first layer) in its own update,
and to its weights in the actor's.

rollout        per action      K V                            plain: (K + 1) V
critic_target  per transition  value_samples (K V + C)
critic_update  per transition  3 C - C1
actor_update   per particle    K V + 7 (V + T) + 2 C          plain: 2 K V + 7 (V + T) + 2 C
"""

import copy
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

import rldt_gym
from benchmark.tools import RESULTS, provenance, write_csv
from common.flow import sample
from envs.vector import VectorEnv, envpool_has

SIZES = ((2048, 512, 512), (4096, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096))
TASKS = "Hopper-v4", "Walker2d-v4", "HalfCheetah-v4"
ROLLOUT_CHUNKS = 4  # chunks per measured call of the rollout and of the environments


@dataclass
class Args:
    env_id: str = "Hopper-v4"
    """Task whose observation and action sizes the networks get."""
    preset: Literal["laptop", "paper"] = "laptop"
    """Preset of rldt_gym.py whose settings the steps have."""
    tasks: tuple[str, ...] = TASKS
    """Tasks whose environments are timed."""
    device: str = "cpu"
    """Torch device."""
    threads: int = 1
    """CPU threads."""
    compare_threads: int = 2
    """Also measure the steps with this many CPU threads; 0: don't."""
    repeats: int = 7
    """Interleaved repeats, of which the median is taken."""
    seconds: float = 0.3
    """Least time per case and repeat, after one call to warm up."""
    compile: bool = False
    """Also measure torch.compile'd networks, on CUDA with and without CUDA graphs."""
    out: Path = RESULTS / "throughput.csv"
    """CSV to write."""


@dataclass
class Case:
    """Something to time: `call` does `items` of `unit` and `flop` floating-point operations."""

    name: str
    variant: str
    threads: int
    call: Callable[[], object]
    items: float
    unit: str
    flop: float = 0.0
    dtype: str = "fp32"
    seconds: float = 0.0  # the median of a call


class IdleEnv:
    """Stands in for a VectorEnv that takes no time."""

    def __init__(self, num_envs: int, obs_dim: int):
        self.obs = np.random.default_rng(0).standard_normal((num_envs, obs_dim), np.float32)
        self.result = self.obs, np.ones(num_envs), *np.zeros((2, num_envs), bool), np.full(num_envs, 4)

    def step(self, chunks):
        return self.result


class PlainCritic(nn.Module):
    """Two Q networks, one after the other."""

    def __init__(self, obs_dim: int, action_size: int, width: int, depth: int, layer_norm: bool):
        super().__init__()
        self.q1, self.q2 = (self.network(obs_dim + action_size, width, depth, layer_norm) for _ in range(2))

    def network(self, size: int, width: int, depth: int, layer_norm: bool) -> nn.Sequential:
        layers = []
        for _ in range(depth):
            layers += [nn.Linear(size, width), nn.LayerNorm(width) if layer_norm else nn.Identity(), nn.SiLU()]
            size = width
        return nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, obs, action):
        x = torch.cat([obs, action], -1)
        return self.q1(x)[:, 0], self.q2(x)[:, 0]


# ----------------------------------------------------------------------------------- the steps
def shipped_steps(cfg: rldt_gym.Args, policy, critic, data: dict, mode: str | None = None) -> dict[str, Callable]:
    """One call of each step as rldt_gym.main makes it, the networks compiled in a mode of torch.compile if one is given."""
    policy, critic = copy.deepcopy(policy), copy.deepcopy(critic)
    reference, target = (copy.deepcopy(net).requires_grad_(False) for net in (policy.velocity, critic))
    if mode:
        for net in (policy.velocity, critic, target, reference):
            net.compile(mode=mode)
    actor_optimizer = torch.optim.Adam(policy.velocity.parameters(), cfg.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), cfg.critic_lr, fused=True)
    envs, slot, returns = IdleEnv(cfg.num_envs, data["obs"].shape[-1]), data["slot"], np.zeros(cfg.num_envs)
    obs, action, y = (data[key][: cfg.critic_batch] for key in ("obs", "action", "y"))
    states = data["obs"][: cfg.actor_batch]

    def actor():
        with torch.no_grad(), rldt_gym.autocast(cfg):
            trajectory = policy.sample(states[:, None].expand(-1, cfg.n_particles, -1), trajectory=True)
        rldt_gym.update_actor(policy.velocity, reference, critic, actor_optimizer, states, trajectory, cfg)

    return {
        "rollout": lambda: rldt_gym.collect(policy, envs, slot, [], returns, cfg),
        "critic_target": lambda: rldt_gym.critic_target(policy, target, data["batch"], 1.0, cfg),
        "critic_update": lambda: rldt_gym.update_critic(critic, target, critic_optimizer, obs, action, y, cfg),
        "actor_update": actor,
    }


def plain_steps(cfg: rldt_gym.Args, policy, data: dict) -> dict[str, Callable]:
    """The same steps in eager fp32, nothing shared between them."""
    policy, K, P = copy.deepcopy(policy), cfg.euler_steps, cfg.n_particles
    velocity, D, device = policy.velocity, policy.action_size, data["obs"].device
    critic = PlainCritic(data["obs"].shape[-1], D, cfg.critic_width, cfg.critic_depth, cfg.critic_layer_norm).to(device)
    reference, target = (copy.deepcopy(net).requires_grad_(False) for net in (velocity, critic))
    actor_optimizer = torch.optim.Adam(velocity.parameters(), cfg.actor_lr, foreach=False, fused=False)
    critic_optimizer = torch.optim.Adam(critic.parameters(), cfg.critic_lr, foreach=False, fused=False)
    envs, batch = IdleEnv(cfg.num_envs, data["obs"].shape[-1]), data["batch"]
    obs, action, y = (data[key][: cfg.critic_batch] for key in ("obs", "action", "y"))
    states = data["obs"][: cfg.actor_batch, None].expand(-1, P, -1)  # (B, P, obs_dim)

    def noise(x):
        return torch.randn(*x.shape[:-1], D, device=device)

    @torch.no_grad()
    def rollout():
        for _ in range(cfg.rollout_chunks):
            s = policy.normalize(envs.obs)
            x = sample(velocity, s, noise(s), K, trajectory=True)
            k = K - 1 - torch.randint(cfg.exploration_steps, (len(s),), device=device)
            x_k, t = x[k, torch.arange(len(s))], k / K
            a_dagger = x_k + (1 - t[:, None]) * velocity(x_k, t, s)
            a = x[-1] + (x[-1] - a_dagger).norm(dim=-1, keepdim=True) * torch.randn_like(x_k)
            envs.step(policy.to_env(a))

    @torch.no_grad()
    def critic_target():
        s = batch["next_obs"].flatten(0, 1).repeat(cfg.value_samples, 1)
        value = torch.minimum(*target(s, sample(velocity, s, noise(s), K)))
        value = value.view(cfg.value_samples, *batch["reward"].shape).mean(0)
        ends = batch["terminated"], batch["truncated"]
        return rldt_gym.td_lambda(batch["reward"], *ends, value, cfg.gamma, cfg.td_lambda)

    def critic_update():
        q1, q2 = critic(obs, action)
        loss = F.mse_loss(q1, y) + F.mse_loss(q2, y)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        with torch.no_grad():
            for old, new in zip(target.parameters(), critic.parameters(), strict=True):
                old.copy_(cfg.target_momentum * old + (1 - cfg.target_momentum) * new)

    def actor_update():
        trajectory = sample(velocity, states, noise(states), K, trajectory=True)
        particles = sample(velocity, states, noise(states), K).requires_grad_()
        k = torch.randint(K, states.shape[:2], device=device)
        x = trajectory.gather(0, k[None, ..., None].expand(1, -1, -1, D))[0]
        t = (k / K)[..., None]
        a_dagger = x + (1 - t) * velocity(x, t[..., 0], states)
        q1, q2 = critic(states.reshape(-1, states.shape[-1]), particles.view(-1, D))
        (grad_q,) = torch.autograd.grad((q1 + q2).sum() / 2, particles)
        with torch.no_grad():
            difference = a_dagger[:, :, None] - particles[:, None]  # (B, P, P, D)
            distance2 = difference.square().sum(-1)
            h = (distance2.quantile(0.5, dim=-1) / (2 * np.log(P + 1))).clamp(min=1e-8)[..., None]
            kappa = torch.exp(-distance2 / (2 * h))[..., None]
            alpha = cfg.alpha * grad_q.norm(dim=-1).mean(1)[:, None, None, None]
            phi = (kappa * grad_q[:, None] + alpha * kappa * difference / h[..., None]).mean(2)
        t_c = torch.randint(K, states.shape[:2], device=device)[..., None] / K
        x_c = (1 - t_c) * torch.randn_like(x) + t_c * trajectory[-1]
        transport = (a_dagger - (a_dagger + phi).detach()).square().sum(-1).mean() / K
        consistency = ((a_dagger - trajectory[-1]).square().sum(-1) / (K * (1 - t[..., 0])).square()).mean()
        v_ref = reference(x_c, t_c[..., 0], states)
        constraint = (velocity(x_c, t_c[..., 0], states) - v_ref).square().sum(-1).mean()
        loss = transport + cfg.consistency_weight * consistency + cfg.constraint_weight * constraint
        actor_optimizer.zero_grad()
        loss.backward()
        actor_optimizer.step()

    return {
        "rollout": rollout, "critic_target": critic_target,
        "critic_update": critic_update, "actor_update": actor_update,
    }  # fmt: skip


def count_flop(cfg: rldt_gym.Args, policy, critic, plain: bool) -> dict[str, float]:
    """Floating-point operations of one call, as in the module's docstring."""
    products = lambda net: 2 * sum(p.numel() for p in net.parameters() if p.dim() > 1)
    V, T, C = products(policy.velocity.trunk), products(policy.velocity.time_mlp), products(critic)
    K, C1 = cfg.euler_steps, 2 * critic.weights[0].numel()
    return {
        "rollout": cfg.rollout_chunks * cfg.num_envs * (K + plain) * V,
        "critic_target": cfg.segments * cfg.segment_chunks * cfg.value_samples * (K * V + C),
        "critic_update": cfg.critic_batch * (3 * C - C1),
        "actor_update": cfg.actor_batch * cfg.n_particles * ((1 + plain) * K * V + 7 * (V + T) + 2 * C),
    }


# ---------------------------------------------------------------------------------- the cases
def matmul_cases(args: Args, threads: int) -> list[Case]:
    cases = []
    for dtype in torch.float32, torch.bfloat16:
        name = "fp32" if dtype == torch.float32 else "bf16"
        for m, k, n in SIZES:
            x, w = (torch.randn(size, device=args.device).to(dtype) for size in ((m, k), (n, k)))
            call = lambda x=x, w=w: F.linear(x, w)
            cases.append(Case("matmul", f"{name}-{m}x{k}x{n}", threads, call, 1, "products/s", 2.0 * m * k * n, name))
    return cases


def env_cases(args: Args, cfg: rldt_gym.Args, threads: int) -> list[Case]:
    cases = []
    for task in args.tasks:
        for backend in ("envpool", "gymnasium") if envpool_has(task) else ("gymnasium",):
            if backend == "gymnasium" and threads != args.threads:
                continue  # it has no threads
            envs = VectorEnv(task, cfg.num_envs, cfg.chunk, backend, threads=threads)
            envs.reset()
            actions = np.random.default_rng(0).uniform(-1, 1, (cfg.num_envs, cfg.chunk, envs.action_dim))
            items = cfg.num_envs * cfg.chunk * ROLLOUT_CHUNKS  # episodes that end inside a chunk: about 1 % fewer
            call = lambda envs=envs, actions=actions: [envs.step(actions) for _ in range(ROLLOUT_CHUNKS)]
            cases.append(Case(f"env {task}", backend, threads, call, items, "env steps/s"))
    return cases


def step_cases(args: Args, cfg: rldt_gym.Args, policy, critic, data: dict, threads: int) -> list[Case]:
    fp32 = copy.copy(cfg)
    fp32.bf16 = False
    variants = {"rldt": shipped_steps(cfg, policy, critic, data)}
    variants["rldt-fp32"] = shipped_steps(fp32, policy, critic, data)
    if args.compile:
        variants["rldt-compile"] = shipped_steps(cfg, policy, critic, data, "default")
        if args.device.startswith("cuda"):
            variants["rldt-graphs"] = shipped_steps(cfg, policy, critic, data, "reduce-overhead")
    variants["plain"] = plain_steps(cfg, policy, data)
    transitions = cfg.segments * cfg.segment_chunks
    items = {
        "rollout": (cfg.num_envs * cfg.rollout_chunks, "actions/s"), "critic_target": (transitions, "transitions/s"),
        "critic_update": (1, "updates/s"), "actor_update": (1, "updates/s"),
    }  # fmt: skip
    cases = []
    for variant, steps in variants.items():
        flop = count_flop(cfg, policy, critic, variant == "plain")
        dtype = "bf16" if cfg.bf16 and variant in ("rldt", "rldt-compile", "rldt-graphs") else "fp32"
        cases += [Case(name, variant, threads, call, *items[name], flop[name], dtype) for name, call in steps.items()]
    return cases


def measure(cases: list[Case], args: Args):
    """Sets each case's median seconds per call over interleaved repeats."""

    def timed(case: Case, calls: int) -> float:
        torch.set_num_threads(case.threads)
        start = time.perf_counter()
        for _ in range(calls):
            case.call()
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    calls, times = [], [[] for _ in cases]
    for case in cases:
        timed(case, 1)
        calls.append(max(1, round(args.seconds / timed(case, 1))))
    for _ in range(args.repeats):
        for case, n, seconds in zip(cases, calls, times, strict=True):
            seconds.append(timed(case, n))
    for case, seconds in zip(cases, times, strict=True):
        case.seconds = statistics.median(seconds)


def compose_iteration(cases: list[Case], cfg: rldt_gym.Args, rollout_chunks: int, variant: str, threads: int, task: str) -> Case:
    """One training iteration of rldt_gym.py from the medians of its parts; `plain` steps Gymnasium."""
    steps = {case.name: case for case in cases if case.variant == variant and case.threads == threads}
    envs = {case.variant: case for case in cases if case.name == f"env {task}" and case.threads <= threads}
    env = envs["gymnasium"] if variant == "plain" or "envpool" not in envs else envs["envpool"]
    calls = {
        "rollout": rollout_chunks / ROLLOUT_CHUNKS, "critic_target": cfg.rounds,
        "critic_update": cfg.rounds * cfg.critic_steps, "actor_update": cfg.rounds * cfg.actor_steps,
    }  # fmt: skip
    case = Case("training_iteration", variant, threads, lambda: None, 1, "iterations/s", dtype=steps["rollout"].dtype)
    case.flop = sum(n * steps[name].flop for name, n in calls.items())
    case.seconds = sum(n * steps[name].seconds for name, n in calls.items()) + calls["rollout"] * env.seconds
    return case


def main(args: Args):
    preset = rldt_gym.Args(env_id=args.env_id, device=args.device, **(rldt_gym.PAPER if args.preset == "paper" else {}))
    cfg = dataclasses.replace(preset, bf16=True, rollout_chunks=ROLLOUT_CHUNKS, segment_chunks=min(preset.segment_chunks, preset.rollout_chunks))
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True  # as in rldt_gym.main
    envs = VectorEnv(args.env_id, 1, cfg.chunk)
    obs_dim, action_dim = envs.obs_dim, envs.action_dim
    envs.close()
    policy = rldt_gym.FlowPolicy(obs_dim, action_dim, cfg.chunk, cfg.euler_steps, cfg.actor_width, cfg.actor_depth,
                                 cfg.time_dim).to(args.device)  # fmt: skip
    critic = rldt_gym.Critic(obs_dim, policy.action_size, cfg.critic_width, cfg.critic_depth, cfg.critic_layer_norm,
                             cfg.critic_init).to(args.device)  # fmt: skip
    normal = lambda *size: torch.randn(size, device=args.device)
    T, L, n = cfg.segment_chunks, cfg.segments, max(cfg.critic_batch, cfg.actor_batch)
    data = {"obs": normal(n, obs_dim), "action": normal(n, policy.action_size), "y": normal(n)}
    data["batch"] = {"next_obs": normal(T, L, obs_dim), "reward": normal(T, L)}
    data["batch"] |= {"terminated": torch.zeros_like(normal(T, L)), "truncated": torch.zeros_like(normal(T, L))}
    replay = rldt_gym.Replay(cfg, obs_dim, policy.action_size)
    data["slot"] = replay.rollout()

    compare = args.compare_threads if args.device == "cpu" and (os.cpu_count() or 1) >= args.compare_threads else 0
    cases = []
    for threads in dict.fromkeys((args.threads, compare or args.threads)):
        cases += matmul_cases(args, threads) + env_cases(args, cfg, threads)
        cases += step_cases(args, cfg, policy, critic, data, threads)
    measure(cases, args)
    for threads in dict.fromkeys(case.threads for case in cases):
        variants = [case.variant for case in cases if case.name == "rollout" and case.threads == threads]
        cases += [compose_iteration(cases, cfg, preset.rollout_chunks, variant, threads, args.tasks[0]) for variant in variants]

    ceiling = {}  # FLOP/s by (dtype, threads)
    for case in cases:
        if case.name == "matmul":
            key = case.dtype, case.threads
            ceiling[key] = max(ceiling.get(key, 0), case.flop / case.seconds)
    plain = {(c.name, c.threads): c for c in cases if c.variant in ("plain", "gymnasium")}
    rows, source = [], provenance()
    gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
    for case in cases:
        slow = plain.get((case.name, case.threads)) or plain.get((case.name, args.threads))
        speed = case.flop / case.seconds
        share = lambda dtype, case=case, speed=speed: speed / ceiling[dtype, case.threads] if case.flop else ""
        rows.append({
            "name": case.name, "variant": case.variant, "preset": args.preset, "value": case.items / case.seconds, "unit": case.unit,
            "gflop_per_call": case.flop / 1e9 or "", "gflops_per_s": speed / 1e9 or "",
            "fraction_of_ceiling": share(case.dtype), "speedup_vs_plain": slow.seconds / case.seconds if slow else "",
            "threads": case.threads, "device": gpu, **source, "fraction_of_fp32_ceiling": share("fp32"),
        })  # fmt: skip
    number = lambda value, width: f"{value:{width}.3g}" if value != "" else " " * width
    print(f"{'name':19} {'variant':20} threads {'value':>10} {'unit':14}  GFLOP/s  of ceiling  of fp32  x plain")
    for r in rows:
        print(f"{r['name']:19} {r['variant']:20} {r['threads']:7} {r['value']:10.5g} {r['unit']:14} "
              f"{number(r['gflops_per_s'], 8)} {number(r['fraction_of_ceiling'], 11)} "
              f"{number(r['fraction_of_fp32_ceiling'], 8)} {number(r['speedup_vs_plain'], 8)}")  # fmt: skip
    write_csv(args.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
