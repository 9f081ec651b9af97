"""--help of each verb says how it is called and all that it takes."""

import pytest

from diffusion_trainer.apps import cli
from diffusion_trainer.apps.help import describe
from diffusion_trainer.apps.multirun import PLACES

GROUPS = "groups and their options"


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_only_verbs_that_sweep_are_shown_with_its_flag(verb):
    flag = " [-m]" if verb in PLACES else ""
    assert describe(verb).startswith(f"usage: diffusion-trainer {verb}{flag} [group=option] [key=value] ...\n")


@pytest.mark.parametrize("verb", [*cli.VERBS, "sweep"])
def test_a_list_of_groups_has_some(verb):
    lines = describe(verb).splitlines()
    for after in (lines[n + 1] for n, line in enumerate(lines) if line.startswith(GROUPS)):
        assert "=" in after.split()[0]


@pytest.mark.parametrize("verb", ["submit", "doctor"])
def test_verbs_that_take_the_arguments_of_train_show_them(verb):
    assert describe(verb).endswith(describe("train"))


def test_a_sweep_is_called_by_any_verb():
    assert describe("sweep").startswith("usage: diffusion-trainer <verb> -m [group=option]")
