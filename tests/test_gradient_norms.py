import torch

from baselines import qam_gym
from benchmark import gradient_norms
from benchmark.tools import load_run, read_csv


def test_gradient_norms_of_rldt_and_qam(finished_run, tiny_flags, tmp_path):
    run, _ = finished_run
    qam_gym.main(qam_gym.parse_args([flag for flag in tiny_flags if "n-particles" not in flag] + [f"--runs={tmp_path}", "--inv-temp=2"]))
    (qam,) = tmp_path.iterdir()
    out = tmp_path / "norms.csv"
    gradient_norms.main(gradient_norms.Args(run=run, qam=qam, batches=2, out=out, figure=tmp_path / "norms.png"))
    rows = read_csv(out)
    assert {row["loss"] for row in rows if row["run"] == qam.name} == {"adjoint"}
    for loss in ("literal", "authors", "adjoint"):
        for stage in ("base policy", "end of the run"):
            shares = [float(row["share"]) for row in rows if (row["loss"], row["stage"], row["term"]) == (loss, stage, "total")]
            assert len(shares) == 4 and abs(sum(shares) - 1) < 1e-4  # K = 4

    loaded, args = load_run(qam, critic_key="target"), gradient_norms.Args(run=run, batches=1)
    at_base = [gradient_norms.qam_norms(loaded.base, loaded, inv_temp, args)[0] for inv_temp in (2.0, 4.0)]
    torch.testing.assert_close(2 * at_base[0], at_base[1])  # where v = v_base the gradient is that of sigma g alone, linear in the inverse temperature
    assert (at_base[0] > 0).all() and len(set(at_base[0].tolist())) == 4  # each step has its own
