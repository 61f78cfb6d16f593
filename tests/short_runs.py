"""Short runs of the three scripts, on fake environments where the task is one of manipulation."""

import io
import math

import torch
from conftest import DEVICE, parse
from fakes import fake_envs, words

import rldt_furniture
import rldt_gym
import rldt_robomimic

TASKS = {  # script, sizes of observations and actions, and flags
    "hopper": (rldt_gym, 11, 3, dict(env_id="Hopper-v4", rollout_chunks=13)),
    "state": (rldt_robomimic, 19, 7, dict(task="lift", horizon=40, rollout_chunks=13)),
    "image": (rldt_robomimic, 9, 7, dict(task="lift", obs="image", horizon=40, rollout_chunks=13)),
    "one_leg": (rldt_furniture, 58, 10, dict(furniture="one_leg", backend="mujoco", horizon=52)),
    "lamp": (rldt_furniture, 44, 10, dict(furniture="lamp", backend="mujoco", horizon=52)),
}
SHORT = dict(  # four iterations, the first and the last of which evaluate
    threads=1, seed=3, precision="float32", device=DEVICE, iterations=4, num_envs=2,
    buffer_iterations=2, eval_every=10, eval_episodes=2, final_eval_episodes=3, rounds=2,
    critic_steps=2, critic_batch=8, segments=6, warmup_iterations=1, actor_steps=1, actor_batch=4,
    n_particles=2, actor_lr=1e-3, exploration_steps=2, reference_every=1,
)  # fmt: skip


def flags(task, base, runs, /, **changes):
    """Flags of a short run."""
    script, *_, own = TASKS[task]
    sparse = dict(q_gradient="critic", transport_scale=30.0, demos=task in ("state", "lamp"))
    sparse |= dict(best_of=4, critics=4, bc_weight=0.1)
    sparse = {} if script is rldt_gym else sparse
    return words(SHORT | sparse | own | dict(base=base, runs=runs) | changes)


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
