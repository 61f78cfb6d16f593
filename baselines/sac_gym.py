"""SAC (Haarnoja et al. 2018) of Stable-Baselines3 for Gymnasium tasks, from a Gaussian actor cloned from the demonstrations.

    pip install -r baselines/requirements.txt
    python -m baselines.sac_gym --env-id Hopper-v4

is the reference without a flow: one action per decision, cloned by maximum likelihood from the data that the flow was
pretrained on. Networks and update are Stable-Baselines3's; rollouts, evaluation and run directory are rldt_gym.py's.
"""

import copy
import csv
import dataclasses
import importlib.metadata
import itertools
import json
import math
import signal
import sys
import threading
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from demos import dataset
from envs.vector import VectorEnv
from rldt_gym import FlowPolicy, evaluate, get_demonstrations, git_commit, plot_curve, record_video, write_atomically


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    env_id: str = "Hopper-v4"
    """Gymnasium task with flat Box observations and actions. Hopper-v4, Walker2d-v4 and HalfCheetah-v4 ship demonstrations."""
    preset: Literal["laptop", "paper"] = "laptop"
    """Which defaults: `laptop` (two CPU cores, minutes) or `paper` (Stable-Baselines3's, but for the entropy coefficient, a cloned actor and updates after every 1000 steps, one per step). Explicit flags win."""
    exp_name: str = "sac"
    """Name of the experiment, part of the run directory's name."""
    seed: int = 1
    """Seed of networks, minibatches, noise and environments."""
    runs: Path = Path("runs")
    """Directory in which run directories are made."""
    device: str = "auto"
    """Torch device: cpu, cuda, cuda:0, ... `auto` takes CUDA where there is one."""
    threads: int = 1
    """CPU threads of torch and EnvPool."""
    backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """Vector environments: EnvPool (C++) where it has the task, else Gymnasium."""
    bf16: bool = False
    """bfloat16 matrix products in evaluations."""

    # what to run
    resume: Path | None = None
    """Run directory to continue from its last checkpoint, with the arguments stored there."""
    evaluate: Path | None = None
    """Run directory whose final policy to load and evaluate, nothing else."""
    capture_video: bool = False
    """Record one evaluation episode of the final policy as mp4 (needs a MuJoCo GL backend, see MUJOCO_GL)."""

    # base policy
    dataset: str | None = None
    """Demonstrations: D4RL .hdf5, DPPO train.npz, or Minari id or folder; default: made by the shipped demonstrator."""
    bc_epochs: int = 10
    """Passes over the demonstrations (RLDT's flow: 40)."""
    bc_batch: int = 512
    """Actions per step of the cloning (RLDT's flow: 512)."""
    bc_lr: float = 1e-3
    """Adam step size of the cloning (RLDT's flow: 1e-3)."""
    actor_width: int = 256
    """Width of the two hidden layers of actor and critics (Stable-Baselines3: 256)."""

    # rollouts
    iterations: int = 0
    """Training iterations, the evaluation-only ones included; 0: 205 for Hopper-v4, else 710 (1 M and 3.5 M steps), without limit under `wall_budget_s`."""
    wall_budget_s: float = 0.0
    """Seconds of training and evaluation after which the run makes its final evaluation and ends; 0: no limit. `iterations`, if given, may end it sooner."""
    num_envs: int = 20
    """Parallel environments (Stable-Baselines3: 1)."""
    rollout_steps: int = 250
    """Steps per environment and iteration (Stable-Baselines3: 1)."""
    eval_every: int = 40
    """Every n-th iteration only evaluates, and resets the environments."""
    eval_episodes: int = 20
    """Episodes per evaluation during training, with the mean action and again with sampled ones (RLDT's authors: 100)."""
    final_eval_episodes: int = 100
    """Episodes of the base, final and best evaluations, with the mean action and again with sampled ones (RLDT's authors: 100)."""
    buffer_size: int = 1_000_000
    """Transitions in the replay (Stable-Baselines3: 1 000 000)."""

    # updates
    warmup_iterations: int = 4
    """Iterations that collect with the cloned actor before the first update (Stable-Baselines3: 100 random steps)."""
    critic_iterations: int = 10
    """Iterations after those that train the critics alone, since an untrained critic ruins a cloned actor (Stable-Baselines3: 0)."""
    gradient_steps: int = 500
    """Updates of actor and critics per iteration (Stable-Baselines3: one per environment step)."""
    batch: int = 256
    """Transitions per update (Stable-Baselines3: 256)."""
    lr: float = 3e-4
    """Adam step size of actor, critics and entropy coefficient (Stable-Baselines3: 3e-4)."""
    gamma: float = 0.99
    """Discount per environment step (Stable-Baselines3: 0.99)."""
    tau: float = 0.005
    """Share of the critics that their targets take per update (Stable-Baselines3: 0.005)."""
    entropy_start: float = 0.1
    """First value of the learned entropy coefficient (Stable-Baselines3: 1, which blurs a cloned actor at once)."""


NO_LIMIT = 10**9  # iterations of a run that ends by wall_budget_s
PAPER = dict(iterations=1040, num_envs=1, rollout_steps=1000, gradient_steps=1000, warmup_iterations=1, critic_iterations=0, eval_every=50, eval_episodes=100)


# ----------------------------------------------------------------------------------- networks
class GaussianPolicy(FlowPolicy):
    """Stable-Baselines3's squashed Gaussian actor, with the scaling and the interface of a flow policy, chunk 1."""

    def __init__(self, actor: nn.Module, obs_dim: int, action_dim: int):
        nn.Module.__init__(self)
        self.actor, self.chunk, self.action_size = actor, 1, action_dim
        for name in self.SCALING:
            dim = obs_dim if name.startswith("obs") else action_dim
            self.register_buffer(name, torch.full((dim,), -1.0 if name.endswith("min") else 1.0))

    def sample(self, obs: torch.Tensor, x0: torch.Tensor | None = None) -> torch.Tensor:
        """Actions tanh(mean + std x0), (..., D), for normalised obs (..., obs_dim): the mean action where x0 is 0."""
        mean, log_std, _ = self.actor.get_action_dist_params(obs)
        x0 = torch.randn_like(mean) if x0 is None else x0
        return (mean + log_std.exp() * x0).tanh()


def make_sac(args: Args, obs_dim: int, action_dim: int):
    """Stable-Baselines3's SAC without an environment: its networks, and `train` on whatever `replay_buffer` samples."""
    try:
        from stable_baselines3 import SAC
        from stable_baselines3.common.logger import configure
    except ImportError as error:
        raise SystemExit("SAC needs Stable-Baselines3: pip install -r baselines/requirements.txt") from error
    model = SAC("MlpPolicy", None, learning_rate=args.lr, gamma=args.gamma, tau=args.tau, ent_coef=f"auto_{args.entropy_start}", target_entropy=-action_dim,
                buffer_size=1, policy_kwargs=dict(net_arch=[args.actor_width] * 2), device=args.device, _init_setup_model=False)  # fmt: skip
    model.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
    model.action_space = gym.spaces.Box(-1, 1, (action_dim,), np.float32)
    model.n_envs = 1
    model._setup_model()
    model.set_logger(configure(None, []))
    return model


# -------------------------------------------------------------------------------- base policy
def clone(args: Args, policy: GaussianPolicy, data: dataset.Demonstrations, log=print):
    """Maximum likelihood of the demonstrations' actions, normalised, and clipped to +-0.99 where tanh is invertible."""
    scaling = data.normalization or {
        "obs_min": data.observations.min(0), "obs_max": data.observations.max(0),
        "action_min": data.actions.min(0), "action_max": data.actions.max(0),
    }  # fmt: skip
    for name in policy.SCALING:
        getattr(policy, name).copy_(torch.as_tensor(scaling[name]))
    obs = policy.normalize(data.observations)  # (n, obs_dim)
    action = torch.as_tensor(data.actions, device=args.device)
    action = (2 * (action - policy.action_min) / (policy.action_max - policy.action_min + 1e-6) - 1).clamp(-0.99, 0.99)
    optimizer = torch.optim.Adam(policy.actor.parameters(), args.bc_lr)
    steps = max(1, args.bc_epochs * len(obs) // args.bc_batch)
    for _ in tqdm(range(steps), desc="cloning", mininterval=1):
        i = torch.randint(len(obs), (args.bc_batch,), device=args.device)
        mean, log_std, _ = policy.actor.get_action_dist_params(obs[i])
        loss = -torch.distributions.Normal(mean, log_std.exp()).log_prob(action[i].atanh()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    log(f"cloned actor: {steps} steps, negative log-likelihood {loss.item():.3f}")


# ------------------------------------------------------------------------------------- replay
Samples = namedtuple("Samples", "observations actions next_observations dones rewards discounts", defaults=[None])


class Replay:
    """A ring of transitions on the device, drawn with torch's generator, as Stable-Baselines3's `train` asks for them."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        sizes = dict(observations=obs_dim, actions=action_dim, next_observations=obs_dim, dones=1, rewards=1)
        self.data = {name: torch.zeros(args.buffer_size, size, device=args.device) for name, size in sizes.items()}
        self.added = 0

    def add(self, **values):
        """Values (N, ...) of N environments; `dones` are terminations only, so that a time limit bootstraps."""
        size, count = len(self.data["dones"]), len(values["dones"])
        i = (self.added + torch.arange(count)) % size
        for name, value in values.items():
            self.data[name][i] = torch.as_tensor(value, dtype=torch.float32, device=self.data[name].device).view(count, -1)
        self.added += count

    def sample(self, batch_size: int, env=None) -> Samples:
        i = torch.randint(min(self.added, len(self.data["dones"])), (batch_size,), device=self.data["dones"].device)
        return Samples(**{name: value[i] for name, value in self.data.items()})


# ------------------------------------------------------------------------------------ rollouts
@torch.no_grad()
def collect(policy: GaussianPolicy, envs: VectorEnv, replay: Replay, tape: list, returns: np.ndarray, args: Args):
    """Fills the replay with sampled actions; returns (env steps, returns of the episodes that ended)."""
    finished = []
    for _ in range(args.rollout_steps):
        obs = policy.normalize(envs.obs)  # (N, obs_dim)
        action = policy.sample(obs)
        chunks = policy.to_env(action)
        next_obs, reward, terminated, truncated, _ = envs.step(chunks)
        tape.append(chunks)
        replay.add(observations=obs, actions=action, next_observations=policy.normalize(next_obs), dones=terminated, rewards=reward)
        returns += reward
        done = terminated | truncated
        finished.extend(returns[done])
        returns[done] = 0
    return args.rollout_steps * args.num_envs, finished


# ------------------------------------------------------------------------------- run directory
COLUMNS = (
    "iteration,env_steps,wall_s,rollout_s,update_s,train_return,eval_return,eval_return_std,eval_return_sampled,"
    "eval_return_sampled_std,losses/critic,losses/actor,diagnostics/entropy_coefficient"
).split(",")


def write_rows(path: Path, rows: list[dict]):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def load_policy(path: Path, args: Args, envs: VectorEnv) -> GaussianPolicy:
    policy = GaussianPolicy(make_sac(args, envs.obs_dim, envs.action_dim).actor, envs.obs_dim, envs.action_dim)
    try:
        policy.load_state_dict(torch.load(path, map_location=args.device, weights_only=True))
    except Exception as error:  # torch.load raises many types on files that are not its own
        raise SystemExit(f"{path}: cannot be loaded as a policy ({error})") from error
    return policy.to(args.device)


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args: the preset sets the defaults, explicit flags win."""
    argv = sys.argv[1:] if argv is None else argv
    paper = "--preset=paper" in argv or any(pair == ("--preset", "paper") for pair in itertools.pairwise(argv))
    default = Args(preset="paper", **PAPER) if paper else Args()
    return tyro.cli(Args, args=argv, default=default, description=__doc__)


def resolve(args: Args) -> Args:
    """Fills in the device, checks ranges, and on --resume or --evaluate takes the stored arguments."""
    if args.resume or args.evaluate:
        stored = Path(args.resume or args.evaluate) / "args.json"
        if not stored.exists():
            raise SystemExit(f"{stored.parent}: not a run directory (it has no args.json)")
        kept = {"resume": args.resume} if args.resume else {
            name: getattr(args, name) for name in ("evaluate", "seed", "device", "final_eval_episodes", "capture_video", "threads")}  # fmt: skip
        ignored = [f.name.replace("_", "-") for f in dataclasses.fields(Args) if f.name not in kept and getattr(args, f.name) != f.default]
        if ignored:
            print(f"--{'resume' if args.resume else 'evaluate'} takes the stored arguments; not used: --{', --'.join(ignored)}")
        try:
            args = Args(**json.loads(stored.read_text()) | kept)
        except (ValueError, TypeError) as error:
            raise SystemExit(f"{stored}: cannot be read ({error})") from error
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: this torch sees no CUDA device; use --device cpu.")
    args.iterations = args.iterations or (NO_LIMIT if args.wall_budget_s else 205 if args.env_id == "Hopper-v4" else 710)
    for name in "num_envs rollout_steps gradient_steps batch eval_every eval_episodes final_eval_episodes threads".split():
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


# --------------------------------------------------------------------------------------- main
def main(args: Args) -> dict | None:
    args = resolve(args)
    torch.set_num_threads(args.threads)
    envs = VectorEnv(args.env_id, args.num_envs, 1, args.backend, args.seed, args.threads)
    if args.evaluate:
        policy = load_policy(Path(args.evaluate) / "policy.pt", args, envs)
        scores = evaluate(policy, args, args.final_eval_episodes, 1_000_000 * (args.seed + 1))
        for start, r in scores.items():
            print(f"{args.env_id}, {len(r)} episodes with {'the mean action' if start == 'zero' else 'sampled actions'}: {r.mean():.0f} +- {r.std():.0f}")
        if args.capture_video:
            record_video(policy, args, Path(args.evaluate) / "videos")
        return {start: r.mean() for start, r in scores.items()}
    run_dir = Path(args.resume or Path(args.runs) / f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
    run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    # networks
    if not (run_dir / "args.json").exists():
        values = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(args).items()}
        write_atomically(run_dir / "args.json", lambda p: p.write_text(json.dumps(values, indent=2)))
    model = make_sac(args, envs.obs_dim, envs.action_dim)
    policy = GaussianPolicy(model.actor, envs.obs_dim, envs.action_dim).to(args.device)
    replay = model.replay_buffer = Replay(args, envs.obs_dim, envs.action_dim)
    state = dict(iteration=0, env_steps=0, wall_s=0.0, trained=0, env_seed=0, best=-math.inf)
    tape, returns, checkpoint_path = [], np.zeros(args.num_envs), run_dir / "checkpoint.pt"
    modules = dict(policy=policy, networks=model.policy, actor_optimizer=model.actor.optimizer,
                   critic_optimizer=model.critic.optimizer, entropy_optimizer=model.ent_coef_optimizer)  # fmt: skip

    def save_checkpoint():
        saved = {key: module.state_dict() for key, module in modules.items()}
        saved |= dict(state=state, best_policy=best_policy, log_ent_coef=model.log_ent_coef.detach(), added=replay.added,
                      replay={key: value[: replay.added] for key, value in replay.data.items()}, rng=torch.get_rng_state(),
                      tape=torch.as_tensor(np.array(tape)), returns=torch.as_tensor(returns))  # fmt: skip
        write_atomically(checkpoint_path, lambda p: torch.save(saved, p))

    def reset_envs(seed: int):
        nonlocal envs
        envs.close()
        state["env_seed"] = seed
        envs = VectorEnv(args.env_id, args.num_envs, 1, args.backend, seed, args.threads)
        envs.reset()
        tape.clear()
        returns[:] = 0

    if args.resume:
        try:
            saved = torch.load(checkpoint_path, map_location=args.device, weights_only=True)
        except Exception as error:  # torch.load raises many types
            raise SystemExit(f"{checkpoint_path}: cannot be loaded ({error})") from error
        for key, module in modules.items():
            module.load_state_dict(saved[key])
        state, best_policy, replay.added = saved["state"], saved["best_policy"], saved["added"]
        for key, value in saved["replay"].items():
            replay.data[key][: len(value)] = value
        model.log_ent_coef.data.copy_(saved["log_ent_coef"])
        reset_envs(state["env_seed"])  # simulators cannot be saved: replay their actions since the last reset
        tape.extend(saved["tape"].cpu().numpy())
        for chunks in tape:
            envs.step(chunks)
        returns[:] = saved["returns"].cpu().numpy()
        torch.set_rng_state(saved["rng"].cpu())
    else:
        clone(args, policy, get_demonstrations(args, envs))
        best_policy = copy.deepcopy(policy.state_dict())
        torch.manual_seed(args.seed)  # minibatches are those of the seed, however long the cloning took

    # logging
    writer = SummaryWriter(str(run_dir), purge_step=state["env_steps"] + 1 if args.resume else None)
    csv_path = run_dir / "metrics.csv"
    rows = list(csv.DictReader(csv_path.open())) if args.resume and csv_path.exists() else []
    rows = [row for row in rows if int(row["iteration"]) < state["iteration"]]
    counted, total = ("iteration", args.iterations) if args.iterations < NO_LIMIT else ("wall_s", int(args.wall_budget_s))
    progress = tqdm(total=total, initial=min(total, int(state[counted])), unit=" s" if counted == "wall_s" else "it", desc=args.env_id, dynamic_ncols=True)
    interrupted = []
    if threading.current_thread() is threading.main_thread():  # Ctrl-C: finish the iteration and save; twice: stop at once
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.default_int_handler) and interrupted.append(1))

    # training
    row, base_seed = rows[-1] if rows else {}, 1_000_000 * (args.seed + 1)
    for iteration in range(state["iteration"], args.iterations + 1):
        tick = time.perf_counter()
        row = {"iteration": iteration}
        spent = max(iteration / args.iterations, state["wall_s"] / args.wall_budget_s if args.wall_budget_s else 0.0)  # 1: the end
        if iteration % args.eval_every == 0 or spent >= 1:  # evaluation only
            final = iteration == 0 or spent >= 1
            scores = evaluate(policy, args, args.final_eval_episodes if final else args.eval_episodes, base_seed)
            zero, noise = scores["zero"], scores["noise"]
            row |= dict(eval_return=zero.mean(), eval_return_std=zero.std(), eval_return_sampled=noise.mean(), eval_return_sampled_std=noise.std())
            if zero.mean() > state["best"] and spent < 1:
                state["best"], best_policy = float(zero.mean()), copy.deepcopy(policy.state_dict())
            if iteration == 0:
                state["base_return"], state["base_return_sampled"] = float(zero.mean()), float(noise.mean())
            reset_envs(base_seed + (iteration + 1) * max(args.num_envs, 2 * args.final_eval_episodes))
        else:
            steps, finished = collect(policy, envs, replay, tape, returns, args)
            state["env_steps"] += steps
            row["train_return"] = float(np.mean(finished)) if finished else ""
            row["rollout_s"], start = time.perf_counter() - tick, time.perf_counter()
            if state["trained"] >= args.warmup_iterations:
                critic_only = state["trained"] < args.warmup_iterations + args.critic_iterations
                before = copy.deepcopy([model.log_ent_coef.detach(), model.ent_coef_optimizer.state_dict()])
                model.actor.requires_grad_(not critic_only)  # without gradients its optimizer does nothing
                model.train(args.gradient_steps, args.batch)
                if critic_only:
                    model.log_ent_coef.data.copy_(before[0]), model.ent_coef_optimizer.load_state_dict(before[1])
                logged = model.logger.name_to_value
                row |= {"losses/critic": float(logged["train/critic_loss"]), "losses/actor": float(logged["train/actor_loss"]),
                        "diagnostics/entropy_coefficient": float(logged["train/ent_coef"])}  # fmt: skip
            row["update_s"] = time.perf_counter() - start
            state["trained"] += 1
            for key, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise FloatingPointError(f"{key} became {value} in iteration {iteration}; the last good checkpoint is {checkpoint_path}")

        state["iteration"] = args.iterations + 1 if spent >= 1 else iteration + 1
        state["wall_s"] += time.perf_counter() - tick
        row |= {"env_steps": state["env_steps"], "wall_s": state["wall_s"]}
        rows.append(row)
        write_atomically(csv_path, lambda p: write_rows(p, rows))
        for key, value in row.items():
            if value != "" and key != "iteration":
                writer.add_scalar(key if "/" in key else f"charts/{key}", value, state["env_steps"])
        if "eval_return" in row:
            tqdm.write(f"{state['env_steps']:9d} steps {state['wall_s']:6.0f} s  return {row['eval_return']:6.0f} +- {row['eval_return_std']:4.0f} mean action, "
                       f"{row['eval_return_sampled']:6.0f} +- {row['eval_return_sampled_std']:4.0f} sampled")  # fmt: skip
        progress.update(min(total, int(state[counted])) - progress.n)
        if "eval_return" in row or interrupted:  # the replay is large, so checkpoints are made after evaluations only
            save_checkpoint()
        if spent >= 1:
            break
        if interrupted:
            raise SystemExit(f"Stopped after iteration {iteration}, saved. Continue with: python -m baselines.sac_gym --resume {run_dir}")

    # results
    envs.close()
    write_atomically(run_dir / "policy.pt", lambda p: torch.save(policy.state_dict(), p))
    final = {key: float(row[key]) for key in ("eval_return", "eval_return_std", "eval_return_sampled", "eval_return_sampled_std")}
    best = final
    if state["best"] > final["eval_return"]:  # measured again, on other episodes than those that selected it
        best_net = copy.deepcopy(policy)
        best_net.load_state_dict(best_policy)
        write_atomically(run_dir / "best_policy.pt", lambda p: torch.save(best_policy, p))
        scores = evaluate(best_net, args, args.final_eval_episodes, base_seed + 500_000)
        measured = {"eval_return": scores["zero"].mean(), "eval_return_sampled": scores["noise"].mean()}
        best = max(final, measured, key=lambda scores: scores["eval_return"])
    result = {
        "task": args.env_id, "method": args.exp_name, "preset": args.preset, "seed": args.seed,
        "base_return": state["base_return"], "base_return_sampled": state["base_return_sampled"],
        "final_return": final["eval_return"], "final_return_std": final["eval_return_std"],
        "final_return_sampled": final["eval_return_sampled"], "final_return_sampled_std": final["eval_return_sampled_std"],
        "best_return": best["eval_return"], "best_return_sampled": best["eval_return_sampled"],
        "env_steps": state["env_steps"], "wall_s": round(state["wall_s"], 1), "threads": args.threads, "device": args.device,
        "backend": envs.backend, "commit": git_commit(), "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": sys.version.split()[0]}
        | {p: importlib.metadata.version(p) for p in ("torch", "numpy", "gymnasium", "mujoco", "stable-baselines3")},
        "args": json.loads((run_dir / "args.json").read_text()),
    }  # fmt: skip
    write_atomically(run_dir / "result.json", lambda p: p.write_text(json.dumps(result, indent=2)))
    plot_curve(csv_path, run_dir / "curve.png", f"{args.env_id}, seed {args.seed}")
    writer.close()
    progress.close()
    if args.capture_video:
        record_video(policy, args, run_dir / "videos")
    print(f"{args.env_id}: base {result['base_return']:.0f} -> final {result['final_return']:.0f} (mean action), {result['base_return_sampled']:.0f} -> "
          f"{result['final_return_sampled']:.0f} (sampled), {state['env_steps']} env steps, {state['wall_s']:.0f} s. Results in {run_dir}")  # fmt: skip
    return result


if __name__ == "__main__":
    main(parse_args())
