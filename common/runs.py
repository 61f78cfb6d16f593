"""One run of a script: its processes, directory, logs, results and interruption."""

import contextlib
import copy
import csv
import json
import math
import os
import re
import signal
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.checkpoints import identity, load_parts, provenance, save_parts, write_atomically, write_json
from common.settings import script_of


# --------------------------------------------------------------------------------- processes
def derive_seed(seed: int, *purpose) -> int:
    """A seed below 2^30 for a purpose, words and numbers; those of others are unrelated to it."""
    entropy = [seed, *repr(purpose).encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 2)


def autocast(args):
    """bfloat16 matrix products, where asked for; weights and what is not a product stay float32."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, args.precision == "bfloat16")


def average(x: torch.Tensor) -> torch.Tensor:
    """Averages a tensor in place over the processes of torchrun."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def average_gradients(parameters):
    """Averages gradients over the processes of torchrun."""
    for p in parameters:
        average(p.grad)


def evaluate_stored(args, policy_class, measure) -> dict:
    """The final evaluation of the run --evaluate, once more: measure(policy, episodes=, seed=)."""
    policy = policy_class.load(args.evaluate / "policy.safetensors").to(args.device)
    row = measure(policy, episodes=args.final_eval_episodes, seed=derive_seed(args.seed, "evaluation"))
    print(row)
    return row


# --------------------------------------------------------------------------------------- run
class Run:
    """A run directory and what is written to it; columns that begin with `eval_` are shown and drawn."""

    def __init__(self, args, name: str):
        self.args, self.metrics, self.interrupted = args, defaultdict(list), False
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        paths = [args.resume]
        if self.rank == 0 and not args.resume:
            prefix = re.sub(r"[^-+#.\w]", "_", name) + time.strftime("__%Y%m%d-%H%M%S__")
            try:
                args.runs.mkdir(parents=True, exist_ok=True)
                paths = [Path(tempfile.mkdtemp(prefix=prefix, dir=args.runs))]  # nobody else's
            except OSError as error:
                raise SystemExit(f"--runs {args.runs}: cannot be written ({error})") from error
            write_json(paths[0] / "args.json", vars(args) | dict(script=script_of(type(args))))
        if self.world > 1:
            dist.broadcast_object_list(paths)
        self.path = paths[0]
        if self.rank == 0:
            print(f"{script_of(type(args))}: {name.replace('__', ' ')}, in {self.path}", flush=True)

    def interrupt(self, *_):
        """Ctrl-C: the iteration is finished and saved. A second one, or in `finish`, stops at once."""
        if self.interrupted or self.progress["over"]:
            raise KeyboardInterrupt
        self.interrupted = True

    def keep_base(self, make, policy_class):
        """The base policy, of which the run has a copy; the first process makes it, make(checkpoint)."""
        kept, checkpoint = self.path / "base.safetensors", self.path / "pretraining.pt"
        if self.rank == 0 and not kept.exists():
            made = make(checkpoint)
            made.save(kept, **made.info)
            checkpoint.unlink(missing_ok=True)
        self.barrier()
        base = policy_class.load(kept).to(self.args.device)
        torch.manual_seed(self.args.seed)  # networks to come are the same, wherever the base is from
        return base

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def checkpoints(self, state: dict, policy, **parts):
        """What `save` writes; --resume reads it back here, in place. Random numbers start here."""
        torch.manual_seed(derive_seed(self.args.seed, "training", self.rank))
        self.policy, self.best_policy = policy, copy.deepcopy(policy)
        self.progress = dict(iteration=0, wall_s=0.0, best=-math.inf, over=False, rows=[])
        self.parts = dict(progress=self.progress, state=state, policy=policy)
        self.parts |= dict(best_policy=self.best_policy) | parts
        self.identity = identity(self.args)
        saved = [self.saved_iterations(rank) for rank in range(self.world)]
        in_all = set.intersection(*saved)
        if in_all:
            load_parts(self.checkpoint(max(in_all)), self.identity, self.parts, self.args.device)
        elif any(saved):
            raise SystemExit(f"{self.path}: no iteration was saved by all {self.world} processes")
        with contextlib.suppress(ValueError):  # outside the main thread, which alone is interrupted
            signal.signal(signal.SIGINT, self.interrupt)
        if self.rank == 0:
            if self.args.track:
                import wandb
                wandb.init(project="rldt", config=vars(self.args), dir=self.path, sync_tensorboard=True)
            self.writer = SummaryWriter(str(self.path), purge_step=state["env_steps"] + 1)
            self.bar = tqdm(total=100, bar_format="{percentage:3.0f}% |{bar}| {elapsed}<{remaining}")

    def checkpoint(self, iteration: int) -> Path:
        return self.path / f"checkpoint{self.rank}.{iteration}.pt"

    def saved_iterations(self, rank: int) -> set[int]:
        names = (re.fullmatch(rf"checkpoint{rank}\.(\d+)\.pt", p.name) for p in self.path.iterdir())
        return {int(name[1]) for name in names if name}

    def iterations(self):
        """Yields (iteration, spent); spent, the budget's share that is used, is 1 once, at the end."""
        done = self.progress
        while not done["over"]:
            by_count = done["iteration"] / (self.args.iterations or math.inf)
            by_time = done["wall_s"] / (self.args.wall_budget_s or math.inf)
            self.spent, self.start = min(1.0, max(by_count, by_time)), time.perf_counter()
            yield done["iteration"], self.spent

    @contextlib.contextmanager
    def timer(self, row: dict, column: str):
        """Adds the seconds that its block takes to a column of the row."""
        start = time.perf_counter()
        yield
        row[column] = row.get(column, 0.0) + time.perf_counter() - start

    def add(self, metrics: dict[str, torch.Tensor]):
        """Keeps tensors of one number each; `log` averages them over the iteration."""
        for key, value in metrics.items():
            self.metrics[key].append(value)

    def log(self, row: dict, env_steps: int):
        """Ends an iteration with a row of metrics.csv. Raises SystemExit on NaN and infinity."""
        done = self.progress
        means = {key: torch.stack(values).mean().item() for key, values in self.metrics.items()}
        self.barrier()  # while the first process evaluates, time passes for all
        elapsed = torch.tensor(time.perf_counter() - self.start, device=self.args.device)
        done["wall_s"] += average(elapsed).item()
        row = {key: float(value) for key, value in row.items()}  # a checkpoint holds no numpy scalars
        row = dict(iteration=done["iteration"], env_steps=env_steps, wall_s=done["wall_s"]) | row | means
        for key, value in row.items():
            if not math.isfinite(value):
                raise SystemExit(f"{key} became {value}; the checkpoint in {self.path} is from before.")
        self.metrics.clear()
        done["rows"].append(row)
        done["iteration"] += 1
        done["over"] = self.spent == 1
        if self.rank == 0:
            write_atomically(self.path / "metrics.csv", self.write_rows)
            for key, value in row.items():
                self.writer.add_scalar(key if "/" in key else f"charts/{key}", value, env_steps)
            shown = [f"{key} {value:.4g}" for key, value in row.items() if key.startswith("eval_")]
            if shown:
                tqdm.write(f"{env_steps} steps, {done['wall_s']:.0f} s: {', '.join(shown)}")
            self.bar.update(100 * self.spent - self.bar.n)

    def write_rows(self, path: Path):
        with path.open("w", newline="") as file:
            columns = dict.fromkeys(key for row in self.progress["rows"] for key in row)
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.progress["rows"])

    def save(self):
        """Writes a checkpoint, then removes the one before; after Ctrl-C this ends the run."""
        iteration = self.progress["iteration"]
        save_parts(self.checkpoint(iteration), self.identity, self.parts)
        self.barrier()  # until all have theirs, all keep the one before
        for old in self.saved_iterations(self.rank) - {iteration}:
            self.checkpoint(old).unlink()
        if self.interrupted:
            raise SystemExit(f"Stopped and saved. Continue with --resume {self.path}")

    def evaluate(self, score: str, measure) -> dict:
        """Scores by measure(policy, episodes=, seed=), in the first process; the best policy is kept."""
        if self.rank > 0:
            return {}
        args, last = self.args, self.progress["iteration"] == 0 or self.spent == 1
        episodes = args.final_eval_episodes if last else args.eval_episodes
        row = measure(self.policy, episodes=episodes, seed=derive_seed(args.seed, "evaluation"))
        if row[score] > self.progress["best"]:
            self.progress["best"] = float(row[score])
            self.best_policy.load_state_dict(self.policy.state_dict())
        return row

    def finish(self, score: str, measure, **results) -> dict | None:
        """Writes policy, curve.png and result.json, whose contents it returns, in the first process.

        Where an earlier policy had a higher `score`, a column, it is measured again, and kept if better.
        """
        if self.rank > 0:
            return None
        import matplotlib.pyplot as plt
        rows = self.progress["rows"]
        best = final = {key: value for key, value in rows[-1].items() if key.startswith("eval_")}
        info = {k: v for k, v in self.policy.info.items() if isinstance(v, str | bool)}  # not scores
        info["script"] = script_of(type(self.args))
        self.policy.save(self.path / "policy.safetensors", **info, **final)
        if self.progress["best"] > final[score]:
            episodes, seed = self.args.final_eval_episodes, derive_seed(self.args.seed, "best")
            again = measure(self.best_policy, episodes=episodes, seed=seed)
            if again[score] > final[score]:
                best = again
                self.best_policy.save(self.path / "best_policy.safetensors", **info, **best)
        for name, scores in ("base", rows[0]), ("final", final), ("best", best):
            results |= {key.replace("eval", name): float(scores[key]) for key in final}
        results |= provenance() | dict(wall_s=self.progress["wall_s"])
        results["args"] = json.loads((self.path / "args.json").read_text())
        write_json(self.path / "result.json", results)
        plt.figure()
        for key in [key for key in final if not key.endswith(("_std", "_low", "_high"))]:
            points = [(row["env_steps"], row[key]) for row in rows if key in row]
            plt.plot(*zip(*points, strict=True), "o-", label=key)
        plt.xlabel("environment steps")
        plt.legend()
        plt.savefig(self.path / "curve.png")
        plt.close()
        self.writer.close()
        self.bar.close()
        tqdm.write(f"Results in {self.path}")
        return results
