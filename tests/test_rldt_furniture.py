"""rldt_furniture.py: what only it has, and a whole run in MuJoCo."""

import json
import math

import imageio.v2 as imageio
import numpy as np
import pytest
from conftest import metrics
from fakes import PRETRAINING, arguments, same
from short_runs import checkpoint, flags, kept_rollout, main, only_run
from test_furniture_base import write_demos

import rldt_furniture
from common.flow import FlowPolicy


def test_summary_has_the_success_rate_with_wilsons_interval_and_the_pairs():
    stages = np.array([2] * 7 + [1] * 5 + [0] * 8)
    result = rldt_furniture.summary(stages, "_sampled", arguments(rldt_furniture))
    assert result == pytest.approx({
        "eval_success_sampled": 0.35, "eval_success_sampled_low": 0.181192,
        "eval_success_sampled_high": 0.567146, "eval_stages_sampled": 0.95,
        "eval_stages_sampled_std": math.sqrt((7 * 4 + 5) / 20 - 0.95**2),
    }, abs=1e-5)  # fmt: skip
    assert {type(number) for number in result.values()} == {float}  # checkpoints hold plain numbers


# ------------------------------------------------------------------------- a whole run on MuJoCo
def test_run_on_mujoco_pretrains_and_keeps_its_policy_results_and_episodes(monkeypatch, tmp_path):
    settings = PRETRAINING[rldt_furniture] | dict(layer_norm=True, cond_mlp=[7])
    monkeypatch.setitem(rldt_furniture.PRETRAINING, "laptop", settings)
    changes = dict(dataset=write_demos(tmp_path / "demos.hdf5"), iterations=3, horizon=10)
    main(rldt_furniture, flags("one_leg", None, tmp_path / "runs", **changes))
    run = only_run(tmp_path / "runs")
    assert run.name.startswith("one_leg-low__rldt__3__")
    assert not [*run.glob("*.partial"), *run.glob("pretraining*")]
    args = json.loads((run / "args.json").read_text())
    assert (args["seed"], args["horizon"], args["backend"]) == (3, 10, "mujoco")
    assert same(FlowPolicy.load(run / "policy.safetensors"), checkpoint(run)["policy"])
    rows, slot = metrics(run), kept_rollout(run, 1)  # of the second iteration
    assert 0 < int(rows[1]["env_steps"]) <= 2 * 12  # three chunks of four steps in two environments
    assert slot["obs"].shape == (4, 2, 59)
    assert slot["valid"].tolist() == [[1, 1]] * 3
    assert ((slot["reward"] > 0) == (slot["terminated"] > 0) & (slot["reached"] > 0)).all()
    assert (slot["obs"][1:] != slot["obs"][:-1]).any(-1).all()
    assert slot["obs"].abs().max() <= 5


def test_video_shows_the_policy(bases, tmp_path, capsys, monkeypatch):
    for name in "MUJOCO_GL", "PYOPENGL_PLATFORM":  # as before, afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    film, policy = tmp_path / "episode.mp4", FlowPolicy.load(bases["one_leg"])
    rldt_furniture.record_video(policy, "one_leg", "low", 3, tmp_path)
    assert capsys.readouterr().out == ""
    assert len(imageio.mimread(film)) == 3  # as long as the run's episodes
