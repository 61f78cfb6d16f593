"""What the tests of all three scripts share: their differences, scripted episodes, and short runs."""

import io
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, parse

import rldt_furniture
import rldt_gym
import rldt_robomimic
from common.flow import FlowPolicy
from envs.interface import Episodes, Step

each_script = pytest.mark.parametrize(
    "script", [rldt_gym, rldt_robomimic, rldt_furniture], ids=["gym", "robomimic", "furniture"]
)
each_sparse = pytest.mark.parametrize("script", [rldt_robomimic, rldt_furniture])
MOST = {rldt_gym: math.inf, rldt_robomimic: 1, rldt_furniture: 2}  # what an episode scores
ENDS_IN = {rldt_robomimic: "succeeded", rldt_furniture: "reached"}  # the replay's name of that


# ------------------------------------------------------------------ how the scripts' functions differ
def arguments(script, **changes):
    """Arguments of the functions below main(); furniture assembles a lamp, of two pairs."""
    fixed = dict(device="cpu", bf16=False, exploration_steps=2)
    if script is not rldt_gym:
        fixed |= dict(horizon=20, q_gradient="critic", transport_scale=1.0)
    if script is rldt_furniture:
        fixed |= dict(furniture="lamp", backend="mujoco")
    return script.Args(**fixed | changes)


def small_policy(script, obs_dim=4, action_dim=2, chunk=2, euler_steps=4, cameras=0):
    sizes = dict(chunk=chunk, euler_steps=euler_steps, width=16, depth=3, time_dim=8)
    if script is rldt_robomimic:
        return script.Policy(obs_dim, action_dim, cameras=cameras, **sizes)
    return FlowPolicy(obs_dim, action_dim, **sizes)


def small_critic(script, policy, **network):
    sees = policy.cond_dim + (script is rldt_furniture)
    return script.Critic(sees, policy.action_size, True, **dict(width=16, depth=2) | network)


def with_stage(script, state):
    """What a critic sees of states (..., obs_dim): in furniture, a pair of two is assembled."""
    return F.pad(state, (0, 1), value=0.5) if script is rldt_furniture else state


def observed(script, state):
    """What updates take of states (..., obs_dim): in robomimic, they have a name."""
    return {"state": state} if script is rldt_robomimic else with_stage(script, state)


def new_replay(script, args, policy, rows):
    """A replay of rollouts of so many rows."""
    if script is rldt_furniture:
        args.horizon = rows * policy.chunk
    else:
        args.rollout_chunks = rows
    sizes = (policy.obs_dim, policy.action_size) if script is rldt_gym else (policy,)
    return script.Replay(args, *sizes)


# -------------------------------------------------------------------------------------- episodes
class FakeEnvs(Episodes):
    """Scripted episodes in place of a simulator; see envs/interface.py.

    An episode lasts length(seed) chunks; scores(seed, t, chunk) points are scored in chunk t, at most
    `stages` in all. In chunk diverges(seed) the simulation diverges. A step that ends an episode takes
    one environment step, any other as many as the chunk has.
    """

    def __init__(self, num_envs, length, scores, stages=1, stop=True, obs_dim=4, action_dim=2,
                 diverges=lambda seed: None):  # fmt: skip
        super().__init__(num_envs)
        self.length, self.scores, self.stages, self.stop = length, scores, stages, stop
        self.obs_dim, self.action_dim, self.diverges, self.closed = obs_dim, action_dim, diverges, False
        self.seed, self.t = np.zeros((2, num_envs), int)
        self.begun, self.executed = [], []  # seeds since each reset, and chunks
        self.steps, self.valid = Counter(), Counter()  # by seed: env steps, and chunks until all is done

    def observation(self, seed, t):
        """What is seen in chunk t of the episode of a seed: its last five digits, t, and noise."""
        noise = np.random.default_rng([seed, t]).normal(size=self.obs_dim - 2)
        return np.r_[seed % 100_000 / 100_000, t / 10, noise].astype(np.float32)

    @property
    def obs(self):
        pairs = zip(self.seed, self.t, strict=True)
        return np.stack([self.observation(seed, t) for seed, t in pairs])

    def reset(self, seeds):
        self.begun.append([])
        super().reset(seeds)

    def start(self, indices):
        for i, seed in self.take_seeds(indices).items():
            self.seed[i], self.t[i] = seed, 0
            self.begun[-1].append(seed)

    def step(self, chunks, active=None):
        self.executed.append(chunks.copy())
        reward, length = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for i in np.flatnonzero(self.running(chunks, active)):
            seed, t = self.seed[i], self.t[i]
            self.valid[seed] += self.score[i] < self.stages
            if self.diverges(seed) == t:  # what is seen is the last finite state
                truncated[i] = True
            else:
                reward[i] = min(self.scores(seed, t, chunks[i]), self.stages - self.score[i])
                self.score[i] += int(reward[i])
                terminated[i] = self.stop and self.score[i] == self.stages
                truncated[i] = t + 1 == self.length(seed) and not terminated[i]
                self.t[i] += 1
            length[i] = 1 if terminated[i] or truncated[i] else chunks.shape[1]
            self.steps[seed] += length[i]
        step = Step(self.obs, reward, terminated, truncated, length, self.score.copy())
        self.start(np.flatnonzero(terminated | truncated))
        return step

    def close(self):
        self.closed = True


class NamedEnvs(FakeEnvs):
    """Fake environments whose observations are robomimic's: by name, some with images."""

    def __init__(self, *args, images=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.images = images

    def observation(self, seed, t):
        obs = {"state": super().observation(seed, t)}
        if self.images:
            rng = np.random.default_rng([seed, t])
            obs["rgb"] = rng.integers(256, size=(3, 96, 96), dtype=np.uint8)
        return obs

    @property
    def obs(self):
        each = [self.observation(seed, t) for seed, t in zip(self.seed, self.t, strict=True)]
        return {name: np.stack([obs[name] for obs in each]) for name in each[0]}


def fake_envs(script, *args, **kwargs):
    """Fake environments of the script's task."""
    form = NamedEnvs if script is rldt_robomimic else FakeEnvs
    return form(*args, **dict(stages=MOST[script]) | kwargs)


def scripted(script, num_envs, lengths, scored, diverges=None, **kwargs):
    """Episodes of seeds 100, 101, ... of `lengths` chunks; each chunk in `scored` scores a point."""
    scores = lambda seed, t, chunk: scored[seed - 100].count(t)
    length, diverges = lambda seed: lengths[seed - 100], (diverges or {}).get
    return fake_envs(script, num_envs, length, scores, diverges=diverges, **kwargs)


def roll_out(script, envs, rows, **changes):
    """Fills a rollout from fake environments: gives the policy, the rollout and what collect returns."""
    own = dict(encoder="own") if script is rldt_robomimic else {}
    fixed = dict(num_envs=envs.num_envs, buffer_iterations=1) | own
    args = arguments(script, **fixed | changes)
    policy = small_policy(script, cameras=int(getattr(envs, "images", False)))
    replay = new_replay(script, args, policy, rows)
    for value in replay.slots.values():
        value.fill_(77)  # as if left from an older rollout
    if script is rldt_gym:
        envs.reset(100)
        result = script.collect(policy, envs, replay.next(), args)
    else:
        result = script.collect(policy, envs, replay.next(), 100, args)
    return policy, replay.newest(), result


# ------------------------------------------------------------------------------------ short runs
TASKS = {  # script, sizes of observations and actions, and flags
    "hopper": (rldt_gym, 11, 3, dict(env_id="Hopper-v4", rollout_chunks=13)),
    "state": (rldt_robomimic, 19, 7, dict(task="lift", horizon=40, rollout_chunks=13)),
    "image": (rldt_robomimic, 9, 7, dict(task="lift", obs="image", horizon=40, rollout_chunks=13)),
    "one_leg": (rldt_furniture, 58, 10, dict(furniture="one_leg", backend="mujoco", horizon=52)),
    "lamp": (rldt_furniture, 44, 10, dict(furniture="lamp", backend="mujoco", horizon=52)),
}
SHORT = dict(  # four iterations, the first and the last of which evaluate
    threads=1, seed=3, device=DEVICE, iterations=4, num_envs=2, buffer_iterations=2, eval_every=10,
    eval_episodes=2, final_eval_episodes=3, rounds=2, critic_steps=2, critic_batch=8, segments=6,
    warmup_iterations=1, actor_steps=1, actor_batch=4, n_particles=2, actor_lr=1e-3,
    exploration_steps=2, reference_every=1,
)  # fmt: skip


def flags(task, base, runs, /, **changes):
    """Flags of a short run."""
    script, *_, own = TASKS[task]
    sparse = {} if script is rldt_gym else dict(q_gradient="critic", transport_scale=30.0)
    return words(SHORT | sparse | own | dict(base=base, runs=runs) | changes)


def words(values):
    """Settings as a command line."""
    flags = []
    for key, value in values.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def main(script, argv):
    return script.main(parse(script, argv))


def use_fakes(patch, script, stop=True):
    """Has main() run on fake environments, all `made`, and on short segments. Gym keeps its own.

    Their episodes have 3 to 5 chunks, and the actions decide which of them score.
    """
    made = []

    def make_envs(args, _):
        task = args.furniture if script is rldt_furniture else args.obs
        sizes = dict(zip(("obs_dim", "action_dim"), TASKS[task][1:3], strict=True))
        sizes |= dict(images=True) if task == "image" else {}
        scores = lambda seed, t, chunk: int(math.sin(100 * chunk.sum()) > 0.5)
        stages = 2 if task == "lamp" else 1
        length = lambda seed: 3 + seed % 3
        made.append(fake_envs(script, args.num_envs, length, scores, stages=stages, stop=stop, **sizes))
        return made[-1]

    patch.setattr(script, "SEGMENT", 3)
    patch.setattr(script, "ACTOR_WARMUP", 3)
    name, value = ("WARMUP_FACTOR", 1) if script is rldt_gym else ("make_envs", make_envs)
    patch.setattr(script, name, value)
    return made


def only_run(runs):
    (run,) = runs.iterdir()
    return run


def content(path):
    """What is stored behind a checkpoint's SHA-256."""
    return torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)


def checkpoint(run, rank=0):
    (path,) = run.glob(f"checkpoint{rank}.*.pt")
    return content(path)


def kept_rollout(run, slot, rank=0):
    """The rollout in a slot of a run's replay."""
    return content(run / f"checkpoint{rank}.replay{slot}")["newest"]


def same(module, state):
    """Whether a module has exactly these weights."""
    return all(torch.equal(value.cpu(), state[key].cpu()) for key, value in module.state_dict().items())
