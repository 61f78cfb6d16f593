"""What the critic of a run believes, against what its policy gets.

    python -m benchmark.critic_diagnostics RUN_DIR ...  # writes benchmark/results/critic_diagnostics.csv

Rolls out the sampled policy of each run's checkpoint, without exploration noise, and compares Q(s, a) with
the discounted return of the rest of the episode, in the critic's units (rewards divided by the run's
reward_scale, gamma per chunk). Where the time limit cuts an episode off, its last chunks' mean reward is
taken to go on forever, since the critic bootstraps through time limits. `q` is the mean of the two networks,
`q_min` the smaller. Correlations are also given after removing, at each time step, the mean over episodes:
what is left is whether the critic tells better states and actions from worse ones at the same time.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import rldt_gym
from benchmark.tools import RESULTS, Run, load_run, write_csv
from envs.vector import VectorEnv


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    episodes: int = 50
    """Episodes rolled out per run."""
    tail: int = 25
    """Chunks whose mean reward continues an episode cut off by the time limit."""
    bins: int = 5
    """Time bins for which bias is also given."""
    states: int = 1024
    """Visited states at which the transport field and the distance to the base are measured."""
    seed: int = 12345
    """Seed of environments and noise."""
    out: Path = RESULTS / "critic_diagnostics.csv"
    """CSV to write."""


@torch.no_grad()
def roll_out(run: Run, args: Args) -> dict[str, np.ndarray]:
    """One episode per environment; arrays (T, N), and obs (T, N, obs_dim), `alive` where a chunk was executed."""
    envs = VectorEnv(run.args.env_id, args.episodes, run.policy.chunk, run.args.backend, args.seed)
    envs.reset()
    alive, steps = np.ones(args.episodes, bool), []
    while alive.any():
        obs = run.policy.normalize(envs.obs)  # (N, obs_dim)
        action = run.policy.sample(obs)  # (N, D)
        q = run.critic(obs, action)  # (2, N)
        _, reward, terminated, truncated, _ = envs.step(run.policy.to_env(action), alive)
        steps.append(dict(obs=obs.numpy(), q=q.mean(0).numpy(), q_min=q.amin(0).numpy(), reward=reward,
                          truncated=truncated & alive, alive=alive.copy()))  # fmt: skip
        alive &= ~(terminated | truncated)
    envs.close()
    return {key: np.stack([step[key] for step in steps]) for key in steps[0]}


def monte_carlo(data: dict, reward_scale: float, gamma: float, tail: int) -> np.ndarray:
    """Discounted return of the rest of each episode, (T, N), 0 after its end."""
    reward, result = data["reward"] / reward_scale, np.zeros_like(data["reward"])
    after = np.zeros(reward.shape[1])
    for t in reversed(range(len(reward))):
        steady = reward[max(0, t + 1 - tail) : t + 1].mean(0) / (1 - gamma)
        after = np.where(data["truncated"][t], steady, after)
        after = np.where(data["alive"][t], reward[t] + gamma * after, 0.0)
        result[t] = after
    return result


def compare(q: np.ndarray, y: np.ndarray, alive: np.ndarray) -> dict[str, float]:
    """Bias, RMSE and correlations of q against y, both (T, N), where alive."""
    count = alive.sum(1, keepdims=True)
    centred = [(x - (x * alive).sum(1, keepdims=True) / count)[alive & (count > 1)] for x in (q, y)]
    error = (q - y)[alive]
    return {
        "bias": error.mean(), "rmse": np.sqrt((error**2).mean()), "correlation": np.corrcoef(q[alive], y[alive])[0, 1],
        "correlation_within_time": np.corrcoef(*centred)[0, 1],
    }  # fmt: skip


def diagnose(run: Run, args: Args) -> dict[str, float]:
    torch.manual_seed(args.seed)
    data = roll_out(run, args)
    alive, y = data["alive"], monte_carlo(data, run.reward_scale, run.args.gamma, args.tail)
    result = {"episodes": args.episodes, "return_noise": (data["reward"] * alive).sum(0).mean()}
    zero = rldt_gym.evaluate(run.policy, run.args, args.episodes, args.seed + 1)
    base = rldt_gym.evaluate(run.base, run.args, args.episodes, args.seed + 1)
    result |= {"return_zero": zero["zero"].mean(), "base_return_zero": base["zero"].mean(),
               "base_return_noise": base["noise"].mean(), "reward_scale": run.reward_scale,
               "truncated_episodes": data["truncated"].any(0).mean(), "monte_carlo": y[alive].mean()}  # fmt: skip
    for name in "q", "q_min":
        result |= {name: data[name][alive].mean()}
        result |= {f"{name}_{key}": value for key, value in compare(data[name], y, alive).items()}
    edges = np.linspace(0, len(y), args.bins + 1).astype(int)
    for start, end in itertools.pairwise(edges):
        if alive[start:end].any():
            result[f"q_bias_chunks_{start}_{end - 1}"] = (data["q"] - y)[start:end][alive[start:end]].mean()

    obs = torch.as_tensor(data["obs"][alive])
    obs = obs[torch.randperm(len(obs))[: args.states]]
    trajectory = run.policy.sample(obs[:, None].expand(-1, run.args.n_particles, -1), trajectory=True)
    *_, metrics = rldt_gym.actor_losses(run.policy.velocity, run.reference, run.critic, obs, trajectory, run.args)
    for key in "phi_norm", "grad_q_norm", "particle_distance":
        result[key] = metrics[f"diagnostics/{key}"].item()
    with torch.no_grad():  # at x_0 ~ N(0, I), t = 0, and along the policy's own trajectories
        x, K = trajectory[:-1, :, 0], run.args.euler_steps  # (K, n, D)
        t = (torch.arange(K) / K)[:, None].expand(-1, len(obs))
        v, v_base = (net.velocity(x, t, obs.expand(K, -1, -1)) for net in (run.policy, run.base))
        distance = (v - v_base).norm(dim=-1).mean(1)  # (K,)
    return result | {"base_distance_t0": distance[0].item(), "base_distance": distance.mean().item(),
                     "velocity_norm": v.norm(dim=-1).mean().item()}  # fmt: skip


def main(args: Args):
    torch.set_num_threads(1)
    rows = []
    for path in args.runs:
        run = load_run(path)
        print(f"\n{run.name}")
        for quantity, value in diagnose(run, args).items():
            print(f"  {quantity:28} {value:10.4g}")
            cfg = run.args
            rows.append({"run": run.name, "task": cfg.env_id, "method": cfg.exp_name, "seed": cfg.seed,
                         "quantity": quantity, "value": float(value)})  # fmt: skip
    write_csv(args.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
