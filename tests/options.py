"""conf/ is the registry: the tests of a group walk its folder, so that a new yaml is under its theorems at once."""

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion_trainer.apps.config import CONF
from diffusion_trainer.apps.nodes import build


def names(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def built(group):
    """Name -> object, for each yaml of a group that leans on no other group."""
    return {name: build(yaml.safe_load((CONF / group / f"{name}.yaml").read_text()), group) for name in names(group)}


def composed(group, *overrides):
    """The object of one group of conf/train.yaml under overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", list(overrides))
    return build(OmegaConf.to_container(config[group], resolve=True), group)
