import itertools

import numpy as np
import pytest
import torch

import rldt_furniture
from benchmark.decision_probe_furniture import Args, auc, predict, read_rows, relative
from envs.furniture_mujoco import FurnitureEnv


def test_auc_is_the_share_of_pairs_in_order():
    generator = torch.Generator().manual_seed(0)
    score, success = torch.randn(40, generator=generator), (torch.rand(40, generator=generator) < 0.3).float()
    pairs = [(a > b).item() for a, b in itertools.product(score[success > 0], score[success == 0])]
    assert auc(success, score) == pytest.approx(np.mean(pairs))
    assert auc(success, torch.zeros(40)) == pytest.approx(0.5)


def test_relative_positions_are_those_of_the_simulation():
    env = FurnitureEnv("lamp", "low")
    obs, _ = env.reset(seed=3)
    policy = rldt_furniture.make_policy(rldt_furniture.Args(furniture="lamp"), 44, 10)
    policy.obs_min.copy_(torch.linspace(-1, -0.2, 44))
    policy.obs_max.copy_(torch.linspace(0.3, 2, 44))
    effector, parts = env.ee_pose()[0], [env.part_pose(k)[0] for k in range(3)]
    offsets = np.concatenate([*(part - effector for part in parts), *(part - parts[0] for part in parts[1:])])
    expected = np.concatenate([(offsets / scale).clip(-5, 5) for scale in (0.01, 0.05)])
    assert np.abs(offsets[-6:]).max() > 0.01 and 0 < (np.abs(expected) == 5).sum() < 30
    np.testing.assert_allclose(relative(policy, policy.normalize(obs)[None])[0], expected, atol=1e-3)
    env.close()


def test_rows_are_of_first_episodes_up_to_their_first_pair(tmp_path):
    """Columns: a success after two chunks and a second episode, a failure, and a first pair followed by a second one."""
    T, N = 6, 3
    slot = {name: torch.zeros(T, N) for name in ("stage", "reward", "terminated", "truncated", "valid", "reached")}
    slot |= dict(state=torch.arange(T * N, dtype=torch.float32).view(T, N, 1), action=torch.zeros(T, N, 2))
    slot["valid"][[0, 1, 3, 4], 0], slot["terminated"][[1, 4], 0] = 1, 1
    slot["reached"][:3, 0] = 2
    slot["valid"][:5, 1], slot["terminated"][4, 1] = 1, 1
    slot["valid"][:5, 2], slot["stage"][2:, 2], slot["truncated"][4, 2] = 1, 1, 1
    slot["reached"][:, 2] = 1
    for k in range(2):
        torch.save(slot, tmp_path / f"replay{k}.pt")
    rows = read_rows(tmp_path, 2)
    found = sorted(zip(*(rows[name].flatten().tolist() for name in ("rollout", "chunk", "state", "next", "success")), strict=True))
    one = [(0, 0.0, 3.0, 1), (0, 1.0, 4.0, 0), (0, 2.0, 5.0, 1), (1, 3.0, 6.0, 1), (1, 4.0, 7.0, 0), (1, 5.0, 8.0, 1), (2, 7.0, 10.0, 0), (3, 10.0, 13.0, 0), (4, 13.0, 16.0, 0)]
    assert found == [(k, *row) for k in range(2) for row in one]


def test_prediction_finds_what_the_state_tells_and_nothing_where_there_is_nothing():
    generator = torch.Generator().manual_seed(0)
    x, train = torch.randn(4000, 3, generator=generator), torch.arange(4000) < 3000
    told, untold = (x[:, 0] + x[:, 1] > 0).float(), (torch.rand(4000, generator=generator) > 0.5).float()
    args = Args(run=None, steps=150, networks=1)
    assert auc(told[~train], predict(x, told, train, args)) > 0.95
    assert 0.4 < auc(untold[~train], predict(x, untold, train, args)) < 0.6
    held_out = torch.where(train, told, torch.nan)
    torch.testing.assert_close(predict(x, held_out, train, args), predict(x, told, train, args))  # what is held out is not learned from
