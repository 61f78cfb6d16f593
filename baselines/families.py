"""The three families of tasks behind one interface, so that a baseline is one file for all of them.

    python -m baselines.qam --task one_leg-low      # or Hopper-v4, square-state, transport-state, ...

Environments, base policy, replay, rollouts, critic, targets and evaluation are those of the family's
script, and so are the flags besides a method's own. `--task` stands for the script's flags for a task.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch

import rldt_furniture
import rldt_gym
import rldt_robomimic
from common import settings
from common.flow import FlowPolicy
from common.runs import Run, derive_seed


# ----------------------------------------------------------------------------------- families
class Demonstrations(NamedTuple):
    obs: np.ndarray  # of steps, not normalised
    action: np.ndarray
    episode_ends: np.ndarray
    limits: dict[str, np.ndarray]  # what becomes -1 and 1


class Family:
    """A family's tasks in one run. Critics see `seen` (B, .), whose front is the policy's state."""

    bound = 1.0  # of normalised actions
    extra = 0  # what critics see besides the policy's state
    starts_anew = True  # whether every rollout begins with new episodes
    parts: ClassVar[dict] = {}  # of checkpoints

    def __init__(self, args):
        self.args, self.envs = args, None

    def measure(self, policy, episodes: int, seed: int) -> dict[str, float]:
        """The script's evaluation; noise that a policy draws is the same whenever it is asked for."""
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            return self.evaluate(policy, episodes, seed)

    def sizes(self) -> tuple[int, int]:
        """Of an observation and of an action."""
        return self.envs.obs_dim, self.envs.action_dim

    def make_critic(self, policy: FlowPolicy) -> torch.nn.Module:
        return self.script.Critic(*self.critic_sizes(policy)).to(self.args.device)

    def make_replay(self, policy: FlowPolicy):
        return self.script.Replay(self.args, policy)

    def reset(self, run: Run, iteration: int):
        """After an evaluation."""

    def scale_rewards(self, state: dict, replay, row: dict):
        """What rewards are divided by follows them."""

    def critic_steps(self, warm: bool) -> int:
        return self.args.critic_steps

    def update_critic(self, critic, target, optimizer, seen, action, y) -> dict:
        return self.script.update_critic(critic, target, optimizer, seen, action, y, self.args)

    def finish(self, run: Run, policy: FlowPolicy, state: dict) -> dict | None:
        """Writes the results of the run, and its video if asked for."""
        known = dict(task=self.task, env_steps=state["env_steps"])
        result = run.finish(self.score, self.measure, **known)
        if self.args.capture_video and run.rank == 0:
            self.film(policy, run.path / "videos")
        self.envs.close()
        return result


class Gym(Family):
    script, Policy, names_task, score = rldt_gym, rldt_gym.FlowPolicy, "env_id", "eval_return"
    starts_anew = False

    def __init__(self, args, iterations: tuple[int, int]):
        super().__init__(args)
        self.task = args.env_id
        if args.iterations == 0 and args.wall_budget_s == 0:
            args.iterations = iterations[args.env_id != "Hopper-v4"]
        self.envs = rldt_gym.make_envs(args, args.num_envs)
        self.parts = dict(envs=self.envs)

    def base(self, run: Run) -> FlowPolicy:
        return rldt_gym.get_base(self.args, run, self.envs)

    def demonstrations(self) -> Demonstrations:
        """What policies are cloned from; their normalised actions lie in +-1."""
        data = rldt_gym.dataset.get(self.task, self.args.dataset, self.envs)
        return Demonstrations(data.observations, data.actions, data.episode_ends, data.limits())

    def evaluate(self, policy, episodes: int, seed: int) -> dict[str, float]:
        return rldt_gym.evaluate(policy, self.args, episodes, seed)

    def film(self, policy, folder: Path):
        rldt_gym.record_video(policy, self.task, folder)

    def critic_sizes(self, policy) -> tuple:
        return policy.obs_dim, policy.action_size, self.args.critic_layer_norm

    def reset(self, run, iteration):
        self.envs.reset(derive_seed(self.args.seed, "rollouts", iteration, run.rank))

    def rollout(self, policy, rollout: dict, run: Run, iteration: int, row: dict) -> int:
        """Fills a rollout; returns its environment steps, and writes to the row how episodes ended."""
        steps, returns = rldt_gym.collect(policy, self.envs, rollout, self.args)
        if returns:
            row["train_return"] = np.mean(returns)
        return steps * run.world

    @staticmethod
    def transitions(rollout: dict) -> dict[str, torch.Tensor]:
        """A rollout as obs, next_obs, reward, terminated, truncated and valid, (T, N, ...) each."""
        return rollout | {"valid": torch.ones_like(rollout["reward"])}

    def scale_rewards(self, state, replay, row):
        reward = replay.newest()["reward"]
        row["diagnostics/reward_scale"] = rldt_gym.average_magnitude(state, reward)

    def critic_steps(self, warm):
        return self.args.critic_steps * (rldt_gym.WARMUP_FACTOR if warm else 1)

    def draw(self, replay, policy, target, state: dict, warm: bool):
        """Chunks of some segments, as seen (B, .) and action (B, D), and their targets (B,)."""
        batch, args = replay.draw(self.args.segments), self.args
        lam = rldt_gym.WARMUP_LAMBDA if warm else args.td_lambda
        y = rldt_gym.critic_target(policy, target, batch, state["reward_scale"], lam, args)
        return batch["obs"].flatten(0, 1), batch["action"].flatten(0, 1), y.flatten()


class Sparse(Family):
    """What furniture and robomimic have in common."""

    def evaluate(self, policy, episodes, seed):
        self.start(policy)
        return self.script.evaluate(policy, self.envs, self.args, episodes, seed)

    def start(self, policy):
        """Makes the environments, where that needs a policy."""

    def critic_sizes(self, policy):
        seen, args = policy.obs_dim + self.extra, self.args
        return seen, policy.action_size, args.critic_layer_norm, args.critics

    def collect(self, policy, rollout: dict, run: Run, iteration: int):
        self.start(policy)
        seed = derive_seed(self.args.seed, "rollouts", iteration, run.rank)
        return self.script.collect(policy, None, self.envs, rollout, seed, self.args)

    @classmethod
    def transitions(cls, rollout):
        seen = rollout[cls.seen]  # (T + 1, N, .)
        rows = {name: rollout[name] for name in ("reward", "terminated", "valid", "action")}
        never = torch.zeros_like(rows["reward"])  # a time limit is a failure
        return rows | dict(obs=seen[:-1], next_obs=seen[1:], truncated=never)

    def draw(self, replay, policy, target, state, warm):
        batch = replay.draw(self.args.segments)
        y = self.script.critic_target(policy, target, batch, self.args)
        obs, valid = batch["obs"], batch["valid"] > 0
        seen = obs["state"] if isinstance(obs, dict) else obs
        return seen[valid], batch["action"][valid], y[valid]


class Robomimic(Sparse):
    script, Policy, names_task = rldt_robomimic, rldt_robomimic.Policy, "task"
    score, seen = "eval_success", "state"

    def __init__(self, args, iterations):
        super().__init__(args)
        if args.obs == "image":
            raise SystemExit("Baselines act on states: use --task square-state or another -state.")
        rldt_robomimic.resolve(args)
        self.task, self.spec = f"{args.task}-{args.obs}", rldt_robomimic.TASKS[args.task]

    def base(self, run):
        return rldt_robomimic.get_base(self.args, run)

    def start(self, policy):
        self.envs = self.envs or rldt_robomimic.make_envs(self.args, policy)

    def sizes(self):
        return self.spec.state_dim(images=False), 7 * self.spec.robots

    def demonstrations(self):
        dataset = rldt_robomimic.dataset
        data = dataset.get(self.args.task, "state", self.args.dataset, fast_render=True)
        named = data["state"], data["action"], data["episode_ends"]
        return Demonstrations(*named, dataset.limits(data))

    def film(self, policy, folder):
        rldt_robomimic.record_video(policy, self.envs, folder)

    def rollout(self, policy, rollout, run, iteration, row):
        steps, successes = self.collect(policy, rollout, run, iteration)
        if successes:
            row["train_success"] = np.mean(successes)
        return steps * run.world

    def update_critic(self, critic, target, optimizer, seen, action, y):
        return super().update_critic(critic, target, optimizer, {"state": seen}, action, y)


class Furniture(Sparse):
    script, Policy, names_task = rldt_furniture, rldt_furniture.FlowPolicy, "furniture"
    score, seen, extra = "eval_stages", "obs", 1
    bound = 5.0  # actions are scaled by their deviation

    def __init__(self, args, iterations):
        super().__init__(args)
        rldt_furniture.resolve(args)
        self.task = f"{args.furniture}-{args.randomness}"
        self.envs = rldt_furniture.make_envs(args, args.num_envs)

    def base(self, run):
        return rldt_furniture.get_base(self.args, run, self.envs)

    def demonstrations(self):
        args, dataset = self.args, rldt_furniture.dataset
        data = dataset.get(args.furniture, args.randomness, args.dataset)
        limits = dataset.limits(data, spread=0)
        return Demonstrations(data["state"], data["action"], data["episode_ends"], limits)

    def film(self, policy, folder):
        args = self.args
        rldt_furniture.record_video(policy, args.furniture, args.randomness, args.horizon, folder)

    def critic_sizes(self, policy):
        return *super().critic_sizes(policy), rldt_furniture.CRITIC_WIDTH[self.args.preset]

    def rollout(self, policy, rollout, run, iteration, row):
        steps = self.collect(policy, rollout, run, iteration)
        pairs, most = rollout["reached"][0], rldt_furniture.stages_of(self.args)
        row |= dict(train_success=(pairs == most).float().mean(), train_stages=pairs.mean())
        return steps * run.world


FAMILIES = Gym, Robomimic, Furniture


def family_of(args, iterations=(24, 78)) -> Gym | Robomimic | Furniture:
    """The family whose settings these are; a Gym run has so many iterations on Hopper and elsewhere."""
    cls = next(cls for cls in FAMILIES if isinstance(args, cls.script.TaskArgs))
    return cls(args, iterations)


class Recorder:
    """A policy for `rollout` that acts by act(cond, x0) -> (action (N, D), what to keep), in float32."""

    def __init__(self, policy: FlowPolicy, act: Callable):
        self.policy, self.act, self.kept = policy, act, []

    def __getattr__(self, name: str):
        return getattr(self.policy, name)

    def sample(self, cond: torch.Tensor, x0: torch.Tensor, trajectory=True) -> torch.Tensor:
        """Actions as a trajectory of these alone, (1, N, D)."""
        with torch.autocast(cond.device.type, enabled=False):
            action, kept = self.act(cond, x0)
        self.kept.append(kept)
        return action[None]


def mix(own: type[FlowPolicy], family: Family) -> type[FlowPolicy]:
    """A method's policy class, derived from the family's where that is not FlowPolicy itself."""
    if own is FlowPolicy:
        return family.Policy
    return type(own.__name__, (own, family.Policy), {"script": family.script})


# ------------------------------------------------------------------------------- command line
def flags_of(task: str) -> tuple[type, list[str]]:
    """The family of a task, and the flags by which its script names the task."""
    name, _, kind = task.rpartition("-")
    if kind in ("state", "image"):
        return Robomimic, ["--task", name, "--obs", kind]
    if kind in ("low", "med"):
        return Furniture, ["--furniture", name.replace("-", "_"), "--randomness", kind]
    return Gym, ["--env-id", task]


def choose(argv: list[str]) -> tuple[type, list[str]]:
    """The family that a command line names by --task, or by the run to go on with, and its flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    known, rest = parser.parse_known_args(argv)
    if known.task:
        family, flags = flags_of(known.task)
        return family, flags + rest
    for flag in "--resume", "--evaluate":
        parser.add_argument(flag, dest="run")
    stored = {}
    with suppress(OSError, ValueError, TypeError):  # reading the settings will say why
        stored = json.loads(Path(parser.parse_known_args(argv)[0].run, "args.json").read_text())
    return next((family for family in FAMILIES if family.names_task in stored), Gym), argv


@cache
def settings_of(own: type, shared: type) -> type:
    """The settings of a method on a family's tasks: its own, and `shared` of the script."""
    names = {"__module__": own.__module__, "__doc__": own.__doc__}
    return dataclass(type("Args", (own, shared), names))


def parse_args(shared: dict[str, type], own: type, presets: dict[str, dict], doc: str, argv=None):
    """Command line -> settings. `shared` has, by script, the class of those besides the `own`.

    Presets are the script's, `demos` aside, and over these the method's, of the settings that exist.
    """
    family, argv = choose(sys.argv[1:] if argv is None else argv)
    cls = settings_of(own, shared[family.script.__name__])
    merged = {}
    for name in {*family.script.PRESETS, *presets}:
        theirs, ours = family.script.PRESETS.get(name, {}), presets.get(name, {})
        values = {key: value for key, value in theirs.items() if not hasattr(own, key)} | ours
        merged[name] = {k: v for k, v in values.items() if hasattr(cls, k) and k != "demos"}
    return settings.parse_args(cls, merged, doc, argv)


def launch(main: Callable, shared: dict[str, type], own: type, presets: dict[str, dict], doc: str):
    """A baseline's command line."""
    settings.launch(main, own, presets, doc, partial(parse_args, shared))
