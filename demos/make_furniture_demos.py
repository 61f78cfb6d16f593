"""Makes FurnitureBench demonstrations with scripted assemblers on MuJoCo.

    python -m demos.make_furniture_demos --furniture one_leg --randomness med --episodes 200   # writes demos/one_leg/med.hdf5

The assemblers read poses from the simulator and act through the same actions as a policy. While the arm moves freely, what it executes is
its action plus correlated noise on the position; recorded is the action without noise, which leads back. With --pushes the open or
freely moving hand is also pushed off its course now and then, by centimetres. With --clone the hand also follows a policy's chunks now and
then, so that a policy cloned from it sees its own errors together with the way back (DAgger, Ross et al. 2011). Only successes are written:
data/demo_i/{actions, rewards, obs/state}, float32, with one row per environment step.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from scipy.stats import binomtest
from tqdm import tqdm

from demos.furniture_lamp import Lamp
from demos.furniture_one_leg import OneLeg
from demos.furniture_skills import OPEN, Arm
from demos.make_robomimic_demos import replacing
from envs.furniture_mujoco import FurnitureEnv, PhysicsError

DEMOS = Path(__file__).parent
ASSEMBLERS: dict[str, Callable] = {"one_leg": OneLeg, "lamp": Lamp}
MEMORY = 0.7  # of the noise, per step
CHUNK = 8  # steps of a turn


@dataclass
class Args:
    furniture: Literal["one_leg", "lamp"] = "one_leg"
    """Furniture to assemble."""
    randomness: Literal["low", "med"] = "low"
    """Range of the initial states."""
    episodes: int = 100
    """Successful episodes to record; failures are dropped."""
    seed: int = 0
    """Seed of the first attempt; the others follow one by one."""
    noise: float = 0.004
    """Standard deviation (m) of what is added to the noise on the position in each step, so that cloning sees off-nominal states; 0: none."""
    pushes: float = 0.0
    """Probability per step that the open or freely moving hand is pushed up to 4 cm off its course for 2 to 7 steps."""
    clone: Path | None = None
    """Base policy (.safetensors) that moves the hand in part of the chunks; the fingers, and what is recorded, stay the assembler's."""
    clone_share: float = 0.3
    """Probability per chunk of actions that --clone moves the hand."""
    out: Path | None = None
    """Output; default demos/<furniture>/<randomness>.hdf5."""


def wilson(successes: int, attempts: int) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson 1927)."""
    interval = binomtest(successes, attempts).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def load_clone(path: Path, furniture: str) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """A base policy as a function of a state (obs_dim,) and a source of noise, that returns a chunk of actions (chunk, 10)."""
    import torch  # only here: a demonstration needs neither it nor the script

    import rldt_furniture

    torch.set_num_threads(1)
    policy = rldt_furniture.load_base(path, rldt_furniture.Args(furniture=furniture, device="cpu"))

    def act(state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noise = torch.from_numpy(rng.standard_normal((1, policy.action_size), np.float32))
        return policy.to_env(policy.sample(policy.normalize(state)[None], noise))[0]

    return act


def run_episode(env: FurnitureEnv, assembler: Callable, seed: int, noise: float = 0.004, pushes: float = 0.0, clone: Callable | None = None,
                clone_share: float = 0.3) -> dict[str, np.ndarray]:  # fmt: skip
    """The assembler's episode from a reset with `seed`, until it succeeds or time is up; in part of its chunks `clone` moves the hand.

    Returns actions (T, 10), rewards (T,) and state (T, obs_dim), before each action, all float32. It succeeded if the rewards
    sum up to the number of pairs. Raises PhysicsError where the simulation diverges.
    """
    rng, dice = np.random.default_rng(seed), np.random.default_rng([seed, 1])  # the latter for the clone, so that all else stays as without
    state, info = env.reset(seed=seed)
    arm = Arm(env, rng)

    def clone_turns() -> Iterator[Iterable]:
        """Chunks of the clone, or as many times None."""
        while True:
            yield clone(state, dice) if clone and dice.random() < clone_share else itertools.repeat(None, CHUNK)

    states, actions, rewards, disturbance, truncated = [], [], [], np.zeros(3), False
    push, left = np.zeros(3), 0  # off the course (m), and for how many more steps
    turns = itertools.chain.from_iterable(clone_turns())  # the clone's action in each step, or None in the assembler's turns
    for action in assembler(arm).steps():
        disturbance = MEMORY * (disturbance + rng.normal(0, noise, 3))
        executed = action.copy()
        if arm.rough:
            executed[:3] += disturbance
        if pushes and left == 0 and rng.random() < pushes:
            push, left = rng.uniform((-0.04, -0.04, 0), (0.04, 0.04, 0.04)), rng.integers(2, 8)
        if left and (arm.rough or arm.gripper == OPEN):
            executed[:3] += push
        left = max(0, left - 1)
        if (moved := next(turns)) is not None:
            executed[:9] = moved[:9]
        states.append(state)
        actions.append(action)
        state, reward, _, truncated, info = env.step(executed)
        rewards.append(reward)
        if info["success"] or truncated:
            break
    return {"actions": np.array(actions, np.float32), "rewards": np.array(rewards, np.float32), "state": np.array(states)}


def make(args: Args) -> Path:
    """Lets the assembler act until `args.episodes` have succeeded and writes them; returns the file's path."""
    if args.episodes < 1 or args.noise < 0 or not 0 <= args.pushes <= 1 or not 0 <= args.clone_share <= 1:
        raise SystemExit("--episodes must be at least 1, --noise at least 0, --pushes and --clone-share probabilities.")
    clone = load_clone(args.clone, args.furniture) if args.clone else None
    out = args.out or DEMOS / args.furniture / f"{args.randomness}.hdf5"
    env = FurnitureEnv(args.furniture, args.randomness)
    pairs, lengths, diverged = len(env.furniture.pairs), [], 0
    with replacing(out) as file, tqdm(total=args.episodes, desc=f"{args.furniture} {args.randomness}", unit="demo") as progress:
        data = file.create_group("data")
        for attempt in itertools.count():
            try:
                episode = run_episode(env, ASSEMBLERS[args.furniture], args.seed + attempt, args.noise, args.pushes, clone, args.clone_share)
            except PhysicsError:
                episode, diverged = None, diverged + 1
            if episode and episode["rewards"].sum() == pairs:
                group = data.create_group(f"demo_{len(lengths)}")
                for name, value in (("actions", episode["actions"]), ("rewards", episode["rewards"]), ("obs/state", episode["state"])):
                    group.create_dataset(name, data=value, chunks=value.shape, compression="gzip", compression_opts=9, shuffle=True)
                group.attrs["num_samples"], group.attrs["seed"] = len(episode["actions"]), args.seed + attempt
                lengths.append(len(episode["actions"]))
                progress.update()
            progress.set_postfix_str(f"{len(lengths)}/{attempt + 1} succeeded")
            if len(lengths) == args.episodes:
                break
            if attempt >= 20 and len(lengths) < 0.1 * attempt:
                raise SystemExit(f"Only {len(lengths)} of {attempt + 1} attempts succeeded: gave up, wrote nothing. Try less --noise.")
        data.attrs.update({"furniture": args.furniture, "randomness": args.randomness, "seed": args.seed, "noise": args.noise, "pushes": args.pushes,
                           "clone": str(args.clone or ""), "clone_share": args.clone_share if clone else 0.0, "backend": "MuJoCo",
                           "attempts": attempt + 1, "total": sum(lengths)})  # fmt: skip
    low, high = wilson(len(lengths), attempt + 1)
    print(f"{args.furniture}, {args.randomness} (MuJoCo): {len(lengths)} of {attempt + 1} attempts succeeded ({len(lengths) / (attempt + 1):.0%}, "
          f"95 % interval {low:.0%} to {high:.0%}), {np.mean(lengths):.0f} steps on average, {diverged} diverged")  # fmt: skip
    return out


if __name__ == "__main__":
    try:
        path = make(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: nothing was written.") from None
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
