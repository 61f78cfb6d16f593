"""The furniture tasks at reset and when their scripted assembler has succeeded, in MuJoCo.

    MUJOCO_GL=egl python -m benchmark.furniture_frames  # writes docs/images/furniture.png
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmark.tools import IMAGES, pyplot, save_figure
from demos.furniture_skills import Arm
from demos.make_furniture_demos import ASSEMBLERS
from envs.furniture_mujoco import FurnitureEnv


@dataclass
class Args:
    seed: int = 1
    """Seed of the first episode tried; the next ones follow until one succeeds."""
    images: Path = IMAGES
    """Directory for the figure."""


def frames(furniture: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The front camera at the start and at the end of an episode in which the assembler succeeds."""
    env = FurnitureEnv(furniture, "low", "rgb_array", image_size=(640, 480))
    while True:
        env.reset(seed=seed)
        first = env.render()
        for action in ASSEMBLERS[furniture](Arm(env, np.random.default_rng(seed))).steps():
            *_, truncated, info = env.step(action)
            if info["success"]:
                return first, env.render()
            if truncated:
                break
        seed += 1


def main(args: Args):
    plt = pyplot()
    figure, axes = plt.subplots(len(ASSEMBLERS), 2, figsize=(8, 3.1 * len(ASSEMBLERS)), squeeze=False)
    for furniture, row in zip(ASSEMBLERS, axes, strict=True):
        for axis, frame, when in zip(row, frames(furniture, args.seed), ("reset", "assembled"), strict=True):
            axis.imshow(frame)
            axis.set(xticks=[], yticks=[], title=f"{furniture}, {when} (MuJoCo)")
    save_figure(figure, args.images / "furniture.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
