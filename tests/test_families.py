"""baselines/families.py: every baseline on tasks with a sparse reward, in fake environments."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_same, metrics, parse
from fakes import recorded, small_policy, words
from short_runs import TASKS, only_run, use_fakes
from test_baselines import RUNS

import rldt_furniture
import rldt_gym
import rldt_robomimic
from baselines import best_of_n, dppo, dsrl, families, offpolicy, ppo, qam, sac
from common.runs import Run

PLACES = {"state": "lift-state", "lamp": "lamp-low"}
SCORE = {"hopper": "return", "state": "success", "lamp": "stages"}
COMMON = dict(
    threads=1, seed=3, precision="float32", device=DEVICE, iterations=4, num_envs=2, eval_every=10,
    eval_episodes=2, final_eval_episodes=3, warmup_iterations=1,
)  # fmt: skip
CRITIC = COMMON | dict(buffer_iterations=2, rounds=2, critic_steps=2, critic_batch=8, segments=6)
PPO = COMMON | dict(batch=8, epochs=2)
OWN = {
    "qam": CRITIC | dict(actor_steps=1, actor_batch=4), "best_of_n": CRITIC | dict(clone_steps=1),
    "dsrl": CRITIC | dict(noise_steps=2, actor_steps=2, actor_batch=4),
    "dppo": PPO, "reinflow": PPO, "fpo": PPO | dict(samples=2),
    "sac": COMMON | dict(buffer_iterations=2, gradient_steps=2, batch=4),
}  # fmt: skip
FORMS = [(name, {}) for name in OWN] + [("dsrl", dict(form="sac"))]


def command(name, place, base, runs, **changes):
    own = TASKS[place][3] | dict(base=base, runs=runs) | changes
    own = {key: value for key, value in (OWN[name] | own).items() if key not in ("task", "furniture")}
    task = PLACES.get(place, "Hopper-v4")
    return [f"--task={task}", *words({key: own[key] for key in own if key != "env_id"})]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(name, place, folder, **changes) -> settings of a short run on fake environments."""

    def settings(name, place, folder="runs", **changes):
        script, obs_dim, action_dim, _ = TASKS[place]
        use_fakes(monkeypatch, script)
        base = tmp_path / f"{name}.safetensors"
        torch.manual_seed(0)
        policy = small_policy(script, obs_dim, action_dim)
        if name == "sac":
            pytest.importorskip("stable_baselines3")
            policy = RUNS[name].GaussianPolicy(obs_dim, action_dim)
        policy.save(base)
        return parse(RUNS[name], command(name, place, base, tmp_path / folder, **changes))

    return settings


@pytest.mark.parametrize("place", SCORE)
@pytest.mark.parametrize("name, changes", FORMS)
def test_every_method_runs_and_goes_on_where_it_was_stopped(
    start, monkeypatch, tmp_path, name, changes, place
):
    save, copy = Run.save, tmp_path / "copy"

    def saved(run):
        save(run)
        if run.progress["iteration"] == 2:
            shutil.copytree(run.path, copy)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", saved)
        result = RUNS[name].main(start(name, place, **changes))
    assert result["task"] == PLACES.get(place, "Hopper-v4")
    score, whole = SCORE[place], only_run(tmp_path / "runs")
    trained = [row for row in metrics(whole) if row[f"eval_{score}"] == ""]
    assert len(trained) == 3 and all(row[f"train_{score}"] for row in trained[1:])

    RUNS[name].main(parse(RUNS[name], ["--resume", copy]))
    assert_same(copy, whole)


# An episode of three chunks that succeeds in its last, and a chunk that Isaac Gym goes on for.
REWARD, ENDS, VALID = [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]


def played(family):
    """A replay that holds these four chunks."""
    policy = small_policy(family.script, 4, 2)
    replay = family.make_replay(policy)
    rollout = replay.next()
    rollout["action"].normal_()
    for name, values in ("reward", REWARD), ("terminated", ENDS), ("valid", VALID):
        rollout[name][:, 0] = torch.tensor(values)
    rollout[family.seen][:, 0, :4] = torch.arange(20).view(5, 4) / 20
    return policy, replay


@pytest.mark.parametrize("place", PLACES)
def test_advantages_of_a_sparse_rollout_are_those_made_by_hand(start, place):
    changes = dict(num_envs=1, gamma=0.5, gae_lambda=0.5) | ({"horizon": 8} if place == "lamp" else {})
    args = start("dppo", place, **changes | ({} if place == "lamp" else dict(rollout_chunks=4)))
    family = families.family_of(args)
    _, replay = played(family)
    rollout = family.transitions(replay.newest())
    assert rollout["obs"].shape[-1] == 4 + family.extra
    assert torch.equal(rollout["next_obs"][:-1], rollout["obs"][1:])
    rollout |= dict(seen=rollout["obs"], next_seen=rollout["next_obs"])
    nothing, unscaled = lambda seen: torch.zeros(seen.shape[:-1]), lambda reward, done: reward
    found = ppo.advantages(nothing, unscaled, rollout, args)
    assert found["advantage"].tolist() == [1 / 16, 1 / 4, 1]
    half = lambda seen: torch.full(seen.shape[:-1], 0.5)
    found = ppo.advantages(half, unscaled, rollout, args)
    # deltas 0.5 V - V = -0.25, the same, and 1 - V = 0.5; the last chunk is left out
    assert found["advantage"].tolist() == [-0.25 - 0.0625 + 0.03125, -0.25 + 0.125, 0.5]
    assert torch.equal(found["target"], found["advantage"] + 0.5)
    assert torch.equal(found["seen"], rollout["seen"][:3, 0])


@pytest.mark.parametrize("method, rates", [("dppo", [3.75e-4, 6.25e-4]), ("qam", [7.5e-4, 6.25e-4])])
def test_step_sizes_rise_from_the_actors_first_iteration_and_fall_to_the_end(
    start, monkeypatch, method, rates
):
    monkeypatch.setattr(qam, "ACTOR_WARMUP", 1)
    of = lambda *args: args[3 if method == "qam" else 1].param_groups[0]["lr"]
    module, rise = RUNS[method], dict(lr_warmup=2) if method == "dppo" else {}
    seen = recorded(monkeypatch, module, "update_actor", of)
    module.main(start(method, "lamp", iterations=4, actor_lr=1e-3, actor_lr_end=0.5, **rise))
    assert [*dict.fromkeys(seen)] == pytest.approx(rates)  # of the iterations after the warm-up


def test_processes_of_torchrun_play_episodes_of_their_own(start):
    args = start("dppo", "lamp")
    family = families.family_of(args)
    policy = small_policy(rldt_furniture, 44, 10)
    for rank in 0, 1:
        rollout, run = family.make_replay(policy).next(), SimpleNamespace(rank=rank, world=2)
        family.rollout(policy, rollout, run, 1, {})
    first, second = family.envs.begun
    assert first and not {*first} & {*second}


def test_sac_plays_whole_episodes_of_single_actions(monkeypatch):
    monkeypatch.setattr(sac, "Run", lambda *_: 1 / 0)
    args = parse(sac, ["--task=lift-state"])
    with pytest.raises(ZeroDivisionError):
        sac.main(args)
    assert (args.horizon, args.rollout_chunks) == (300, 300)


@pytest.mark.parametrize("place", ["hopper", "lamp"])
def test_returns_are_carried_on_only_where_episodes_are(start, monkeypatch, place):
    carried, advantages = [], ppo.advantages

    def recorded(value, reward_scale, *rest):
        carried.append(reward_scale.carry.abs().max().item())
        return advantages(value, reward_scale, *rest)

    monkeypatch.setattr(ppo, "advantages", recorded)
    dppo.main(start("dppo", place))
    assert len(carried) == 3 and carried[0] == 0
    assert all((carry > 0) == (place == "hopper") for carry in carried[1:])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name, form, value", [
    ("qam", {}, 0.4 - 0.5 * 0.2), ("best_of_n", {}, 0.2), ("dsrl", {}, 0.2),
    ("dsrl", dict(form="sac"), 0.2),
])  # fmt: skip
def test_targets_of_sparse_chunks_are_those_made_by_hand(start, monkeypatch, place, name, form, value):
    short = dict(horizon=8) if place == "lamp" else dict(rollout_chunks=4)
    args = start(name, place, num_envs=1, gamma=0.5, td_lambda=0.5, segments=3, **short | form)
    monkeypatch.setattr(TASKS[place][0], "SEGMENT", 4)
    family = families.family_of(args)
    base, replay = played(family)
    method_class = dict(qam=qam.QAM, best_of_n=best_of_n.Choice, dsrl=dsrl.DSRL)[name]
    method = method_class(base.requires_grad_(False), family, args)
    if form:
        method.policy.log_alpha.data.fill_(-torch.inf)  # no bonus for its entropy

    class Constant(torch.nn.Module):
        def encode(self, obs):
            return family.script.Critic.encode(SimpleNamespace(encoder=None), obs)

        def forward(self, seen, action):
            assert seen.shape[-1] == 4 + family.extra
            return torch.tensor([[0.6], [0.2]]).expand(2, len(seen))

    seen, action, y = family.draw(replay, *method.value_of(Constant()), {}, warm=False)
    assert seen.shape == (9, 4 + family.extra) and action.shape == (9, 4)
    end = 1.0
    second = 0.5 * (0.5 * value + 0.5 * end)
    first = 0.5 * (0.5 * value + 0.5 * second)
    expected = torch.tensor([first, second, end]).repeat_interleave(3)
    torch.testing.assert_close(y, expected)
    metrics = list(method.update(seen, action, method.critic, False, 0.0))
    assert all(torch.isfinite(x).all() for row in metrics for x in row.values())


def test_dsrl_as_sac_keeps_the_noise_that_acted_and_is_paid_for_its_entropy(start):
    args = start("dsrl", "lamp", num_envs=2, form="sac")
    family = families.family_of(args)
    method = dsrl.DSRL(small_policy(rldt_furniture, 44, 10), family, args)
    replay = family.make_replay(method.policy)
    for warm in True, False:
        method.begin(warm)
        rollout = replay.next()
        family.rollout(method.actor(), rollout, SimpleNamespace(rank=0, world=1), 1, {})
        method.collected(rollout)
        w = torch.stack(method.recorder.kept)
        assert torch.equal(rollout["action"], w) and (w.abs().max() > args.bound) == warm
        flowed = method.policy.flow(rollout["obs"][:-1, :, :44], w)
        executed = torch.tensor(np.stack(family.envs.executed[-len(w) :])).flatten(2)
        chunks = method.policy.to_env(flowed.flatten(0, 1))
        torch.testing.assert_close(executed, torch.tensor(chunks).view_as(w))
    assert method.value_of(None)[0].bonus == 0  # targets end at 2, however large the bonus
    soft = dsrl.Soft(method.policy, lambda seen, w: torch.ones(2, len(seen)), bonus=0.1)
    obs = torch.randn(5, 44)
    torch.manual_seed(0)
    w = soft.sample(obs)
    torch.manual_seed(0)
    noise, log_prob = method.policy.noise(obs, torch.randn(5, 20))
    assert torch.equal(w, noise)
    expected = 1 - 0.1 * log_prob
    torch.testing.assert_close(soft(obs, w)[1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit, match="demonstrations"):
        dsrl.main(start("dsrl", "lamp", form="sac", demos=True))


def test_best_of_n_goes_on_cloning_what_it_is_told_to(start):
    args = start("best_of_n", "lamp", clone_steps=40, clone_batch=64, clone_lr=1e-2)
    method = best_of_n.Choice(small_policy(rldt_furniture, 44, 10), families.family_of(args), args)
    seen, action = torch.randn(64, 45), torch.full((64, 20), 0.7)
    losses = [row["losses/cloning"].item() for row in method.update(seen, action, None, False, 0.0)]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("task, script, names", [
    ("Walker2d-v4", rldt_gym, dict(env_id="Walker2d-v4")),
    ("transport-state", rldt_robomimic, dict(task="transport", obs="state")),
    ("one-leg-low", rldt_furniture, dict(furniture="one_leg", randomness="low")),
    ("one_leg-med", rldt_furniture, dict(furniture="one_leg", randomness="med")),
])  # fmt: skip
def test_task_stands_for_the_flags_of_the_script(task, script, names):
    args = parse(qam, ["--task", task, "--critic-batch", "7"])
    assert isinstance(args, script.CriticArgs) and args.critic_batch == 7
    assert {name: getattr(args, name) for name in names} == names
    theirs, ours = vars(script.CriticArgs()), vars(parse(qam, [f"--task={task}"]))
    preset = script.PRESETS.get(names.get("task"), {})
    theirs |= {key: value for key, value in preset.items() if key in theirs and key != "demos"} | names
    assert {key: ours[key] for key in theirs if key != "exp_name"} == {
        key: value for key, value in theirs.items() if key != "exp_name"
    }
    assert isinstance(parse(dppo, ["--task", task]), script.TaskArgs)


def test_what_cannot_be_is_refused_and_help_shows_the_settings_of_the_task(capsys, monkeypatch):
    monkeypatch.setattr(families.Furniture, "demonstrations", None)  # so that no clone is made
    with pytest.raises(SystemExit, match="act on states"):
        offpolicy.main(parse(qam, ["--task", "square-image"]), qam.QAM)
    with pytest.raises(SystemExit, match="--form flow"):
        dppo.main(parse(dppo, ["--task", "one-leg-low", "--form", "diffusion"]))
    with pytest.raises(SystemExit):
        parse(qam, ["--task", "square-state", "--help"])
    shown = capsys.readouterr().out
    assert "--inv-temp" in shown and "--demos" in shown and "--env-id" not in shown
    assert "--n-particles" not in shown
    with pytest.raises(SystemExit):
        parse(dsrl, ["--task", "square-state", "--help"])
    assert "--exploration-steps" not in capsys.readouterr().out  # it is none of its settings
