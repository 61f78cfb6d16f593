"""Where is an episode of a furniture run decided, and by what? Classifiers predict whether the next pair will be assembled.

    python rldt_furniture.py --furniture lamp --num-envs 48 --rollout-chunks 40 --noise-scale 0.5 --warmup-iterations 28 --iterations 30
    python -m benchmark.decision_probe_furniture RUN_DIR   # writes benchmark/results/decision_probe_furniture.csv

On the first episodes of the run's rollouts by the frozen base policy, up to their first pair, a network sees

    state            s, as the critic does
    state, action    s and the action chunk taken in it
    next state       the state after that chunk: all that the chunk decided
    ... relative     the same, and where the parts are from the end effector and from the first part, at scales of 1 and 5 cm

and the area under the ROC curve (0.5: knows nothing, 1: everything) is measured on the last quarter of the rollouts, held out.
The difference of the first two is what a critic of this many episodes can know of single actions.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import tyro
from scipy.stats import rankdata
from torch import nn

import rldt_furniture as script
from benchmark.particle_probe_furniture import read_run
from benchmark.tools import RESULTS, markdown, provenance, write_csv
from envs.furniture_mujoco import TAG


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """Run directory with its rollouts (replay*.pt)."""
    bounds: tuple[int, ...] = (0, 5, 8, 11, 14, 17, 20, 25, 38)
    """Chunks of the episode between which the area is measured."""
    steps: int = 2500
    """Training steps of 256 rows per network."""
    networks: int = 2
    """Networks whose predictions are averaged."""
    threads: int = 1
    """CPU threads."""
    out: Path = RESULTS / "decision_probe_furniture.csv"
    """CSV to write."""


def read_rows(run: Path, rollouts: int) -> dict[str, torch.Tensor]:
    """States, chunks, next states, and what became of them, of the first episode of each environment up to its first pair."""
    rows = {name: [] for name in ("rollout", "chunk", "state", "action", "next", "success")}
    for k in range(rollouts):
        slot = torch.load(run / f"replay{k}.pt", map_location="cpu", weights_only=True)
        ends = (slot["terminated"] + slot["truncated"] > 0).float()
        first = ends.cumsum(0) - ends == 0  # no episode has ended before
        t, n = ((slot["valid"] > 0) & (slot["stage"] == 0) & first).nonzero().T
        values = dict(rollout=torch.full_like(t, k), chunk=t, state=slot["state"][t, n], action=slot["action"][t, n],
                      next=slot["state"][t + 1, n], success=(slot["reached"][t, n] >= 1).float())  # fmt: skip
        for name, value in values.items():
            rows[name].append(value)
    return {name: torch.cat(value) for name, value in rows.items()}


def relative(policy: script.FlowPolicy, obs: torch.Tensor) -> torch.Tensor:
    """Normalised obs (B, obs_dim) -> parts from the end effector and from the first part, in units of 1 cm and 5 cm, cut at +-5."""
    raw = (obs + 1) / 2 * (policy.obs_max - policy.obs_min + 1e-6) + policy.obs_min
    rotation, origin = (torch.as_tensor(x, dtype=raw.dtype) for x in TAG)
    parts = raw[:, 16:-7].unflatten(1, (-1, 7))[..., :3] @ rotation.T + origin  # (B, parts, 3), m; the last pose is the obstacle's
    offsets = torch.cat([parts - raw[:, None, :3], parts[:, 1:] - parts[:, :1]], 1).flatten(1)
    return torch.cat([(offsets / scale).clamp(-5, 5) for scale in (0.01, 0.05)], 1)


def auc(success: torch.Tensor, score: torch.Tensor) -> float:
    """Area under the ROC curve: the share of pairs of a success and a failure in which the success scores higher."""
    positive, rank = success.numpy() > 0, rankdata(score.numpy())
    n = positive.sum()
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def predict(x: torch.Tensor, success: torch.Tensor, train: torch.Tensor, args: Args) -> torch.Tensor:
    """Probabilities of success for the rows that are not in `train`, by networks that learned from those that are."""
    index, total = train.nonzero()[:, 0], 0.0
    for seed in range(args.networks):
        torch.manual_seed(seed)
        layers = [layer for a, b in pairwise((x.shape[1], 256, 256)) for layer in (nn.Linear(a, b), nn.LayerNorm(b), nn.Mish())]
        network = nn.Sequential(*layers, nn.Linear(256, 1))
        optimizer = torch.optim.AdamW(network.parameters(), 5e-4, weight_decay=0.1)
        for _ in range(args.steps):
            i = index[torch.randint(len(index), (256,))]
            loss = nn.functional.binary_cross_entropy_with_logits(network(x[i])[:, 0], success[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            total = total + network(x[~train])[:, 0].sigmoid() / args.networks
    return total


def main(args: Args):
    torch.set_num_threads(args.threads)
    config, saved = read_run(args.run, args.threads)
    if saved["added"] > config.buffer_iterations:
        raise SystemExit(f"{args.run}: its first rollouts were overwritten by later ones; raise --buffer-iterations or take a shorter run.")
    rollouts = min(config.warmup_iterations, saved["added"])
    if rollouts < 4:
        raise SystemExit(f"{args.run}: has {rollouts} rollouts of the frozen base policy, 4 are needed; raise --warmup-iterations.")
    policy = script.load_policy(args.run / "base_policy.pt", "cpu")
    data = read_rows(args.run, rollouts)
    s, a, s_next, time = data["state"], data["action"], data["next"], data["chunk"][:, None] / config.rollout_chunks
    near, near_next = relative(policy, s), relative(policy, s_next)
    inputs = {"state": [s], "state, action": [s, a], "next state": [s_next]}
    inputs |= {"state, relative": [s, near], "state, action, relative": [s, a, near], "next state, relative": [s_next, near_next]}
    train, rows = data["rollout"] < round(0.75 * rollouts), []
    held_out = {name: data[name][~train] for name in ("chunk", "success")}
    for name, x in inputs.items():
        score = predict(torch.cat([*x, time], 1), data["success"], train, args)
        for low, high in pairwise(args.bounds):
            chosen = (held_out["chunk"] >= low) & (held_out["chunk"] < high)
            success = held_out["success"][chosen]
            if 0 < success.mean() < 1:
                rows.append(dict(sees=name, first_chunk=low, last_chunk=high - 1, rows=len(success), success=success.mean().item(), auc=auc(success, score[chosen])))
        print(f"{name:26s}", *(f"{row['auc']:.3f}" for row in rows if row["sees"] == name), flush=True)
    episodes = int((data["chunk"] == 0).sum())
    write_csv(args.out, [dict(task=f"{config.furniture}-{config.randomness}", episodes=episodes, noise_scale=config.noise_scale) | row | provenance() for row in rows])
    print(markdown([{"sees": name} | {f"chunks {row['first_chunk']} to {row['last_chunk']}": f"{row['auc']:.2f}" for row in rows if row["sees"] == name} for name in inputs]))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
