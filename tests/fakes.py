"""What the tests of manipulation share: scripted episodes in place of simulators, and short runs."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import metrics, parse

from envs.interface import Episodes, Step


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
        self.begun, self.executed = [], []
        self.steps, self.valid = Counter(), Counter()  # by seed: env steps, and chunks until all is done

    def observation(self, seed, t):
        """What is seen in chunk t of the episode of a seed: its last five digits, t, and noise."""
        noise = np.random.default_rng([seed, t]).normal(size=self.obs_dim - 2)
        return np.r_[seed % 100_000 / 100_000, t / 10, noise].astype(np.float32)

    @property
    def obs(self):
        pairs = zip(self.seed, self.t, strict=True)
        return np.stack([self.observation(seed, t) for seed, t in pairs])

    def start(self, indices):
        for i, seed in self.take_seeds(indices).items():
            self.seed[i], self.t[i] = seed, 0
            self.begun.append(seed)

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


class Identity:
    """A policy whose actions are its x_0."""

    action_size = 4
    normalize = observe = staticmethod(lambda obs: obs)
    encode = staticmethod(lambda obs: obs["state"])
    sample = staticmethod(lambda cond, x0: x0)
    to_env = staticmethod(lambda action: action.view(len(action), 2, 2).numpy())


class QuadraticCritic:
    """Q = -0.75 |a - 1|^2 from both networks, whatever the state."""

    encoder = None

    def __call__(self, obs, action):
        return -0.75 * (action - 1).square().sum(-1).expand(2, -1)


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


# A run of four iterations, the first and the last of which evaluate.
SHORT = dict(
    threads=1, seed=3, iterations=4, num_envs=2, buffer_iterations=2, eval_every=10, eval_episodes=2,
    final_eval_episodes=3, rounds=2, critic_steps=2, critic_batch=8, segments=6, warmup_iterations=1,
    actor_steps=1, actor_batch=4, n_particles=2, actor_lr=1e-3,
)  # fmt: skip


def only_run(runs):
    (run,) = runs.iterdir()
    return run


def checkpoint(run, name="checkpoint.pt"):
    return torch.load(run / name, weights_only=True)


def same(module, state):
    """Whether a module has exactly these weights."""
    return all(torch.equal(value.cpu(), state[key].cpu()) for key, value in module.state_dict().items())


def check_crash_and_resume(script, argv, runs, whole):
    """Crashes a run in its third training iteration; resumed, it equals `whole` to the last bit."""
    update, calls = script.update_critic, []
    main = lambda argv: script.main(parse(script, argv))

    def crash(*args):
        calls.append(1)
        if len(calls) == 10:
            raise RuntimeError("crash")
        return update(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update_critic", crash)
        with pytest.raises(RuntimeError, match="crash"):
            main(argv)
    run = only_run(runs)
    assert checkpoint(run)["progress"]["iteration"] == 3
    main(["--resume", run])
    rows = metrics(run)
    assert rows == metrics(whole)
    assert any(0 < float(row["train_success"] or 0) < 1 for row in rows)  # it tests something
    ours, expected = checkpoint(run), checkpoint(whole)
    for saved in ours, expected:
        for name in "actor_optimizer", "critic_optimizer":
            saved[name] = saved[name]["state"]
    for name in "policy", "critic", "target", "reference", "actor_optimizer", "critic_optimizer":
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=0)
