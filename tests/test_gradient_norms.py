import dataclasses

import pytest
import torch
from conftest import parse

import rldt_gym
from baselines import qam
from baselines.families import settings_of
from benchmark import gradient_norms
from benchmark.critic_diagnostics import load_run
from benchmark.tools import read_csv


def test_gradient_norms_of_rldt_and_qam(finished_run, tiny_flags, tmp_path):
    run, _ = finished_run
    flags = [flag for flag in tiny_flags if "n-particles" not in flag]
    qam.main(parse(qam, [*flags, f"--runs={tmp_path / 'runs'}", "--inv-temp=2"]))
    (other,) = (tmp_path / "runs").iterdir()
    out = tmp_path / "norms.csv"
    gradient_norms.main(gradient_norms.Args(run=run, qam=other, batches=2, out=out))
    rows = read_csv(out)
    assert {row["loss"] for row in rows if row["run"] == other.name} == {"adjoint"}
    for loss in ("literal", "authors", "adjoint"):
        for stage in ("base policy", "end of the run"):
            steps = [row for row in rows if (row["loss"], row["stage"]) == (loss, stage)]
            shares = [float(row["share"]) for row in steps]
            assert len(shares) == 4 and sum(shares) == pytest.approx(1, abs=1e-4)  # K = 4

    loaded = load_run(run)
    args = gradient_norms.Args(run=run, batches=1)
    shorter = dataclasses.replace(loaded, unit=1e3 * loaded.unit)  # of which the field is in units
    norms = [gradient_norms.norms(loaded.base, each, "authors", args)[-1] for each in (loaded, shorter)]
    assert norms[0] > 10 * norms[1] > 0  # of the last step, where no constraint pulls: v is the base's

    loaded = load_run(other, settings_of(qam.Args, rldt_gym.CriticArgs))
    norms = [gradient_norms.qam_norms(loaded.base, loaded, inv_temp, args) for inv_temp in (2.0, 4.0)]
    torch.testing.assert_close(2 * norms[0], norms[1])  # where v = v_base: linear in inv_temp
    assert (norms[0] > 0).all() and len(set(norms[0].tolist())) == 4  # each step has its own
