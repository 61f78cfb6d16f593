"""What does the critic of a furniture run know of actions? Success of the base policy when the critic picks among its actions.

    python rldt_furniture.py --furniture one_leg
    python -m benchmark.particle_probe_furniture RUN_DIR   # writes benchmark/results/particle_probe_furniture.csv

In every state the frozen base policy draws P chunks ("particles"), and one of these is executed:

    base            a chunk of its own, from x_0 = 0 or from noise
    best            the particle of the highest Q
    mean            the mean of the particles
    top 4           the mean of the four of the highest Q
    weighted        the mean weighted by exp(z), z the standardised Q: where `--q-gradient particles` leads
    gradient        the base's chunk, moved by `move` along the critic's gradient
    covariance      the same along the covariance of Q and the particles

so that it shows what an actor could gain from this critic, whatever its network and losses make of it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import rldt_furniture as script
from benchmark.tools import RESULTS, provenance, write_csv
from common.svgd import particle_gradient

OPERATORS = ("base", "best", "mean", "top 4", "weighted", "gradient", "covariance")


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """Run directory with a checkpoint."""
    operators: tuple[str, ...] = OPERATORS
    """What to do with the particles."""
    particles: int = 16
    """P, chunks drawn per state."""
    move: float = 0.3
    """Length of the moves, in the norm of a normalised chunk."""
    episodes: int = 64
    """Episodes per operator, from x_0 = 0 and again from noise, which only the base and the moved chunks tell apart."""
    threads: int = 1
    """CPU threads."""
    out: Path = RESULTS / "particle_probe_furniture.csv"
    """CSV to write."""


class Chosen:
    """The policy that executes what `operator` makes of the particles; as far as evaluate() asks."""

    def __init__(self, policy: script.FlowPolicy, critic: script.Critic, operator: str, particles: int, move: float):
        self.policy, self.critic, self.operator, self.particles, self.move = policy, critic, operator, particles, move
        self.normalize, self.to_env, self.action_size = policy.normalize, policy.to_env, policy.action_size

    def q(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Mean of the two critics: obs (B, obs_dim), action (B, P, D) -> (B, P)."""
        B, P, D = action.shape
        return self.critic(obs[:, None].expand(-1, P, -1).reshape(B * P, -1), action.reshape(B * P, D)).mean(0).view(B, P)

    def along(self, action: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        return action + self.move * direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-9)

    def sample(self, obs: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        action = self.policy.sample(obs, x0)
        if self.operator == "base":
            return action
        if self.operator == "gradient":
            with torch.enable_grad():
                leaf = action.float().clone().requires_grad_()
                (direction,) = torch.autograd.grad(self.q(obs, leaf[:, None]).sum(), leaf)
            return self.along(action, direction)
        particles = self.policy.sample(obs[:, None].expand(-1, self.particles, -1), torch.randn(len(obs), self.particles, self.action_size))
        q = self.q(obs, particles)
        if self.operator == "best":
            return particles[torch.arange(len(obs)), q.argmax(1)]
        if self.operator == "mean":
            return particles.mean(1)
        if self.operator == "top 4":
            return particles.gather(1, q.topk(4, 1).indices[..., None].expand(-1, -1, self.action_size)).mean(1)
        if self.operator == "weighted":
            return particles[:, 0] + particle_gradient(q, particles)[:, 0]
        if self.operator == "covariance":
            return self.along(action, ((q - q.mean(1, keepdim=True))[..., None] * particles).mean(1))
        raise SystemExit(f"--operators: {self.operator} is none of {', '.join(OPERATORS)}")


def read_run(run: Path, threads: int) -> tuple[script.Args, dict]:
    """Arguments of a run, for the CPU, and its checkpoint."""
    try:
        stored = json.loads((run / "args.json").read_text())
        saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    except OSError as error:
        raise SystemExit(f"{run}: not a run directory with a checkpoint ({error})") from error
    types = dict(runs=Path(stored["runs"]), cond_mlp=tuple(stored["cond_mlp"]), device="cpu", threads=threads, resume=None, evaluate=None)
    return script.Args(**stored | types), saved


def main(args: Args):
    config, saved = read_run(args.run, args.threads)
    config = script.resolve(config)
    if config.furniture == "lamp" and config.critic_stage:
        raise SystemExit("The critic of this run also sees the stage, which the probe does not know: run it with --no-critic-stage.")
    torch.set_num_threads(args.threads)
    policy = script.load_policy(args.run / "base_policy.pt", "cpu")
    critic = script.Critic(policy.config["obs_dim"], policy.action_size, config.critic_width, config.critic_depth, config.critic_layer_norm, config.critic_init)
    critic.load_state_dict(saved["critic"])
    critic.requires_grad_(False)
    envs, rows = script.make_envs(config, config.num_envs), []
    for operator in args.operators:
        torch.manual_seed(0)
        scores = script.evaluate(Chosen(policy, critic, operator, args.particles, args.move), envs, config, args.episodes, 1_000_000)
        row = dict(task=f"{config.furniture}-{config.randomness}", iterations=saved["state"]["iteration"], operator=operator, particles=args.particles, move=args.move)
        row |= script.summary(scores["zero"], "success_zero", config) | script.summary(scores["noise"], "success_sampled", config)
        rows.append(row | dict(episodes=args.episodes) | provenance())
        print(f"{operator:12s} {100 * row['success_zero']:3.0f} % from x_0 = 0, {100 * row['success_sampled']:3.0f} % from noise", flush=True)
        write_csv(args.out, rows)
    envs.close()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
