"""The console command: diffusion-trainer <verb> [overrides]."""

import importlib
import sys

from diffusion_trainer.conventions import UserError

VERBS = {
    "train": "train a model, or resume the run in the same folder",
    "sample": "draw samples from a checkpoint: a picture and an .npz",
    "evaluate": "measure a checkpoint: metrics with their provenance",
}

USAGE = """usage: diffusion-trainer <verb> [group=option] [key=value] ...

verbs
{verbs}

`diffusion-trainer <verb> --help` lists the groups, their options and all keys; `<verb> --config [overrides]` prints the
configuration and stops. Start with: diffusion-trainer train experiment=digits"""


def main() -> None:
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(arguments: list[str]) -> int:
    """The exit code of a command line without its first word."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs="\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items())))
        return 0 if arguments else 2
    verb, overrides = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"there is no verb {verb}; the verbs are {', '.join(VERBS)}")
    module = importlib.import_module(f"diffusion_trainer.apps.{verb}")  # each verb pays for its own imports
    flags = [o for o in overrides if o.startswith("-")]
    if any(f in ("-h", "--help") for f in flags):
        from diffusion_trainer.apps.help import describe

        print(describe(verb))
        return 0
    if flags == ["--config"]:
        print(module.show([o for o in overrides if not o.startswith("-")]))
        return 0
    if flags:
        raise UserError(f"{flags[0]}: there is no such flag; the flags are --help and --config, all else is key=value")
    return module.main(overrides)
