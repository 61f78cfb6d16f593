"""How the functions of the three scripts differ, and scripted episodes in place of simulators."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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
    fixed = dict(device="cpu", precision="float32", exploration_steps=2)
    if script is not rldt_gym:
        fixed |= dict(horizon=20, q_gradient="critic", transport_scale=1.0)
        fixed |= dict(demos=False, bc_weight=0.1)
        lamp = dict(furniture="lamp", backend="mujoco")
        fixed |= lamp if script is rldt_furniture else dict(task="lift")
    return script.Args(**fixed | changes)


def small_policy(script, obs_dim=4, action_dim=2, chunk=2, euler_steps=4, cameras=0):
    sizes = dict(chunk=chunk, euler_steps=euler_steps, width=16, depth=3, time_dim=8)
    if script is rldt_robomimic:
        return script.Policy(obs_dim, action_dim, cameras=cameras, object_size=10 * cameras, **sizes)
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


def nothing_good(script):
    """What sparse updates of the actor take besides: no chunk to clone."""
    return [] if script is rldt_gym else [(None, ())]


PLAIN = dict(epochs=1, batch=8, lr=1e-3, chunk=4, euler_steps=4, width=16, depth=3, time_dim=8)
PRETRAINING = {rldt_gym: PLAIN, rldt_robomimic: PLAIN | dict(head_steps=0)}
PRETRAINING[rldt_furniture] = PLAIN | dict(spread=1.0, start=None)


def pretrain(script, data, checkpoint=None, **changes):
    """A small, short pretraining on demonstrations of Lift or of the lamp."""
    args = arguments(script)
    if script is rldt_robomimic:
        args.task, args.obs = "lift", "image" if "rgb" in data else "state"
    torch.manual_seed(0)
    return script.pretrain(args, data, checkpoint, **PRETRAINING[script] | changes)


def demonstrations(obs_dim, action_dim, lengths=(3, 17, 20)):
    """Episodes whose first state and action are the step number, whose second action is the episode."""
    ends = np.cumsum(lengths)
    steps = np.arange(ends[-1], dtype=np.float32)
    action = np.stack([steps, 1 + np.digitize(steps, ends)] + [steps + 2] * (action_dim - 2), 1)
    state = np.stack([steps] + [-1 - steps] * (obs_dim - 1), 1)
    return {"state": state, "action": action.astype(np.float32), "episode_ends": ends}


def new_replay(script, args, policy, rows):
    """A replay of rollouts of so many rows."""
    if script is rldt_furniture:
        args.horizon = rows * policy.chunk
    else:
        args.rollout_chunks = rows
    return script.Replay(args, policy)


# -------------------------------------------------------------------------------------- episodes
class FakeEnvs(Episodes):
    """Scripted episodes in place of a simulator; see envs/interface.py.

    An episode lasts length(seed) chunks; scores(seed, t, chunk) points are scored in chunk t, at most
    `stages` in all. A step that ends an episode takes one environment step, any other as many as the
    chunk has.
    """

    def __init__(self, num_envs, length, scores, stages=1, stop=True, obs_dim=4, action_dim=2):
        super().__init__(num_envs)
        self.length, self.scores, self.stages, self.stop = length, scores, stages, stop
        self.obs_dim, self.action_dim, self.closed = obs_dim, action_dim, False
        self.seed, self.t = np.zeros((2, num_envs), int)
        self.begun, self.executed = [], []  # seeds since each reset, and chunks
        self.steps, self.valid = Counter(), Counter()  # by seed: env steps, and chunks until all is done

    def observation(self, seed, t):
        """What is seen in chunk t of the episode of a seed: its last five digits, t, and noise."""
        noise = np.random.default_rng([seed, t]).normal(size=self.obs_dim - 2)
        return np.r_[seed % 100_000 / 100_000, t / 10, noise].astype(np.float32)

    @property
    def obs(self):
        each = [self.observation(seed, t) for seed, t in zip(self.seed, self.t, strict=True)]
        if isinstance(each[0], dict):
            return {name: np.stack([obs[name] for obs in each]) for name in each[0]}
        return np.stack(each)

    def reset(self, seeds):
        self.begun.append([])
        super().reset(seeds)

    def start(self, indices):
        for i, seed in self.take_seeds(indices).items():
            self.seed[i], self.t[i] = seed, 0
            self.begun[-1].append(seed)

    def step(self, chunks):
        self.executed.append(chunks.copy())
        reward, length = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for i in np.flatnonzero(self.episode >= 0):
            seed, t = self.seed[i], self.t[i]
            self.valid[seed] += self.score[i] < self.stages
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
            obs["object"] = rng.normal(size=10).astype(np.float32)
        return obs


def fake_envs(script, *args, **kwargs):
    """Fake environments of the script's task."""
    form = NamedEnvs if script is rldt_robomimic else FakeEnvs
    return form(*args, **dict(stages=MOST[script]) | kwargs)


def scripted(script, num_envs, lengths, scored, **kwargs):
    """Episodes of seeds 100, 101, ... of `lengths` chunks; each chunk in `scored` scores a point."""
    scores = lambda seed, t, chunk: scored[seed - 100].count(t)
    return fake_envs(script, num_envs, lambda seed: lengths[seed - 100], scores, **kwargs)


def roll_out(script, envs, rows, frozen=False, critic=None, **changes):
    """Fills a rollout from fake environments: gives the policy, the rollout and what collect returns."""
    args = arguments(script, num_envs=envs.num_envs, buffer_iterations=1, **changes)
    policy = small_policy(script, cameras=int(getattr(envs, "images", False)))
    policy.frozen = frozen  # its encoder of images
    replay = new_replay(script, args, policy, rows)
    for value in replay.slots.values():
        value.fill_(77)  # as if left from an older rollout
    if script is rldt_gym:
        envs.reset(100)
        result = script.collect(policy, envs, replay.next(), args)
    else:
        result = script.collect(policy, critic, envs, replay.next(), 100, args)
    return policy, replay.newest(), result


# ------------------------------------------------------------------------------------- helpers
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


def recorded(monkeypatch, script, name, of):
    """What `of(*args)` was at each call of a script's function."""
    calls, function = [], getattr(script, name)
    monkeypatch.setattr(script, name, lambda *args: calls.append(of(*args)) or function(*args))
    return calls


def same(module, state):
    """Whether a module has exactly these weights."""
    return all(torch.equal(value.cpu(), state[key].cpu()) for key, value in module.state_dict().items())
