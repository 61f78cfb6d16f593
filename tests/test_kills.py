"""A small part of tests/kills.py: a run on Gym, and one of two processes, are killed and resumed."""

import random

import kills
import pytest

from demos import dataset


@pytest.mark.parametrize("kind", ["gym", "torchrun"])
def test_a_run_that_was_killed_somewhere_ends_as_one_that_was_not(tmp_path, kind):
    data = tmp_path / "demonstrations.hdf5"
    dataset.make(dataset.Args(steps=1000, num_envs=4, out=data))
    phases = kills.kill_and_resume(kind, 1, tmp_path, data, random.Random(1))
    assert phases.total() == 1
