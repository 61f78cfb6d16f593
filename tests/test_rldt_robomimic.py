"""rldt_robomimic.py: what only it has: encoders, images, base policies, and runs on robosuite."""

import copy
import itertools
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import metrics
from fakes import arguments, new_replay, roll_out, same, scripted, small_critic, small_policy
from short_runs import checkpoint, flags, kept_rollout, main, only_run, use_fakes

import rldt_gym
import rldt_robomimic
from common.runs import Run
from demos import make_robomimic_demos
from demos.dataset import Demonstrations
from rldt_robomimic import Encoder, Policy, critic_target, random_shift, update_actor, update_critic

SIZES = dict(chunk=4, euler_steps=4, width=16, depth=3, time_dim=8)


def seeing_policy(cameras=1):
    return small_policy(rldt_robomimic, cameras=cameras)


def seeing_critic(policy, own):
    encoder = Encoder(policy.cameras, policy.obs_dim) if own else None
    return small_critic(rldt_robomimic, policy, encoder=encoder)


def observations(*shape, cameras=1):
    images = torch.randint(256, (*shape, 3 * cameras, 96, 96), dtype=torch.uint8)
    return {"state": torch.randn(*shape, 4), "rgb": images}


def copied(module):
    return copy.deepcopy(module.state_dict())


def changed(module, before):
    """Names of the parameters that differ from `before`."""
    return {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}


@pytest.fixture
def unshifted(monkeypatch):
    """Images are not shifted; the list holds how many would have been, and by how much."""
    seen = []
    monkeypatch.setattr(rldt_robomimic, "random_shift", lambda rgb, n: seen.append((len(rgb), n)) or rgb)
    return seen


# ------------------------------------------------------------------------------------ networks
def test_spatial_embedding_weights_the_channels_of_projected_maps():
    embedding = rldt_robomimic.SpatialEmbedding(patches=5, dim=3, state_dim=2, out=4).double()
    x, state = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    linear, norm, _ = embedding.project
    for b in range(2):
        expected = torch.zeros(4, dtype=torch.float64)
        for channel in range(3):
            projected = linear.weight @ torch.cat([x[b, :, channel], state[b]]) + linear.bias
            normed = F.layer_norm(projected, (4,), norm.weight, norm.bias)
            expected += embedding.weight[channel] * normed.clamp_min(0)
        torch.testing.assert_close(embedding(x, state)[b], expected)


def test_patches_are_two_convolutions_of_the_scaled_image_and_a_position_each():
    vit = rldt_robomimic.ViT(dim=8, heads=2).double()
    vit.transformer = torch.nn.Identity()
    rgb = torch.randint(256, (1, 3, 96, 96), dtype=torch.uint8)
    first, _, second = vit.patches.double()
    x = F.conv2d(rgb.double() / 255 - 0.5, first.weight, first.bias, stride=4).clamp_min(0)
    x = F.conv2d(x, second.weight, second.bias, stride=2)
    vit.float()  # images are scaled in single precision
    expected = torch.stack([x[0, :, i // 11, i % 11] for i in range(121)]).float() + vit.position
    torch.testing.assert_close(vit(rgb)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cameras", [1, 2])
def test_encoder_sees_every_camera_and_proprioception(cameras):
    encoder, obs = Encoder(cameras, state_dim=4), observations(2, cameras=cameras)
    features = encoder(obs)
    assert features.shape == (2, 128 * cameras + 4)
    assert torch.equal(features[:, -4:], obs["state"])
    for camera in range(cameras):
        darker = obs["rgb"].clone()
        darker[:, 3 * camera : 3 * camera + 3] //= 2
        difference = (encoder(obs | {"rgb": darker}) - features).abs().view(2, -1)
        touched = [difference[:, 128 * i : 128 * (i + 1)].max() > 0 for i in range(cameras)]
        assert touched == [i == camera for i in range(cameras)]
    moved = encoder(obs | {"state": obs["state"] + 1})
    assert ((moved - features)[:, : 128 * cameras].abs().amax(1) > 1e-3).all()
    (features + moved).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


# --------------------------------------------------------------------------------- augmentation
def test_random_shift_moves_each_image_by_its_own_shift_and_repeats_its_border():
    rgb, found = torch.arange(60 * 2 * 7 * 9).view(60, 2, 7, 9), set()  # a pixel is known by its value
    shifted = random_shift(rgb, 2)
    y, x = torch.meshgrid(torch.arange(7), torch.arange(9), indexing="ij")
    for before, after in zip(rgb, shifted, strict=True):
        shifts = []
        for dy, dx in itertools.product(range(-2, 3), repeat=2):
            if torch.equal(before[:, (y + dy).clamp(0, 6), (x + dx).clamp(0, 8)], after):
                shifts.append((dy, dx))
        assert len(shifts) == 1
        found.update(shifts)
    assert len(found) > 15  # of 25, in 60 images
    assert {dy for dy, _ in found} == {dx for _, dx in found} == {-2, -1, 0, 1, 2}


# -------------------------------------------------------------------------------------- critic
def next_batch(T, L):
    """A batch of critic_target, in which one chunk succeeds."""
    batch = {"reward": torch.zeros(T, L), "terminated": torch.zeros(T, L)}
    batch["reward"][1, 0] = batch["terminated"][1, 0] = 1
    return batch | {"next_obs": observations(T, L)}


@pytest.mark.parametrize("own", [False, True])
def test_critic_target_encodes_what_each_of_the_networks_sees(unshifted, own):
    args, policy = arguments(rldt_robomimic, td_lambda=0.4, gamma=0.9), seeing_policy()
    target, batch = seeing_critic(policy, own), next_batch(2, 2)
    target.biases[-1].data.fill_(0.5)  # values inside [0, 1]
    torch.manual_seed(1)
    y = critic_target(policy, target, batch, args)
    torch.manual_seed(1)
    noise, value = torch.randn(4, policy.action_size).view(2, 2, -1), torch.empty(2, 2)
    for t, column in itertools.product(range(2), range(2)):
        following = {name: rows[t, column][None] for name, rows in batch["next_obs"].items()}
        cond = policy.encode(following)
        action = policy.sample(cond, noise[t, column][None])
        value[t, column] = target(target.encoder(following) if own else cond, action).min()
    expected = rldt_robomimic.td_lambda(batch["reward"], batch["terminated"], value, 0.9, 0.4)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert not y.requires_grad


# ----------------------------------------------------------------------- the encoder in updates
def update(function, own, policy=None, critic=None):
    """One update on random images: 6 of critic_target, 5 of update_critic, 4 of update_actor."""
    args, policy = arguments(rldt_robomimic, n_particles=3), policy or seeing_policy()
    critic = critic or seeing_critic(policy, own)
    target, reference = (copy.deepcopy(net).requires_grad_(False) for net in (critic, policy))
    if function == "critic_target":
        critic_target(policy, target, next_batch(3, 2), args)
    elif function == "update_critic":
        optimizer, batch = torch.optim.SGD(critic.parameters(), 0.1), (torch.randn(5, 4), torch.rand(5))
        update_critic(critic, target, policy, optimizer, observations(5), *batch, args)
    else:
        optimizer = torch.optim.SGD(policy.parameters(), 0.1)
        update_actor(policy, reference, critic, optimizer, observations(4), args)


@pytest.mark.parametrize("own", [False, True])
def test_images_are_shifted_once_per_update(unshifted, own):
    for function, states in ("critic_target", 6), ("update_critic", 5), ("update_actor", 4):
        unshifted.clear()
        update(function, own)
        assert unshifted == [(states, 4)]


@pytest.mark.parametrize("own", [False, True])
def test_own_encoder_is_trained_by_the_critic_and_the_shared_one_by_the_actor(own):
    policy = seeing_policy()
    critic = seeing_critic(policy, own)
    names, of_critic = ({name for name, _ in net.named_parameters()} for net in (policy, critic))
    before, of_policy = copied(critic), copied(policy)
    update("update_critic", own, policy, critic)
    assert (changed(critic, before), changed(policy, of_policy)) == (of_critic, set())
    assert all(parameter.grad is None for parameter in policy.parameters())
    before = copied(critic)
    update("update_actor", own, policy, critic)
    assert changed(critic, before) == set()
    assert {name for name in names if "velocity" in name or not own} <= changed(policy, of_policy)


@pytest.mark.parametrize("own", [False, True])
def test_actor_reference_and_critic_encode_images_themselves(unshifted, monkeypatch, own):
    policy, reference, obs = seeing_policy(), seeing_policy(), observations(4)
    critic, losses, seen = seeing_critic(policy, own), rldt_robomimic.actor_losses, []
    recorded = lambda *args: seen.extend(args[3:6]) or losses(*args)
    monkeypatch.setattr(rldt_robomimic, "actor_losses", recorded)
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    update_actor(policy, reference, critic, optimizer, obs, arguments(rldt_robomimic))
    expected = [policy.encode(obs), reference.encode(obs), critic.encode(obs, policy)]
    torch.testing.assert_close([cond.detach() for cond in seen], [cond.detach() for cond in expected])


# ------------------------------------------------------------------------------ replay and rollouts
def test_replay_keeps_images_as_bytes_beside_their_states():
    args = arguments(rldt_robomimic, buffer_iterations=2, num_envs=2, encoder="own")
    replay = new_replay(rldt_robomimic, args, seeing_policy(), 5)
    assert replay.slots["rgb"].dtype == torch.uint8
    slot = replay.next()
    slot["valid"].fill_(1)
    slot["state"].copy_(torch.arange(6)[:, None, None].expand(6, 2, 4))  # the time
    slot["rgb"].copy_(slot["state"][..., :1, None, None].expand(-1, -1, 3, 96, 96))
    batch = replay.draw(3)
    for name, shift in ("obs", 0), ("next_obs", 1):
        obs = batch[name]
        assert (obs["state"] == torch.arange(5)[:, None, None] + shift).all()
        assert (obs["rgb"] == obs["state"][..., :1, None, None]).all()


@pytest.mark.parametrize("encoder", ["frozen", "shared", "own"])
def test_replay_holds_images_or_with_a_frozen_encoder_features(encoder):
    envs = scripted(rldt_robomimic, 2, [2, 9, 9], [()] * 3, images=True)
    policy, slot, _ = roll_out(rldt_robomimic, envs, 4, encoder=encoder)
    assert ("rgb" in slot) == (encoder != "frozen")
    for column, rows in enumerate([[(100, 0), (100, 1), (102, 0)], [(101, t) for t in range(5)]]):
        for row, episode in enumerate(rows):
            raw = {name: value[None] for name, value in envs.observation(*episode).items()}
            obs = policy.observe(raw)
            if encoder == "frozen":
                expected = policy.encode(obs)[0].detach()
                torch.testing.assert_close(slot["state"][row, column], expected, rtol=1e-3, atol=1e-4)
            else:
                assert torch.equal(slot["state"][row, column], obs["state"][0])
                assert torch.equal(slot["rgb"][row, column], obs["rgb"][0])


# -------------------------------------------------------------------------------- base policies
def get_base(path, runs, **changes):
    args = arguments(rldt_robomimic, **dict(task="lift", runs=runs, base=path) | changes)
    return rldt_robomimic.get_base(args, Run(args, "base"))


@pytest.mark.parametrize("kind, task, obs", [
    ("state", "square", "state"), ("state", "transport", "state"), ("state", "lift", "image"),
    ("image", "lift", "state"), ("image", "transport", "image"),
])  # fmt: skip
def test_base_policy_that_does_not_fit_stops_in_one_line(bases, tmp_path, kind, task, obs):
    with pytest.raises(
        SystemExit, match=rf"{kind}\.safetensors: not a policy for {task} with --obs {obs}"
    ):
        get_base(bases[kind], tmp_path, task=task, obs=obs)


@pytest.mark.parametrize("task", ["lift", "square", "transport"])
@pytest.mark.parametrize("obs", ["state", "image"])
def test_shipped_base_policy_fits_its_task_and_is_kept_by_the_run(tmp_path, task, obs):
    policy = get_base(None, tmp_path, task=task, obs=obs)
    assert policy.chunk == rldt_robomimic.TASKS[task].chunk
    assert all(not p.requires_grad for p in policy.encoder.parameters()) if policy.cameras else True
    assert same(Policy.load(only_run(tmp_path) / "base.safetensors"), policy.state_dict())
    assert policy.info["validation_loss"] > 0


@pytest.mark.parametrize("obs", ["state", "image"])
def test_missing_demonstrations_are_made_by_commands_of_the_maker(monkeypatch, tmp_path, obs):
    made, module = [], rldt_robomimic.dataset

    def run(command, cwd):
        assert command[:3] == [sys.executable, "-m", "demos.make_robomimic_demos"]
        args = tyro.cli(make_robomimic_demos.Args, args=list(map(str, command[3:])))
        assert args.images_from is None or args.images_from.exists()
        made.append((args.task, args.out.name, args.images_from is None, args.fast_render))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("demonstrations")
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(module, "DEMOS", tmp_path)
    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "load", lambda *given: given)
    path = tmp_path / "lift" / ("image.hdf5" if obs == "image" else "low_dim.hdf5")
    for _ in range(2):  # the second time they are there
        given = module.get("lift", obs, None, False)
        assert given == (path, "lift", obs == "image", 0, None, False)
    both = ("lift", "low_dim.hdf5", True), ("lift", "image.hdf5", False)
    assert tuple(one[:3] for one in made) == both[: 1 + (obs == "image")]
    assert obs == "state" or made[-1][3] is False


def demonstrations(lengths=(3, 17, 20), images=False):
    """Episodes whose first state and action are the step number, whose second action is the episode."""
    ends = np.cumsum(lengths)
    steps = np.arange(ends[-1], dtype=np.float32)
    action = np.stack([steps, 1 + np.digitize(steps, ends)] + [steps + 2] * 5, 1).astype(np.float32)
    state = np.stack([steps] + [-1 - steps] * (8 if images else 18), 1)
    data = {"state": state, "action": action, "episode_ends": ends, "meta": {}}
    if images:
        shape = len(steps), 3, 96, 96
        data["rgb"] = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    return data


def pretrain(data, checkpoint=None, **changes):
    settings = dict(epochs=1, batch=8, lr=1e-3, head_steps=0) | SIZES | changes
    args = arguments(rldt_robomimic, task="lift", obs="image" if "rgb" in data else "state")
    torch.manual_seed(0)
    return rldt_robomimic.pretrain(args, data, checkpoint, **settings)


def test_pretraining_on_states_is_that_of_rldt_gym_with_limits_that_include_zero():
    data = demonstrations()
    limits = dict(obs_min=[0] + [-40] * 18, obs_max=[39] + [0] * 18)
    limits |= dict(action_min=[0] * 7, action_max=[39, 3] + [41] * 5)
    arrays = data["state"], data["action"], data["episode_ends"]
    limits = {name: np.array(value, np.float32) for name, value in limits.items()}
    torch.manual_seed(0)
    args, other = rldt_gym.Args(device="cpu", bf16=False), Demonstrations(*arrays, normalization=limits)
    expected = rldt_gym.pretrain(args, other, None, epochs=60, batch=8, lr=1e-3, **SIZES)
    policy = pretrain(data, epochs=60)
    assert same(policy, expected.state_dict())
    assert policy.info["validation_loss"] == expected.info["validation_loss"]


def test_a_base_policy_is_made_with_a_checkpoint_that_is_gone_afterwards(monkeypatch, tmp_path):
    fit, checkpoints = rldt_robomimic.fit, []
    settings = dict(epochs=1, batch=8, lr=1e-3, head_steps=0) | SIZES
    settings.pop("chunk")  # the task's
    monkeypatch.setitem(rldt_robomimic.PRETRAINING, "laptop", {"state": settings})
    monkeypatch.setattr(rldt_robomimic, "fit", lambda *args: checkpoints.append(args[-1]) or fit(*args))
    monkeypatch.setattr(rldt_robomimic.dataset, "get", lambda *args: demonstrations())
    policy, run = get_base(None, tmp_path, pretrain=True), only_run(tmp_path)
    assert checkpoints == [run / "pretraining.pt"]
    assert {path.name for path in run.iterdir()} == {"args.json", "base.safetensors"}
    assert (policy.chunk, policy.info["obs"], policy.info["fast_render"]) == (4, "state", True)


def test_pretraining_on_images_trains_the_encoder_on_shifted_images(unshifted):
    torch.manual_seed(0)
    first = copied(Policy(9, 7, cameras=1, **SIZES))
    policy = pretrain(demonstrations((8, 30), images=True))
    assert {name for name, _ in policy.named_parameters()} <= changed(policy, first)
    assert {pixels for _, pixels in unshifted} == {4}


def test_head_steps_pretrain_the_velocity_network_alone(monkeypatch):
    monkeypatch.setattr(rldt_robomimic, "COPIES", 3)
    data = demonstrations((30, 30), images=True)
    first, more = (pretrain(data, head_steps=steps).state_dict() for steps in (0, 300))
    for name, value in more.items():
        assert torch.equal(value, first[name]) != name.startswith("velocity."), name


# ---------------------------------------------------------------------- whole runs with images
@pytest.mark.parametrize("encoder", ["frozen", "shared", "own"])
def test_run_with_images_trains_the_encoders_that_it_should(monkeypatch, bases, tmp_path, encoder):
    fakes = use_fakes(monkeypatch, rldt_robomimic)
    changes = dict(encoder=encoder, iterations=3, warmup_iterations=0, segments=3, rounds=1)
    result = main(rldt_robomimic, flags("image", bases["image"], tmp_path, **changes))
    run = only_run(tmp_path)
    saved, slot, own = checkpoint(run), kept_rollout(run, 0), encoder == "own"
    assert result["task"] == "lift-image"
    assert float(metrics(run)[2]["diagnostics/base_distance"]) > 0
    base = Policy.load(run / "base.safetensors").state_dict()
    differ = [key for key, value in saved["policy"].items() if not torch.equal(value, base[key])]
    moved = {key.split(".")[0] for key in differ}
    assert moved == ({"velocity"} if encoder == "frozen" else {"velocity", "encoder"})
    steps = [group["lr"] for group in saved["critic_optimizer"]["param_groups"]]
    assert steps == [5e-4, 4e-5][: 1 + own]
    assert ("encoder.vits.0.position" in saved["critic"]) == own
    assert ("rgb" in slot) == (encoder != "frozen")
    assert slot["state"].shape == (14, 2, 9 + 128 * (encoder == "frozen"))
    assert all(envs.closed for envs in fakes)


# ---------------------------------------------------------------------- whole runs on robosuite
def test_run_on_robosuite_is_evaluated_again_to_the_same_numbers(bases, tmp_path):
    argv = flags("state", bases["state"], tmp_path, iterations=3, final_eval_episodes=2)
    result = main(rldt_robomimic, argv)
    run = only_run(tmp_path)
    assert (result["task"], result["env_steps"]) == ("lift-state", 2 * 2 * 13 * 4)
    slot = kept_rollout(run, 1)  # of the second iteration
    assert slot["state"].shape == (14, 2, 19)
    assert slot["terminated"].tolist() == [[0, 0]] * 9 + [[1, 1]] + [[0, 0]] * 3  # chunks of 40 steps
    assert (slot["state"][1:] != slot["state"][:-1]).any(-1).all()
    scores = main(rldt_robomimic, ["--evaluate", run])
    assert scores == {name: result[name.replace("eval", "final")] for name in scores}


def test_run_on_robosuite_with_images_and_a_video(bases, tmp_path):
    changes = dict(
        task="square", encoder="own", iterations=2, horizon=8, rollout_chunks=3,
        final_eval_episodes=1, rounds=1, warmup_iterations=0, segments=2, critic_batch=2, actor_batch=2,
        capture_video=True,
    )  # fmt: skip
    result = main(rldt_robomimic, flags("image", bases["image"], tmp_path, **changes))
    run = only_run(tmp_path)
    slot = kept_rollout(run, 0)
    assert slot["terminated"].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert (result["task"], result["env_steps"]) == ("square-image", 2 * 3 * 4)
    assert slot["rgb"].shape == (4, 2, 3, 96, 96)
    assert slot["rgb"].float().std((2, 3, 4)).min() > 10  # a picture in every row
    assert (run / "videos" / "episode.mp4").stat().st_size > 1000
