"""Makes FurnitureBench demonstrations with scripted assemblers on MuJoCo.

    python -m demos.make_furniture_demos --randomness med    # writes demos/one_leg/med.hdf5

The assemblers read poses from the simulator. While the arm moves freely, its position gets correlated
noise; recorded is the action without it, which leads back. With --pushes the hand is also pushed. With
--clone it also follows a policy, whose errors are then recorded with the way back (DAgger, Ross et al.
2011). Successes are written: data/demo_i/{actions, rewards, obs/state}, a row per environment step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from common.flow import FlowPolicy
from common.settings import Count, Seed, Share, Weight, check_bounds
from demos.furniture_lamp import Lamp
from demos.furniture_one_leg import OneLeg
from demos.furniture_skills import OPEN, Arm
from demos.hdf5 import DEMOS, replacing
from demos.make_robomimic_demos import record, write_arrays
from envs.furniture_mujoco import FURNITURE, FurnitureEnv, PhysicsError

ASSEMBLERS: dict[str, Callable] = {"one_leg": OneLeg, "lamp": Lamp}
MEMORY = 0.7  # of the noise, per step
CHUNK = 8  # steps of a turn


@dataclass
class Args:
    furniture: Literal["one_leg", "lamp"] = "one_leg"  # furniture to assemble
    randomness: Literal["low", "med"] = "low"  # range of the initial states
    episodes: Count = 100  # successful episodes to record; failures are dropped
    seed: Seed = 0  # seed of the first attempt; the others follow one by one
    noise: Weight = 0.004  # standard deviation (m) of a step's noise, of which MEMORY is added
    pushes: Share = 0.0  # probability per step of a push of up to 4 cm along each axis, for 2 to 7 steps
    clone: Path | None = None  # base policy that moves the hand, not the fingers, in part of the chunks
    clone_share: Share = 0.3  # probability per chunk of actions that --clone moves the hand
    out: Path | None = None  # output; default demos/<furniture>/<randomness>.hdf5


def load_clone(path: Path, furniture: str) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """A base policy, from a state (obs_dim,) and a source of noise to a chunk (chunk, 10)."""
    torch.set_num_threads(1)
    policy = FlowPolicy.load(path)
    sizes = policy.obs_dim, policy.action_dim, policy.chunk
    if sizes != (FURNITURE[furniture].obs_dim, 10, CHUNK):
        raise SystemExit(f"{path}: not a policy of {furniture} with chunks of {CHUNK} actions.")

    def act(state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noise = torch.from_numpy(rng.standard_normal((1, policy.action_size), np.float32))
        return policy.to_env(policy.sample(policy.normalize(state)[None], noise))[0]

    return act


def run_episode(env: FurnitureEnv, assembler: Callable, seed: int, noise: float = 0.004, pushes=0.0,
                clone: Callable | None = None, clone_share=0.3) -> dict[str, np.ndarray]:  # fmt: skip
    """The assembler's episode from a reset with `seed`, until it succeeds or time is up.

    `clone` moves the hand in part of its chunks. Returns actions (T, 10), rewards (T,) and state
    (T, obs_dim), before each action, all float32. Raises PhysicsError where the simulation diverges.
    """
    rng = np.random.default_rng(seed)
    dice = np.random.default_rng([seed, 1])  # for the clone, so that all else stays as without
    state, info = env.reset(seed=seed)
    arm = Arm(env, rng)

    def clone_turns() -> Iterator[np.ndarray | None]:
        """The clone's action in each step, or None in the assembler's turns."""
        while True:
            yield from clone(state, dice) if clone and dice.random() < clone_share else [None] * CHUNK

    states, actions, rewards, disturbance = [], [], [], np.zeros(3)
    push, left = np.zeros(3), 0  # off the course (m), and for how many more steps
    for action, moved in zip(assembler(arm).steps(), clone_turns(), strict=False):
        disturbance = MEMORY * (disturbance + rng.normal(0, noise, 3))
        executed = action.copy()
        if arm.rough:
            executed[:3] += disturbance
        if pushes and left == 0 and rng.random() < pushes:
            push, left = rng.uniform((-0.04, -0.04, 0), (0.04, 0.04, 0.04)), rng.integers(2, 8)
        if left and (arm.rough or arm.gripper == OPEN):
            executed[:3] += push
        left = max(0, left - 1)
        if moved is not None:
            executed[:9] = moved[:9]
        states.append(state)
        actions.append(action)
        state, reward, _, truncated, info = env.step(executed)
        rewards.append(reward)
        if info["success"] or truncated:
            break
    columns = {"actions": actions, "rewards": rewards, "state": states}
    return {name: np.array(values, np.float32) for name, values in columns.items()}


def make(args: Args) -> Path:
    """Lets the assembler act until `args.episodes` have succeeded; returns the path of their file."""
    check_bounds(args)
    clone = load_clone(args.clone, args.furniture) if args.clone else None
    out = args.out or DEMOS / args.furniture / f"{args.randomness}.hdf5"
    env, assembler = FurnitureEnv(args.furniture, args.randomness), ASSEMBLERS[args.furniture]

    def attempt(seed: int) -> dict | None:
        try:
            episode = run_episode(env, assembler, seed, args.noise, args.pushes, clone, args.clone_share)
        except PhysicsError:
            return None
        episode["obs/state"] = episode.pop("state")
        return episode if episode["rewards"].sum() == len(env.furniture.pairs) else None

    with replacing(out) as file:
        data = file.create_group("data")
        lengths, attempts = record(data, args, args.furniture, attempt, write_arrays)
        for key in ("furniture", "randomness", "seed", "noise", "pushes"):
            data.attrs[key] = getattr(args, key)
        data.attrs.update(clone=str(args.clone or ""), clone_share=args.clone_share if clone else 0.0)
        data.attrs.update(backend="MuJoCo", attempts=attempts, total=sum(lengths))
    return out


if __name__ == "__main__":
    path = make(tyro.cli(Args, description=__doc__))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
