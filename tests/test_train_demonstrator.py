"""demos/train_demonstrator.py: Stable-Baselines3's policy in the format that dataset.py reads."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from demos import dataset, train_demonstrator
from demos.train_demonstrator import Args, Demonstrator, export, main, train


@pytest.fixture
def args(tmp_path, monkeypatch):
    """A training that ends at its first evaluation, after two rollouts."""
    pytest.importorskip("stable_baselines3")
    monkeypatch.setattr(train_demonstrator, "EPISODES", 2)
    monkeypatch.setattr(train_demonstrator, "EVAL_EVERY", 2)
    out = tmp_path / "Hopper-v4" / "demonstrator.safetensors"
    return Args(target_return=1.0, max_steps=256, num_envs=2, out=out)


def test_demonstrator_acts_as_the_policy_that_ppo_trained(args, tmp_path):
    model, *_ = train(args, args.target_return)
    assert model.num_timesteps == 256
    save_file(export(model), tmp_path / "a.safetensors")
    policy = Demonstrator(tmp_path / "a.safetensors")
    obs = np.random.default_rng(0).normal(0, 3, (50, 11))
    normalized = torch.as_tensor(model.get_vec_normalize_env().normalize_obs(obs))
    expected = model.policy.get_distribution(normalized).distribution
    torch.testing.assert_close(policy.act(obs, 0.0), expected.mean)
    noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    action = policy.act(obs, 1.0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(action, expected.mean + expected.stddev * noise)


def test_recording_reads_what_training_writes(args, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="short of 100000; nothing was written"):
        main(dataclasses.replace(args, target_return=1e5))
    assert not args.out.exists()
    main(args)
    assert '"env_steps": 256' in capsys.readouterr().out
    monkeypatch.setattr(dataset, "DEMOS", tmp_path)
    assert len(dataset.load(dataset.make(dataset.Args(steps=20, num_envs=2))).actions) == 20


@pytest.mark.parametrize("changes, words", [
    (dict(env_id="Ant-v4"), "pass --target-return"), (dict(target_return=np.nan), "--target-return nan"),
    (dict(env_id="BipedalWalker-v3", target_return=1.0), "Cannot make the env"),  # EnvPool has it
    (dict(num_envs=0), "--num-envs 0: must lie"), (dict(out=Path("/proc/x/y")), "cannot be written"),
    (dict(out=Path("/tmp")), "is a folder"), (dict(), r"pip install -r baselines/requirements.txt"),
])  # fmt: skip
def test_what_keeps_it_from_training_is_said_first(monkeypatch, changes, words):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(SystemExit, match=words):
        main(Args(**changes))
