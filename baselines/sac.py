"""SAC (Haarnoja et al. 2018) of Stable-Baselines3, from a Gaussian actor cloned from demonstrations.

    pip install -r baselines/requirements.txt
    python -m baselines.sac --env-id Hopper-v4

is the reference without a flow: one action per decision, cloned from the flow's demonstrations by
maximum likelihood. Networks and update are Stable-Baselines3's; rollouts, replay and evaluation RLDT's.
"""

import copy
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import rldt_gym as family
from common.runs import Run, derive_seed, evaluate_stored
from common.settings import Count, Share, Size, Weight, launch, set_up
from demos import dataset


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args(family.TaskArgs):
    """A chunk is a single action here. `SB3` are the settings of Stable-Baselines3."""

    exp_name: str = "sac"  # name of the experiment, part of the run directory's name
    bf16: bool = False  # bfloat16 matrix products (autocast) in rollouts and evaluations

    # rollouts, evaluation and replay
    num_envs: Count = 20  # parallel environments (SB3: 1)
    rollout_chunks: Count = 100  # actions per environment and iteration (SB3: 1)
    zero_fraction: Share = 0.0  # share of environments that take the mean action (SB3: 0)
    eval_every: Count = 20  # every n-th iteration evaluates and resets the environments
    buffer_iterations: Count = 500  # rollouts kept in the replay, here a million actions (SB3: 10^6)
    exploration_steps = 0  # no setting: the actor's own noise explores

    # updates
    warmup_iterations: Size = 2  # training iterations before the first update (SB3: 100 random steps)
    critic_iterations: Size = 4  # after those, that leave the actor as cloned (SB3: 0)
    gradient_steps: Count = 1000  # per iteration, half as many as environment steps (SB3: as many)
    batch: Count = 256  # transitions per update (SB3: 256)
    lr: Weight = 3e-4  # Adam step size of actor, critics and entropy coefficient (SB3: 3e-4)
    gamma: Share = 0.99  # discount per environment step (SB3: 0.99)
    tau: Share = 0.005  # share of the critics that their targets take per update (SB3: 0.005)
    entropy_start: Weight = 0.1  # first entropy coefficient (SB3: 1, which blurs a clone at once)


PRESETS = {
    "paper": dict(
        iterations=1040, num_envs=1, rollout_chunks=1000, eval_every=50, eval_episodes=100,
        buffer_iterations=1000, warmup_iterations=1, critic_iterations=0, gradient_steps=1000,
    )
}  # fmt: skip
WIDTH = 256  # of the two hidden layers of actor and critics (SB3)
CLONING = dict(epochs=10, batch=512, lr=1e-3)


# ----------------------------------------------------------------------------------- networks
def make_sac(args: Args, obs_dim: int, action_dim: int):
    """Stable-Baselines3's SAC without an environment: networks, and `train` on its `replay_buffer`."""
    try:
        from stable_baselines3 import SAC
        from stable_baselines3.common.logger import configure
    except ImportError as error:
        raise SystemExit("SAC is missing: pip install -r baselines/requirements.txt") from error
    model = SAC(
        "MlpPolicy", None, learning_rate=args.lr, gamma=args.gamma, tau=args.tau, buffer_size=1,
        ent_coef=f"auto_{args.entropy_start + 1e-8}", target_entropy=-action_dim, device=args.device,
        policy_kwargs=dict(net_arch=[WIDTH, WIDTH]), _init_setup_model=False,
    )  # fmt: skip
    model.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
    model.action_space = gym.spaces.Box(-1, 1, (action_dim,), np.float32)
    model.n_envs = 1
    model._setup_model()
    model.set_logger(configure(None, []))
    return model


class GaussianPolicy(family.FlowPolicy):
    """Stable-Baselines3's squashed Gaussian actor as a policy of chunks of one action."""

    def __init__(self, obs_dim: int, action_dim: int, actor: nn.Module | None = None):
        nn.Module.__init__(self)
        self.config, self.info = dict(obs_dim=obs_dim, action_dim=action_dim), {}
        self.obs_dim, self.action_dim, self.action_size, self.chunk = obs_dim, action_dim, action_dim, 1
        self.actor = actor or make_sac(Args(device="cpu"), obs_dim, action_dim).actor
        for name, dim in ("obs", obs_dim), ("action", action_dim):
            self.register_buffer(f"{name}_min", -torch.ones(dim))
            self.register_buffer(f"{name}_max", torch.ones(dim))

    @torch.no_grad()
    def sample(self, cond: torch.Tensor, x0: torch.Tensor | None = None, trajectory=False):
        """Actions tanh(mean + std x0), (..., D), for cond (..., obs_dim), or a trajectory of these."""
        mean, log_std, _ = self.actor.get_action_dist_params(cond)
        x0 = torch.randn_like(mean) if x0 is None else x0
        action = (mean + log_std.exp() * x0).tanh()
        return action[None] if trajectory else action


# -------------------------------------------------------------------------------- base policy
def clone(policy: GaussianPolicy, data: dataset.Demonstrations, epochs: int, batch: int, lr: float):
    """Maximum likelihood of the demonstrations' actions, clipped to +-0.99, where tanh is invertible."""
    policy.set_limits(**data.limits())
    obs = policy.normalize(data.observations)  # (n, obs_dim)
    action = policy.from_env(data.actions[:, None]).clamp(-0.99, 0.99)  # (n, D)
    optimizer = torch.optim.Adam(policy.actor.parameters(), lr)
    for _ in tqdm(range(max(1, epochs * len(obs) // batch)), desc="cloning", mininterval=1):
        i = torch.randint(len(obs), (batch,), device=obs.device)
        mean, log_std, _ = policy.actor.get_action_dist_params(obs[i])
        density = torch.distributions.Normal(mean, log_std.exp())
        loss = -density.log_prob(action[i].atanh()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def get_base(args: Args, run: Run, envs, actor: nn.Module) -> GaussianPolicy:
    """The actor as it starts: given, or cloned here; the run keeps a copy of its own."""
    policy = GaussianPolicy(envs.obs_dim, envs.action_dim, actor).to(args.device)

    def make(checkpoint) -> GaussianPolicy:
        if args.base:
            return GaussianPolicy.load(args.base)
        policy.info = dict(env_id=args.env_id)
        clone(policy, dataset.get(args.env_id, args.dataset, envs), **CLONING)
        return policy

    given = run.keep_base(make, GaussianPolicy)
    if given.config != policy.config:
        raise SystemExit(f"{args.base}: has other sizes than {args.env_id}.")
    policy.load_state_dict(given.state_dict())
    return policy


# ------------------------------------------------------------------------------------- replay
Samples = namedtuple("Samples", "observations actions next_observations dones rewards discounts")


class Replay(family.Replay):
    """RLDT's replay, from which Stable-Baselines3's `train` draws single transitions."""

    def sample(self, batch_size: int, env=None) -> Samples:
        """`dones` are terminations only, so that a time limit bootstraps."""
        _, T, N = self.slots["reward"].shape
        device = self.slots["reward"].device
        i = torch.randint(self.filled * T * N, (batch_size,), device=device)
        row = {name: value.flatten(0, 2)[i] for name, value in self.slots.items()}
        ends, reward = row["terminated"][:, None], row["reward"][:, None]
        return Samples(row["obs"], row["action"], row["next_obs"], ends, reward, None)


# --------------------------------------------------------------------------- actor and critic
def update(model, steps: int, batch: int, critic_only: bool) -> dict[str, float]:
    """Steps of Stable-Baselines3's SAC; `critic_only` leaves actor and entropy coefficient alone."""
    coefficient = model.log_ent_coef.detach().clone()
    optimizer = copy.deepcopy(model.ent_coef_optimizer.state_dict())
    model.actor.requires_grad_(not critic_only)  # without gradients its optimizer does nothing
    model.train(steps, batch)
    if critic_only:
        model.log_ent_coef.data.copy_(coefficient)
        model.ent_coef_optimizer.load_state_dict(optimizer)
    logged = model.logger.name_to_value
    return {
        "losses/critic": logged["train/critic_loss"], "losses/actor": logged["train/actor_loss"],
        "diagnostics/entropy_coefficient": logged["train/ent_coef"],
    }  # fmt: skip


# --------------------------------------------------------------------------------------- main
def main(args: Args) -> dict | None:
    set_up(args)
    if args.iterations == 0 and args.wall_budget_s == 0:
        args.iterations = 105 if args.env_id == "Hopper-v4" else 355
    measure = partial(family.evaluate, args=args)
    if args.evaluate:
        return evaluate_stored(args, GaussianPolicy, measure)

    run = Run(args, f"{args.env_id}__{args.exp_name}__{args.seed}")
    if run.world > 1:
        raise SystemExit("SAC runs in one process.")
    envs = family.make_envs(args, args.num_envs)
    model = make_sac(args, envs.obs_dim, envs.action_dim)
    policy = get_base(args, run, envs, model.actor)
    replay = model.replay_buffer = Replay(args, policy.obs_dim, policy.action_size)
    state = dict(env_steps=0, trained=0)
    run.checkpoints(
        state, policy, critic=model.critic, target=model.critic_target, envs=envs, replay=replay,
        entropy=nn.ParameterList([model.log_ent_coef]), actor_optimizer=model.actor.optimizer,
        critic_optimizer=model.critic.optimizer, entropy_optimizer=model.ent_coef_optimizer,
    )  # fmt: skip

    for iteration, spent in run.iterations():
        row = {}
        if iteration % args.eval_every == 0 or spent == 1:
            row = run.evaluate("eval_return", measure)
            envs.reset(derive_seed(args.seed, "rollouts", iteration, run.rank))
        else:
            with run.timer(row, "rollout_s"):
                steps, returns = family.collect(policy, envs, replay.next(), args)
            state["env_steps"] += steps
            if returns:
                row["train_return"] = np.mean(returns)
            with run.timer(row, "update_s"):
                if state["trained"] >= args.warmup_iterations:
                    alone = state["trained"] < args.warmup_iterations + args.critic_iterations
                    row |= update(model, args.gradient_steps, args.batch, critic_only=alone)
            state["trained"] += 1
        run.log(row, state["env_steps"])
        run.save()

    envs.close()
    if args.capture_video:
        family.record_video(policy, args.env_id, run.path / "videos")
    return run.finish("eval_return", measure, task=args.env_id, env_steps=state["env_steps"])


if __name__ == "__main__":
    launch(main, Args, PRESETS, __doc__)
