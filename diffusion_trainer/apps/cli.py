"""The console command: diffusion-trainer <verb> [overrides]."""

import importlib
import sys

from diffusion_trainer.apps.ending import run_to_the_end
from diffusion_trainer.callbacks.redaction import redacted
from diffusion_trainer.conventions import UserError

VERBS = {
    "train": "train a model, or resume the run in the same folder",
    "submit": "train in a job of SLURM: nodes=2 ... and train's arguments; checks, submits, prints where to look",
    "doctor": "look at everything that could stop or slow down a run, with how to mend it; takes train's arguments",
    "sample": "draw samples from a checkpoint: a picture and an .npz",
    "evaluate": "measure a checkpoint: metrics with their provenance",
    "variance": "measure a checkpoint's posterior variance, for variance=analytic and optimal trajectories",
    "index": "count, locate and checksum the samples of shards, once, before they are trained on",
    "inspect": "what shards hold: counts, fields, a picture, speed, and what is damaged in them",
    "likelihood": "bits per dimension of data under a checkpoint: the variational bound, or exact by the ODE",
    "ema": "make an average of another length after training, from a run's snapshots",
    "sweep-report": "the table of a sweep at any moment: what is done, running, failed, and which point is best",
    "wandb-sync": "send to Weights & Biases what it lacks of a run that was offline, each point once",
    "export": "write a checkpoint's weights, averaged or raw, to one safetensors file that says what it is",
}

USAGE = """usage: diffusion-trainer <verb> [group=option] [key=value] ...

verbs
{verbs}

`diffusion-trainer <verb> --help` lists the groups, their options and all keys; `<verb> --config [overrides]` prints the
configuration and stops. `<verb> -m key=a,b other=range(1,4)` (--multirun) checks every combination, runs one after the
other (as jobs: hydra/launcher=slurm), and ends with a table of their metrics; the same command again goes on with a
sweep that was stopped. `<verb> -m --help` says more. Start with: diffusion-trainer train experiment=digits"""


def main() -> None:
    run_to_the_end(_main)


def _main() -> int:
    try:
        return run(sys.argv[1:])
    except UserError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def run(arguments: list[str]) -> int:
    """The exit code of a command line without its first word."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs="\n".join(f"  {verb:<14}{text}" for verb, text in VERBS.items())))
        return 0 if arguments else 2
    verb, overrides = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"there is no verb {verb}; the verbs are {', '.join(VERBS)}")
    name = verb.replace("-", "_")
    module = importlib.import_module(f"diffusion_trainer.apps.{name}")  # each verb pays for its own imports
    flags = [o for o in overrides if o.startswith("-")]
    overrides = [o for o in overrides if not o.startswith("-")]
    if any(f in ("-h", "--help") for f in flags):
        from diffusion_trainer.apps.help import describe

        sweeping = any(f in ("-m", "--multirun") for f in flags)
        print(describe("sweep" if sweeping else verb))
        return 0
    if flags == ["--config"]:
        print(module.show(overrides))
        return 0
    if flags in (["-m"], ["--multirun"]):
        from diffusion_trainer.apps import multirun

        return multirun.main(verb, module.show, overrides, lambda point: module.check(point))
    if flags:
        raise UserError(
            f"{' '.join(flags)}: there is no such flag; the flags are --help, --config and -m (--multirun), one at a "
            "time, all else is key=value"
        )
    return module.main(overrides)
