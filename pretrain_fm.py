"""Pretrains a flow-matching base policy, nothing else; one subcommand per environment family.

    python pretrain_fm.py gym --env-id Hopper-v4 --out base.safetensors
    python pretrain_fm.py robomimic --task square --obs state --out base.safetensors
    python pretrain_fm.py furniture --furniture one_leg --randomness low --out base.safetensors

runs the same function as `rldt_gym.py --pretrain` (or `rldt_robomimic.py`, `rldt_furniture.py`) and reports the validation
loss and the policy's return or success rate. The file is what `--base` takes there.
"""

try:  # Isaac Gym cannot be imported after torch
    import isaacgym  # noqa: F401
except (ImportError, RuntimeError):  # the latter on another Python than its own
    pass

import itertools
import sys
from pathlib import Path

import torch
import tyro

import rldt_furniture
import rldt_gym
import rldt_robomimic
from demos import dataset


def gym(args: rldt_gym.Args, out: Path | None = None) -> dict[str, float]:
    """Flow matching on demonstrations of a Gymnasium task.

    Args:
        args: the fields of rldt_gym.py; those of the base policy and the evaluation matter here.
        out: file to write; default demos/<env_id>/base.safetensors.
    """
    args = rldt_gym.resolve(args)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    out = out or dataset.DEMOS / args.env_id / "base.safetensors"
    envs = rldt_gym.VectorEnv(args.env_id, 1, args.chunk, args.backend)
    policy = rldt_gym.pretrain(args, rldt_gym.get_demonstrations(args, envs))
    scores = rldt_gym.evaluate(policy, args, args.final_eval_episodes, 1_000_000)
    info = {
        "env_id": args.env_id,
        "validation_loss": policy.validation_loss,
        "return_zero": scores["zero"].mean(),
        "return_zero_std": scores["zero"].std(),
        "return_sampled": scores["noise"].mean(),
        "return_sampled_std": scores["noise"].std(),
    }
    rldt_gym.save_base(policy, out, **info)
    print(f"{out}: validation loss {info['validation_loss']:.4f}, return {info['return_zero']:.0f} +- {info['return_zero_std']:.0f} "
          f"from x_0 = 0, {info['return_sampled']:.0f} +- {info['return_sampled_std']:.0f} from noise")  # fmt: skip
    return info


def robomimic(args: rldt_robomimic.Args, out: Path | None = None) -> dict[str, float]:
    """Flow matching on demonstrations of a robomimic task.

    Args:
        args: the fields of rldt_robomimic.py; those of the base policy and the evaluation matter here.
        out: file to write; default demos/<task>/base_<obs>.safetensors.
    """
    args = rldt_robomimic.resolve(args)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.obs == "image":
        rldt_robomimic.choose_renderer()
    out = out or dataset.DEMOS / args.task / f"base_{args.obs}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_name(f"{out.name}.unfinished")
    policy = rldt_robomimic.pretrain(args, rldt_robomimic.get_demonstrations(args), checkpoint=checkpoint)
    info = {"task": args.task, "obs": args.obs, "validation_loss": policy.validation_loss, "episodes": args.final_eval_episodes,
            "fast_render": args.fast_render}  # fmt: skip
    rldt_robomimic.save_base(policy, out, **info)  # before the evaluation, which takes longer
    checkpoint.unlink(missing_ok=True)
    envs = rldt_robomimic.make_envs(args, args.num_envs)
    scores = rldt_robomimic.evaluate(policy, envs, args, args.final_eval_episodes, 1_000_000)
    envs.close()
    info |= {"success_zero": rldt_robomimic.rate(scores["zero"])[0], "success_sampled": rldt_robomimic.rate(scores["noise"])[0]}
    rldt_robomimic.save_base(policy, out, **info)
    print(f"{out}: validation loss {info['validation_loss']:.4f}, success {100 * info['success_zero']:.0f} % from x_0 = 0, "
          f"{100 * info['success_sampled']:.0f} % from noise, {args.final_eval_episodes} episodes each")  # fmt: skip
    return info


def furniture(args: rldt_furniture.Args, out: Path | None = None) -> dict[str, float]:
    """Flow matching on demonstrations of a FurnitureBench task.

    Args:
        args: the fields of rldt_furniture.py; those of the base policy and the evaluation matter here.
        out: file to write; default demos/<furniture>/base_<randomness>.safetensors.
    """
    args = rldt_furniture.resolve(args)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    out = out or dataset.DEMOS / args.furniture / f"base_{args.randomness}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_name(f"{out.name}.unfinished")
    policy = rldt_furniture.pretrain(args, rldt_furniture.get_demonstrations(args), checkpoint=checkpoint)
    info = {"furniture": args.furniture, "randomness": args.randomness, "backend": args.backend, "validation_loss": policy.validation_loss,
            "episodes": args.final_eval_episodes}  # fmt: skip
    rldt_furniture.save_base(policy, out, **info)  # before the evaluation, which takes longer
    checkpoint.unlink(missing_ok=True)
    envs = rldt_furniture.make_envs(args, args.num_envs)
    scores = rldt_furniture.evaluate(policy, envs, args, args.final_eval_episodes, 1_000_000)
    envs.close()
    for start, stages in ("zero", scores["zero"]), ("sampled", scores["noise"]):
        info |= {f"success_{start}": float((stages == rldt_furniture.stages_of(args)).mean()), f"pairs_{start}": float(stages.mean())}
    rldt_furniture.save_base(policy, out, **info)
    print(f"{out}: validation loss {info['validation_loss']:.4f}, success {100 * info['success_zero']:.0f} % ({info['pairs_zero']:.2f} pairs) "
          f"from x_0 = 0, {100 * info['success_sampled']:.0f} % ({info['pairs_sampled']:.2f}) from noise, {args.backend}, "
          f"{args.final_eval_episodes} episodes each")  # fmt: skip
    return info


def main(argv: list[str]):
    """Command line -> subcommand: the preset sets the defaults, explicit flags win."""
    paper = "--preset=paper" in argv or any(pair == ("--preset", "paper") for pair in itertools.pairwise(argv))

    def subcommand(function, script):
        default = script.Args(preset="paper", **script.PAPER) if paper else script.Args()

        def run(args: script.Args = default, out: Path | None = None):
            function(args, out)

        run.__doc__ = function.__doc__
        return run

    families = {"gym": subcommand(gym, rldt_gym), "robomimic": subcommand(robomimic, rldt_robomimic), "furniture": subcommand(furniture, rldt_furniture)}
    tyro.extras.subcommand_cli_from_dict(families, args=argv, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main(sys.argv[1:])
