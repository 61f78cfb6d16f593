"""SAC (Haarnoja et al. 2018) of Stable-Baselines3, from a Gaussian actor cloned from demonstrations.

    pip install -r baselines/requirements.txt
    python -m baselines.sac --task Hopper-v4        # or one_leg-low, square-state, transport-state

is the reference without a flow: one action per decision, cloned from the flow's demonstrations by
maximum likelihood. Networks and update are Stable-Baselines3's; rollouts, replay and evaluation RLDT's.
"""

from collections import namedtuple
from dataclasses import dataclass
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import rldt_furniture
import rldt_gym
import rldt_robomimic
from baselines import families
from common.flow import FlowPolicy
from common.runs import Run, evaluate_stored
from common.settings import Count, Precision, Share, Size, Weight, set_up


# ---------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    """A chunk is a single action here. `SB3` are the settings of Stable-Baselines3."""

    exp_name: str = "sac"  # name of the experiment, part of the run directory's name
    precision: Precision = "float32"  # of matrix products (autocast) in rollouts and evaluations

    # rollouts and replay
    zero_fraction: Share = 0.0  # share of environments that take the mean action (SB3: 0)
    buffer_iterations: Count = 500  # rollouts kept in the replay, on Gym a million actions (SB3: 10^6)
    exploration_steps: ClassVar[int] = 0  # no setting: the actor's own noise explores
    demos: ClassVar[bool] = False

    # updates
    warmup_iterations: Size = 2  # training iterations before the first update (SB3: 100 random steps)
    critic_iterations: Size = 4  # after those, that leave the actor as cloned (SB3: 0)
    gradient_steps: Count = 1000  # per iteration, half of Gym's environment steps (SB3: as many)
    batch: Count = 256  # transitions per update (SB3: 256)
    lr: Weight = 3e-4  # Adam step size of actor, critics and entropy coefficient (SB3: 3e-4)
    gamma: Share = 0.99  # discount per environment step (SB3: 0.99)
    tau: Share = 0.005  # share of the critics that their targets take per update (SB3: 0.005)
    entropy_start: Weight = 0.1  # first entropy coefficient (SB3: 1, which blurs a clone at once)


@dataclass
class GymArgs(rldt_gym.TaskArgs):
    """Short rollouts, as an action is a single one; other tasks' are whole episodes."""

    # rollouts and evaluation
    num_envs: Count = 20  # parallel environments (SB3: 1)
    rollout_chunks: Count = 100  # actions per environment and iteration (SB3: 1)
    eval_every: Count = 20  # every n-th iteration evaluates and resets the environments


SHARED = {
    "rldt_gym": GymArgs, "rldt_robomimic": rldt_robomimic.TaskArgs,
    "rldt_furniture": rldt_furniture.TaskArgs,
}  # fmt: skip
PRESETS = {
    "paper": dict(
        iterations=1040, num_envs=1, rollout_chunks=1000, eval_every=50, eval_episodes=100,
        buffer_iterations=1000, warmup_iterations=1, critic_iterations=0, gradient_steps=1000,
    )
}  # fmt: skip
WIDTH = 256  # of the two hidden layers of actor and critics (SB3)
CLONING = dict(epochs=10, batch=512, lr=1e-3)


# ----------------------------------------------------------------------------------- networks
def make_sac(args, obs_dim: int, action_dim: int, device="cpu"):
    """Stable-Baselines3's SAC without an environment: networks, and `train` on its `replay_buffer`."""
    try:
        from stable_baselines3 import SAC
        from stable_baselines3.common.logger import Logger
    except ImportError as error:
        raise SystemExit("SAC is missing: pip install -r baselines/requirements.txt") from error
    model = SAC(
        "MlpPolicy", None, learning_rate=args.lr, gamma=args.gamma, tau=args.tau, buffer_size=1,
        ent_coef=f"auto_{args.entropy_start + 1e-8}", target_entropy=-action_dim, device=device,
        policy_kwargs=dict(net_arch=[WIDTH, WIDTH]), _init_setup_model=False,
    )  # fmt: skip
    model.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
    model.action_space = gym.spaces.Box(-1, 1, (action_dim,), np.float32)
    model.n_envs = 1
    model._setup_model()
    model.set_logger(Logger(None, []))
    return model


class GaussianPolicy(FlowPolicy):
    """Stable-Baselines3's squashed Gaussian actor as a policy of chunks of one action."""

    cameras, frozen, encoder = 0, False, None  # of robomimic's policies

    def __init__(self, obs_dim: int, action_dim: int, actor: nn.Module | None = None):
        nn.Module.__init__(self)
        self.config, self.info = dict(obs_dim=obs_dim, action_dim=action_dim), {}
        self.obs_dim, self.action_dim, self.action_size, self.chunk = obs_dim, action_dim, action_dim, 1
        self.actor = actor or make_sac(Args(), obs_dim, action_dim).actor
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
def clone(policy: GaussianPolicy, data: families.Demonstrations, epochs: int, batch: int, lr: float):
    """Maximum likelihood of the demonstrations' actions, clipped to +-0.99, where tanh is invertible."""
    policy.set_limits(**data.limits)
    obs = policy.normalize(data.obs)  # (n, obs_dim)
    action = policy.from_env(data.action[:, None]).clamp(-0.99, 0.99)  # (n, D)
    optimizer = torch.optim.Adam(policy.actor.parameters(), lr)
    for _ in tqdm(range(max(1, epochs * len(obs) // batch)), desc="cloning", mininterval=1):
        i = torch.randint(len(obs), (batch,), device=obs.device)
        mean, log_std, _ = policy.actor.get_action_dist_params(obs[i])
        density = torch.distributions.Normal(mean, log_std.exp())
        loss = -density.log_prob(action[i].atanh()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def get_base(family: families.Family, run: Run, policy: GaussianPolicy) -> GaussianPolicy:
    """The actor as it starts: given, or cloned here; the run keeps a copy of its own."""
    args = family.args

    def make(checkpoint) -> GaussianPolicy:
        if args.base:
            return type(policy).load(args.base)
        policy.info = dict(task=family.task)
        clone(policy, family.demonstrations(), **CLONING)
        return policy

    given = run.keep_base(make, type(policy))
    if given.config != policy.config:
        raise SystemExit(f"{args.base}: has other sizes than {family.task}.")
    policy.load_state_dict(given.state_dict())
    return policy


# ------------------------------------------------------------------------------------- replay
Samples = namedtuple("Samples", "observations actions next_observations dones rewards discounts")


class Transitions:
    """RLDT's replay, from which Stable-Baselines3's `train` draws single transitions."""

    def __init__(self, family: families.Family, replay, obs_dim: int):
        self.family, self.replay, self.obs_dim = family, replay, obs_dim

    def sample(self, batch_size: int, env=None) -> Samples:
        """`dones` are terminations only, so that a time limit bootstraps on Gym."""
        slots = {name: value.transpose(0, 1) for name, value in self.replay.slots.items()}
        rows = self.family.transitions(slots)  # (T, slots, N, ...)
        T, _, N = rows["reward"].shape
        i = torch.randint(self.replay.filled * T * N, (batch_size,), device=rows["reward"].device)
        slot, t, env = torch.unravel_index(i, (self.replay.filled, T, N))
        row = {name: value[t, slot, env] for name, value in rows.items()}
        obs, next_obs = (row[name][:, : self.obs_dim] for name in ("obs", "next_obs"))
        ends, reward = row["terminated"][:, None], row["reward"][:, None]
        return Samples(obs, row["action"], next_obs, ends, reward, None)


# --------------------------------------------------------------------------- actor and critic
def update(model, steps: int, batch: int, critic_only: bool) -> dict[str, float]:
    """Steps of Stable-Baselines3's SAC; `critic_only` leaves actor and entropy coefficient alone."""
    optimizer = model.ent_coef_optimizer
    if critic_only:  # Stable-Baselines3 then takes the coefficient as it is
        model.ent_coef_optimizer, model.ent_coef_tensor = None, model.log_ent_coef.detach().exp()
    model.actor.requires_grad_(not critic_only)  # without gradients its optimizer does nothing
    model.train(steps, batch)
    model.ent_coef_optimizer = optimizer
    logged = model.logger.name_to_value
    return {
        "losses/critic": logged["train/critic_loss"], "losses/actor": logged["train/actor_loss"],
        "diagnostics/entropy_coefficient": logged["train/ent_coef"],
    }  # fmt: skip


# --------------------------------------------------------------------------------------- main
def main(args) -> dict | None:
    set_up(args)
    if isinstance(args, rldt_robomimic.TaskArgs):
        args.horizon = args.horizon or rldt_robomimic.TASKS[args.task].horizon
        args.rollout_chunks = args.rollout_chunks or args.horizon
    family = families.family_of(args, iterations=(105, 355))
    policy_class = families.mix(GaussianPolicy, family)
    if args.evaluate:
        return evaluate_stored(args, policy_class, family.measure)

    run = Run(args, f"{family.task}__{args.exp_name}__{args.seed}")
    if run.world > 1:
        raise SystemExit("SAC runs in one process.")
    sizes = family.sizes()
    model = make_sac(args, *sizes, args.device)
    policy = get_base(family, run, policy_class(*sizes, model.actor).to(args.device))
    replay = family.make_replay(policy)
    model.replay_buffer = Transitions(family, replay, policy.obs_dim)
    state = dict(env_steps=0, trained=0)
    run.checkpoints(
        state, policy, critic=model.critic, target=model.critic_target, replay=replay, **family.parts,
        entropy=nn.ParameterList([model.log_ent_coef]), actor_optimizer=model.actor.optimizer,
        critic_optimizer=model.critic.optimizer, entropy_optimizer=model.ent_coef_optimizer,
    )  # fmt: skip

    for iteration, spent in run.iterations():
        row = {}
        if iteration % args.eval_every == 0 or spent == 1:
            row = run.evaluate(family.score, family.measure)
            family.reset(run, iteration)
        else:
            with run.timer(row, "rollout_s"):
                state["env_steps"] += family.rollout(policy, replay.next(), run, iteration, row)
            with run.timer(row, "update_s"):
                if state["trained"] >= args.warmup_iterations:
                    alone = state["trained"] < args.warmup_iterations + args.critic_iterations
                    row |= update(model, args.gradient_steps, args.batch, critic_only=alone)
            state["trained"] += 1
        run.log(row, state["env_steps"])
        run.save()
    return family.finish(run, policy, state)


if __name__ == "__main__":
    families.launch(main, SHARED, Args, PRESETS, __doc__)
