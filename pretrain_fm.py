"""Pretrains a flow-matching base policy, nothing else: the other door to the three scripts' `pretrain`.

    python pretrain_fm.py gym --env-id Hopper-v4 --out base.safetensors
    python pretrain_fm.py robomimic --task square --obs state --out base.safetensors
    python pretrain_fm.py furniture --furniture one_leg --randomness low --out base.safetensors

writes a file for --base, with its score. Settings that are not given are the script's PRETRAINING.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import rldt_furniture  # first: it imports Isaac Gym, which must come before torch
import rldt_gym
import rldt_robomimic
from common.runs import derive_seed
from common.settings import Count, Size, Weight, launch, set_up
from demos import dataset, furniture, robomimic


@dataclass
class Pretraining:
    """Settings of pretraining; None: the script's."""

    # pretraining
    out: Path | None = None  # file to write; default: where the script looks for it, in demos/
    epochs: Count | None = None  # passes over the data
    batch: Count | None = None  # chunks of actions per step
    lr: Weight | None = None  # first step size of AdamW, falling to a tenth along a cosine
    head_steps: Size | None = None  # with images: further steps of the velocity network alone
    spread: Weight | None = None  # furniture: deviations from the mean that become 1; 0: the range
    start: Path | None = None  # furniture: base policy whose weights and scaling come first

    # sizes of the policy
    chunk: Count | None = None  # actions per decision, executed open loop
    euler_steps: Count | None = None  # K, Euler steps from noise to action
    width: Count | None = None  # of the velocity network's hidden layers
    depth: Count | None = None  # hidden layers of the velocity network, odd
    time_dim: Count | None = None  # size of the time embedding, even

    def settings(self, defaults: dict) -> dict:
        """The script's settings with those that were given."""
        given = {f.name: v for f in fields(Pretraining)[1:] if (v := getattr(self, f.name)) is not None}
        unused = [n for n in ("base", "track", "capture_video", "wall_budget_s") if getattr(self, n)]
        for name in [*unused, *(given.keys() - defaults.keys())]:
            raise SystemExit(f"--{name.replace('_', '-')} is not a setting of this pretraining")
        if self.out and self.out.is_dir():
            raise SystemExit(f"--out {self.out}: is a folder")
        chosen = defaults | given
        if chosen["depth"] < 3 or chosen["depth"] % 2 == 0:
            raise SystemExit("--depth must be odd and at least 3: residual blocks have two layers")
        if chosen["time_dim"] < 4 or chosen["time_dim"] % 2:
            raise SystemExit("--time-dim must be even and at least 4: sines and cosines")
        return chosen


@dataclass
class Gym(Pretraining, rldt_gym.TaskArgs):
    def run(self):
        settings = self.settings(rldt_gym.PRETRAINING[self.preset])
        out = self.out or dataset.DEMOS / self.env_id / "base.safetensors"
        data = dataset.get(self.env_id, self.dataset, rldt_gym.make_envs(self, 1))
        policy = rldt_gym.pretrain(self, data, out.with_suffix(".unfinished"), **settings)
        return policy, out, lambda **of: rldt_gym.evaluate(policy, self, **of)


@dataclass
class Robomimic(Pretraining, rldt_robomimic.TaskArgs):
    episodes: Size = 0  # demonstrations to clone; 0: all
    split: str | None = None  # clone those of mask/<split> in the file

    def run(self):
        chunk = dict(chunk=rldt_robomimic.TASKS[self.task].chunk)
        settings = self.settings(rldt_robomimic.PRETRAINING[self.preset][self.obs] | chunk)
        out = self.out or dataset.DEMOS / self.task / f"base_{self.obs}.safetensors"
        fast = rldt_robomimic.FAST_RENDER[self.preset]
        data = robomimic.get(self.task, self.obs, self.dataset, fast, self.episodes, self.split)
        policy = rldt_robomimic.pretrain(self, data, out.with_suffix(".unfinished"), **settings)
        make_envs, evaluate = rldt_robomimic.make_envs, rldt_robomimic.evaluate
        return policy, out, lambda **of: evaluate(policy, make_envs(self, policy), self, **of)


@dataclass
class Furniture(Pretraining, rldt_furniture.TaskArgs):
    episodes: Size = 0  # demonstrations to clone; 0: all

    def run(self):
        rldt_furniture.resolve(self)
        settings = self.settings(rldt_furniture.PRETRAINING[self.preset])
        out = self.out or dataset.DEMOS / self.furniture / f"base_{self.randomness}.safetensors"
        data = furniture.get(self.furniture, self.randomness, self.dataset, self.episodes)
        policy = rldt_furniture.pretrain(self, data, out.with_suffix(".unfinished"), **settings)
        make_envs, evaluate = rldt_furniture.make_envs, rldt_furniture.evaluate
        return policy, out, lambda **of: evaluate(policy, make_envs(self, self.num_envs), self, **of)


FAMILIES = {"gym": Gym, "robomimic": Robomimic, "furniture": Furniture}


def main(args: Pretraining):
    set_up(args)
    policy, out, measure = args.run()
    policy.save(out, **policy.info)  # first: simulators may be missing
    out.with_suffix(".unfinished").unlink(missing_ok=True)
    scores = measure(episodes=args.final_eval_episodes, seed=derive_seed(args.seed, "evaluation"))
    policy.save(out, **policy.info | scores)
    print(f"{out}: {scores}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in FAMILIES:
        raise SystemExit(__doc__)
    go_on = "the same command (another one needs its .unfinished file deleted)"
    launch(main, FAMILIES[sys.argv.pop(1)], {"paper": dict(precision="float32")}, __doc__, go_on=go_on)
