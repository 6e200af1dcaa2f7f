"""python -m trainer VERB: train an adapter, or make a small base for it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path

from factory import settings
from factory.settings import absolute
from trainer.config import PRESETS, TrainerConfig
from trainer.run import RunBusy

DONE, UNFINISHED, USAGE, INTERRUPTED = 0, 1, 2, 130

EXAMPLES = """examples:
  an adapter on the shipped small base (minutes on two CPU cores):
    python -m trainer fit --root /data/anime --output /runs/trial --max-train-steps 200
  the paper's run on eight GPUs of a cluster:
    ray job submit --working-dir . -- python -m trainer fit --preset paper --root s3://bucket/anime \\
        --output /shared/runs/paper --num-workers 8 --set train_batch_size=64
  the encoders' part computed once, before any number of runs: python -m trainer cache --root /data/anime
  go on after a crash, or to more steps: the same command again, with any number of workers
  before it: does the paper's run fit a GPU, and how long does it take (seconds, no GPU, no weights)?
    python -m trainer plan --preset paper --gpu a10 --gpu h100
  a published pickle to an adapter folder, to start from: --set adapter=/models/plus
    python -m trainer convert ip-adapter-plus_sd15.bin --output /models/plus
  a folder for the Hugging Face hub, with a model card:
    python -m trainer export /runs/paper --step best --license cc-by-4.0 --output /hub/sketch-adapter
  a small family of models from nothing, on drawn figures (hours on two cores):
    python -m trainer micro --output /work/micro
  colour frames from their sketches, with an average of the weights and a sheet of pictures every 500 steps:
    python -m trainer fit ... --set data.target=image --set data.keywords=false --set ema_decay=0.999 \\
        --set pictures.steps=500
  another learning rate, no validation:
    python -m trainer fit ... --set learning_rate=5e-5 --set data.validation_samples=0

settings are the fields of trainer/config.py: a preset, then --config (YAML), then --set, then the options.
exit codes: 0 done; 1 not finished, run it again; 2 wrong usage."""


CACHE_EXAMPLES = """examples:
  python -m trainer cache --root /data/anime --num-workers 2
  python -m trainer fit --root /data/anime --output /runs/trial
  numbers that are not rounded, of twice the size; give it to both:
    python -m trainer cache --root /data/anime --set data.cache_dtype=float32"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    try:
        return args.run(args)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"trainer {args.verb}: {error}", file=sys.stderr)
        return UNFINISHED if isinstance(error, RunBusy) else USAGE
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        wrong = isinstance(error, NotADirectoryError | PermissionError)
        advice = "Give another --output." if wrong else "Run the same command to go on."
        print(f"trainer {args.verb}: {error.strerror or error}{where}. {advice}", file=sys.stderr)
        return USAGE if wrong else UNFINISHED


def fit(args: argparse.Namespace) -> int:
    """Train; UNFINISHED when workers failed."""
    config = _config(
        args,
        output=args.output,
        max_train_steps=args.max_train_steps,
        max_grad_norm=args.max_grad_norm,
        report_to=args.report_to,
    )

    from ray.exceptions import RayError
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    from trainer import loop

    try:
        summary = loop.fit(config)
    except (TrainingFailedError, RayError) as error:  # lost workers, or a cluster that can't start them
        failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
        reason = "; ".join(f"worker {rank}: {failure}" for rank, failure in failures.items()) or str(error)
        print(f"trainer fit: not finished. {reason}\nRun the same command again to go on.", file=sys.stderr)
        return UNFINISHED
    except (KeyboardInterrupt, SystemExit):  # Ray Train turns Ctrl-C into an exit of its own
        print("trainer fit: stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(summary))
    return DONE


def cache(args: argparse.Namespace) -> int:
    """Make the cache of a dataset; UNFINISHED when actors were lost."""
    config = _config(args)

    from ray.exceptions import RayError

    from trainer.cache_writer import write_cache

    try:
        summary = write_cache(config)
    except RayError as error:
        print(f"trainer cache: not finished. {error}\nRun the same command again to go on.", file=sys.stderr)
        return UNFINISHED
    except KeyboardInterrupt:
        print("trainer cache: stopped. The same command goes on from here.", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(summary))
    return DONE


def _config(args: argparse.Namespace, **options: object) -> TrainerConfig:
    """Return the settings that the arguments of `_add_settings`, and further `options` that are not None, say."""
    config: TrainerConfig = settings.load(PRESETS[args.preset](), args.config, args.set)
    options["pretrained_model_name_or_path"] = args.base
    if args.root is not None:
        options["data"] = dataclasses.replace(config.data, root=args.root)
    if args.num_workers is not None:
        options["workers"] = dataclasses.replace(config.workers, num_workers=args.num_workers)
    return dataclasses.replace(config, **{name: value for name, value in options.items() if value is not None})


def twin(args: argparse.Namespace) -> int:
    """Make the random-weight twin of SD v1.5."""
    from trainer.backbone import make_twin

    print(make_twin(absolute(args.output, "--output"), args.seed))
    return DONE


def micro(args: argparse.Namespace) -> int:
    """Make the micro family, or one stage of it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of model loading
    from trainer.micro import exam, publish, stages

    for given, known, what in ((args.stage, stages.STAGES, "stage"), (args.measure, exam.SECTIONS, "measure")):
        for name in set(given or ()) - set(known):
            raise ValueError(f"No {what} {name!r}. There are, in order: {', '.join(known)}")
    if args.threads < 1:
        raise ValueError(f"--threads is 1 or more, not {args.threads}.")
    if args.trial and (args.install or args.measure is not None):
        raise ValueError("A trial's models have seen four steps: they are neither installed nor measured.")
    output = Path(absolute(args.output, "--output"))
    shop = stages.Workshop(output, threads=args.threads, trial=args.trial)
    try:
        if args.measure is not None:
            print(exam.run(shop, args.measure or list(exam.SECTIONS)))
        elif args.install:
            return DONE if publish.install(shop) else UNFINISHED
        else:
            stages.run(shop, args.stage or list(stages.STAGES))
    except KeyboardInterrupt:
        print("trainer micro: stopped. The same command goes on from the last saved step.", file=sys.stderr)
        return INTERRUPTED
    return DONE


def plan(args: argparse.Namespace) -> int:
    """Say what a run would need."""
    config = _config(args, max_train_steps=args.max_train_steps)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from trainer import plan

    for name in set(args.gpu or ()) - set(plan.GPUS):
        raise ValueError(f"No GPU {name!r}. There are: {', '.join(plan.GPUS)}")
    gpus = [plan.GPUS[name] for name in args.gpu or plan.GPUS]
    print(plan.report(plan.make_plan(config, args.utilisation), gpus))
    return DONE


def convert(args: argparse.Namespace) -> int:
    """Make an adapter folder of a published pickle."""
    from trainer.convert import convert

    output = absolute(args.output, "--output")
    adapter = convert(absolute(args.file, "FILE"), output)
    tensors = list(adapter.state_dict().values())
    facts = {"variant": adapter.config.variant, "tensors": len(tensors), "parameters": sum(t.numel() for t in tensors)}
    print(json.dumps({"output": output, **facts}))
    return DONE


def export(args: argparse.Namespace) -> int:
    """Make a folder for the hub of a run."""
    from trainer.export import PICTURES, UNKNOWN, export

    step = int(args.step) if args.step and args.step.isdecimal() else args.step
    if isinstance(step, str) and step != "best":
        raise ValueError(f"--step is a checkpoint's number or best, got {step!r}.")
    output = absolute(args.output, "--output")
    export(absolute(args.folder, "RUN"), output, step=step, license=args.license)
    if args.license is None:
        print(f"No --license was given: the card says {UNKNOWN}.", file=sys.stderr)
    if not (Path(output) / PICTURES).is_dir():
        print(
            "The card shows no picture: the run has no sheet up to this step. To get some, run `fit` again, to more "
            "steps, with --set pictures.steps=N.",
            file=sys.stderr,
        )
    print(json.dumps({"output": output, "license": args.license or UNKNOWN}))
    return DONE


# Named here too, for --help: the modules that know them take seconds to import.
_GPUS = "a10, a100-40, a100-80, h100, h200"
_STAGES = "tokenizer, clip, vae, unet, judge-clip, captioner, matcher, sketch, probe"
_MEASURES = "vae, clip, matcher, captioner, sketch, base, held-out, framings, judges, probe, step, adapter"


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m trainer", description=__doc__, epilog=EXAMPLES, formatter_class=style)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("fit", help="train an adapter", epilog=EXAMPLES, formatter_class=style)
    _add_settings(verb)
    verb.add_argument("--output", metavar="DIR", help="run folder; an unfinished run there is resumed")
    _add_steps(verb)
    verb.add_argument("--max-grad-norm", type=float, metavar="NORM", help="shorten longer gradients to it; 0: none")
    verb.add_argument(
        "--report-to",
        choices=["none", "tensorboard", "wandb", "mlflow"],
        help="where a copy of metrics.jsonl goes (default: none); its package must be installed",
    )
    verb.set_defaults(run=fit)

    verb = verbs.add_parser(
        "cache",
        help="compute once what the frozen encoders make of each sample; `fit` then trains on it",
        formatter_class=style,
        description="Write latents (mean and standard deviation), text states and image features of all training "
        "samples, and of their mirror images with data.random_flip, to ROOT/caches/KEY.lance. KEY is a hash of base, "
        "dataset version and settings: `fit` with the same ones finds the cache by itself (data.cache=auto), or "
        "refuses to train without it (required). A command that was stopped goes on. A cache may be removed any time.",
        epilog=CACHE_EXAMPLES,
    )
    _add_settings(verb)
    verb.set_defaults(run=cache)

    verb = verbs.add_parser(
        "plan",
        help="does a run fit a GPU, with which ZeRO stage, and how long does it take?",
        formatter_class=style,
        description="Walk the same training pass as the run's on shapes alone and say what it would take: memory by "
        "part, work by part, and for each GPU whether it fits, the lowest ZeRO stage, the largest pass, the time of a "
        "step and of the run at an assumed share of the GPU's peak. Seconds; no GPU, no weights, no dataset. Takes the "
        "settings of fit; with --set adapter=FILE that adapter's sizes are read.",
        epilog="examples:\n  python -m trainer plan --preset paper\n"
        "  python -m trainer plan --preset paper --num-workers 8 --set train_batch_size=64 --gpu a100-80",
    )
    _add_settings(verb, preset="paper")
    _add_steps(verb)
    verb.add_argument(
        "--gpu",
        metavar="NAME",
        action="append",
        help=f"this GPU; may be given again: {_GPUS} (default: all)",
    )
    verb.add_argument("--utilisation", type=float, metavar="SHARE", help="of the GPU's peak (default: 0.2)")
    verb.set_defaults(run=plan)

    verb = verbs.add_parser(
        "convert",
        help="a published .bin or .pt to an adapter folder; tensors keep their names, shapes and dtypes",
        description="Read a published IP-Adapter or IP-Adapter-Plus file once, with torch's weights_only, and write "
        "its tensors as an adapter folder. What holds more than tensors is refused. Published .safetensors need no "
        "conversion.",
    )
    verb.add_argument("file", metavar="FILE", help="such as ip-adapter-plus_sd15.bin")
    verb.add_argument("--output", metavar="DIR", required=True, help="adapter folder to make")
    verb.set_defaults(run=convert)

    verb = verbs.add_parser(
        "export",
        help="a run's adapter as a folder for the Hugging Face hub, with a model card",
        description="Copy a checkpoint's adapter, its seal checked, beside a model card with the run's facts, losses "
        "and sample pictures, and SHA256SUMS. Read the card before you upload it: what it can't know, such as who may "
        "use the data, it says is unknown.",
    )
    verb.add_argument("folder", metavar="RUN", help="run folder of `fit`")
    verb.add_argument("--output", metavar="DIR", required=True, help="folder to make; its name is the card's title")
    verb.add_argument("--step", metavar="N|best", help="this checkpoint, or best (default: the newest)")
    verb.add_argument(
        "--license", metavar="ID", help="the adapter's, as the hub names it: cc-by-4.0 (default: unknown)"
    )
    verb.set_defaults(run=export)

    verb = verbs.add_parser("twin", help="make a small random base with SD v1.5's structure, for trials and tests")
    verb.add_argument("--output", metavar="DIR", required=True, help="folder to make")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same weights (default: 0)")
    verb.set_defaults(run=twin)

    verb = verbs.add_parser(
        "micro",
        help="make the micro family from nothing: the shipped models, hours on two cores",
        formatter_class=style,
        description="Draw the corpora and train every model of the micro family, each stage once: hours on two cores. "
        "A stage that was stopped goes on; a stage whose model is there is done. Each leaves curve.svg, and where it "
        "draws, sheet.png.",
    )
    verb.add_argument("--output", metavar="DIR", required=True, help="where corpora, curves and models go (4 GB)")
    what = verb.add_mutually_exclusive_group()
    what.add_argument(
        "--stage", metavar="NAME", action="append", help=f"only this stage; may be given again: {_STAGES}"
    )
    what.add_argument(
        "--install",
        action="store_true",
        help="put the finished models in place of those shipped with this code; again after --measure, for the cards",
    )
    what.add_argument(
        "--measure",
        metavar="NAME",
        nargs="*",
        help=f"measure the shipped models: all, or some of {_MEASURES}",
    )
    verb.add_argument(
        "--threads",
        type=int,
        default=2,
        metavar="N",
        help="torch threads (default: 2). Two commands of one thread each, on different stages, use two cores better",
    )
    verb.add_argument("--trial", action="store_true", help="a few pictures and steps only, to see every stage run")
    verb.set_defaults(run=micro)
    return parser


def _add_settings(verb: argparse.ArgumentParser, preset: str = "micro") -> None:
    verb.add_argument("--root", metavar="URI", help="dataset root that `python -m factory build` wrote")
    verb.add_argument(
        "--base",
        metavar="PATH_OR_ID",
        help="frozen Stable Diffusion: a diffusers folder or hub id (default: the preset's)",
    )
    verb.add_argument(
        "--preset", choices=sorted(PRESETS), default=preset, help=f"where settings start (default: {preset})"
    )
    verb.add_argument("--config", metavar="FILE", help="YAML of settings, laid over the preset")
    verb.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="one setting, such as seed=1")
    verb.add_argument("--num-workers", type=int, metavar="N", help="Ray workers, each with a copy of the base")


def _add_steps(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--max-train-steps", type=int, metavar="N", help="optimizer steps in all")


if __name__ == "__main__":
    sys.exit(main())
