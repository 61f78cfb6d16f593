"""Does the actor of a furniture run follow its transport? Success after steps of the actor alone, on a critic that is held fixed.

    python rldt_furniture.py --furniture one_leg
    python -m benchmark.actor_probe_furniture RUN_DIR --extra "--actor-lr 1e-4"   # appends to benchmark/results/actor_probe_furniture.csv

The base policy takes `steps` steps of the actor on the run's replay and critic, without another rollout, and the average of its weights
(--actor-ema, 0: the policy itself) is evaluated. --extra replaces settings of the run. Together with benchmark.particle_probe_furniture,
which leaves out the actor, it tells a wrong critic from an actor that lags behind a right one.
"""

import copy
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import rldt_furniture as script
from benchmark.particle_probe_furniture import read_run
from benchmark.tools import RESULTS, parse, provenance, read_csv, write_csv

STEPS_PER_DRAW = 16  # of the actor on one draw of segments


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """Run directory with a checkpoint."""
    extra: str = ""
    """Flags of rldt_furniture.py that replace those of the run, in one string."""
    steps: int = 600
    """Steps of the actor."""
    episodes: int = 64
    """Episodes from x_0 = 0 and again from noise."""
    threads: int = 1
    """CPU threads."""
    out: Path = RESULTS / "actor_probe_furniture.csv"
    """CSV to append to."""


def train_actor(policy: script.FlowPolicy, critic: script.Critic, replay: script.Replay, steps: int, config: script.Args):
    """Steps of the actor from `policy`, in place, with the policy before them as the reference; returns the average of its weights, and the
    metrics of the last step."""
    reference, averaged = (copy.deepcopy(policy).requires_grad_(False) for _ in range(2))
    optimizer = torch.optim.Adam(policy.parameters(), config.actor_lr, fused=True)
    for step in range(steps):
        if step % STEPS_PER_DRAW == 0:
            batch = replay.draw(config.segments, config.segment_chunks, 0.0, config.balanced)
            valid = batch["valid"].flatten() > 0
            obs = batch["state"][:-1].flatten(0, 1)[valid]
            obs_q = script.critic_obs(obs, batch["stage"][:-1].flatten()[valid], config)
        i = torch.randint(len(obs), (config.actor_batch,))
        optimizer.param_groups[0]["lr"] = config.actor_lr * min(1.0, (step + 1) / config.actor_warmup)
        metrics = script.update_actor(policy, reference, critic, optimizer, obs[i], obs_q[i], config)
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(policy.parameters()), 1 - config.actor_ema)
    return averaged, {key.rpartition("/")[2]: value.item() for key, value in metrics.items()}


def main(args: Args):
    config, saved = read_run(args.run, args.threads)
    config = script.resolve(tyro.cli(script.Args, args=shlex.split(args.extra), default=config))
    torch.set_num_threads(args.threads), torch.manual_seed(0)
    policy = script.load_policy(args.run / "base_policy.pt", "cpu")
    critic = script.Critic(saved["critic"]["weights.0"].shape[1] - policy.action_size, policy.action_size, config.critic_width, config.critic_depth,
                           config.critic_layer_norm, config.critic_init)  # fmt: skip
    critic.load_state_dict(saved["critic"])
    replay = script.Replay(config, policy.config["obs_dim"], policy.action_size)
    replay.added = saved["added"]
    for slot in range(min(replay.added, config.buffer_iterations)):
        for name, value in torch.load(args.run / f"replay{slot}.pt", weights_only=True).items():
            replay.data[name][slot] = value
    averaged, metrics = train_actor(policy, critic, replay, args.steps, config)
    envs = script.make_envs(config, config.num_envs)
    scores = script.evaluate(averaged, envs, config, args.episodes, 1_000_000)
    envs.close()
    row = dict(task=f"{config.furniture}-{config.randomness}", iterations=saved["state"]["iteration"], extra=args.extra, steps=args.steps)
    row |= script.summary(scores["zero"], "success_zero", config) | script.summary(scores["noise"], "success_sampled", config)
    write_csv(args.out, [*read_csv(args.out), row | metrics | dict(episodes=args.episodes) | provenance()])
    print(f"{100 * row['success_zero']:.0f} % ({row['stages_zero']:.2f} pairs) from x_0 = 0, {100 * row['success_sampled']:.0f} % ({row['stages_sampled']:.2f}) from noise")


if __name__ == "__main__":
    main(parse(Args, __doc__))
