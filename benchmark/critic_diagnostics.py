"""Is the critic of a run right, and does its actor follow it?

    python rldt_gym.py --env-id Walker2d-v4
    python -m benchmark.critic_diagnostics RUN_DIR ...  # writes benchmark/results/critic_diagnostics.csv

Is it right? The final policy is rolled out without exploration noise, and Q(s, a) is compared with the
discounted return of the rest of the episode, in units of the run's reward_scale. Where the time limit
cuts an episode off, the mean reward of its last chunks is taken to go on. `correlation_within_time` is
of what is left after removing, at each time step, the mean over episodes.

Does the actor follow? The policy is evaluated with every chunk moved by `steps` along the critic's
gradient, normalised by its mean length. A return that rises: the gradient is right and the actor lags.
A return that falls: the gradient is not to be trusted at this policy.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import rldt_gym
from benchmark.tools import RESULTS, markdown, replace_rows
from common.checkpoints import identity, read_checked
from common.flow import FlowPolicy
from common.settings import read_args
from envs.vector import VectorEnv

TAIL = 25  # chunks whose mean reward continues an episode that the time limit cut off


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run directories
    episodes: int = 40  # per evaluation
    steps: tuple[float, ...] = (-0.2, 0.0, 0.1, 0.2, 0.4)  # in the norm of a normalised chunk
    seed: int = 12345  # of environments and noise
    out: Path = RESULTS / "critic_diagnostics.csv"  # CSV to write


@dataclass
class Run:
    """What the directory of a finished run holds."""

    name: str
    args: rldt_gym.Args
    policy: FlowPolicy
    base: FlowPolicy
    critic: rldt_gym.Critic
    target: rldt_gym.Critic
    reward_scale: float
    unit: float  # of the transport field, a length of grad Q
    states: torch.Tensor  # (n, obs_dim) the normalised observations of the replay


def load_run(path: Path, settings=rldt_gym.Args) -> Run:
    """Reads a finished run of rldt_gym.py, or of a baseline with its critic and replay, onto the CPU."""
    args = read_args(settings, path)
    args.device = "cpu"
    policy, base = (FlowPolicy.load(path / f"{name}.safetensors") for name in ("policy", "base"))
    (checkpoint,) = path.glob("checkpoint0.*.pt")
    saved = read_checked(checkpoint, identity(args), "cpu")
    sizes = policy.obs_dim, policy.action_size, args.critic_layer_norm
    critic, target = rldt_gym.Critic(*sizes), rldt_gym.Critic(*sizes)
    critic.load_state_dict(saved["critic"])
    target.load_state_dict(saved["target"])
    slots = path.glob("checkpoint0.replay*")
    rollouts = [read_checked(slot, identity(args), "cpu")["newest"] for slot in slots]
    states = torch.cat([rollout["obs"].flatten(0, 1) for rollout in rollouts])
    scales = saved["state"]["reward_scale"], saved["state"].get("unit", 0.0)  # QAM's has no field
    return Run(path.resolve().name, args, policy, base, critic, target, *scales, states)


@torch.no_grad()
def roll_out(run: Run, args: Args) -> dict[str, np.ndarray]:
    """One episode per environment, arrays (T, N); alive: a chunk was executed."""
    envs = VectorEnv(run.args.env_id, args.episodes)
    envs.reset(args.seed)
    alive, rows = np.ones(args.episodes, bool), []
    while alive.any():
        obs = run.policy.normalize(envs.obs)  # (N, obs_dim)
        action = run.policy.sample(obs)  # (N, D)
        q = run.critic(obs, action).mean(0)
        step = envs.step(run.policy.to_env(action), alive)
        row = dict(q=q.numpy(), reward=step.reward, alive=alive.copy())
        rows.append(row | dict(truncated=step.truncated & alive))
        alive &= ~(step.terminated | step.truncated)
    envs.close()
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def monte_carlo(data: dict, reward_scale: float, gamma: float, tail: int = TAIL) -> np.ndarray:
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
        "bias": error.mean(),
        "rmse": np.sqrt((error**2).mean()),
        "correlation": np.corrcoef(q[alive], y[alive])[0, 1],
        "correlation_within_time": np.corrcoef(*centred)[0, 1],
    }


def moved(policy: FlowPolicy, critic: rldt_gym.Critic, length: float) -> FlowPolicy:
    """The policy with every chunk moved along the critic's gradient."""
    result = copy.copy(policy)

    def sample(obs: torch.Tensor, x0: torch.Tensor | None = None) -> torch.Tensor:
        action = policy.sample(obs, x0).float()
        with torch.enable_grad():
            leaf = action.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(critic(obs, leaf).mean(0).sum(), leaf)
        return action + length * gradient / gradient.norm(dim=-1).mean()

    result.sample = sample
    return result


def diagnose(run: Run, args: Args) -> dict[str, float]:
    """The columns of one run."""
    torch.manual_seed(args.seed)
    data, cfg = roll_out(run, args), run.args
    alive, y = data["alive"], monte_carlo(data, run.reward_scale, cfg.gamma)
    result = {"reward_scale": run.reward_scale, "monte_carlo": y[alive].mean()}
    result["q"] = data["q"][alive].mean()
    result |= compare(data["q"], y, alive)
    for length in args.steps:
        policy = moved(run.policy, run.critic, length)
        scores = rldt_gym.evaluate(policy, cfg, args.episodes, args.seed + 1)
        result[f"moved_zero_{length:g}"] = scores["eval_return"]
        result[f"moved_noise_{length:g}"] = scores["eval_return_sampled"]
    return result


def main(args: Args):
    torch.set_num_threads(1)
    for path in args.runs:
        run = load_run(path)
        row = dict(task=run.args.env_id, run=run.args.exp_name, seed=run.args.seed)
        row |= {key: float(value) for key, value in diagnose(run, args).items()}
        changed = dict(vars(run.args).items() - vars(rldt_gym.Args()).items())
        flags = [f"--{key} {changed[key]}" for key in sorted(changed.keys() - {"device", "runs"})]
        row["args"] = " ".join(flags).replace("_", "-")
        print(markdown([{"quantity": key, "value": value} for key, value in row.items()]))
        replace_rows(args.out, [row], ("task", "run", "seed"))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
