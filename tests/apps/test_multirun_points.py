"""The points of a sweep: what is expanded, and where each writes."""

import itertools
from pathlib import Path

import pytest
import yaml

from diffusion_trainer.apps import places, train
from diffusion_trainer.apps.config import assignment, expand, value_of
from diffusion_trainer.apps.multirun import plan
from diffusion_trainer.apps.places import label
from diffusion_trainer.conventions import UserError

pytestmark = pytest.mark.slow

# ---- expansion -------------------------------------------------------------------------------------------------------


def test_the_product_of_all_sweeps_in_the_order_given_the_last_turns_fastest():
    points = expand(["a.b=0,0.5", "c=x", "+d=range(1,4)", "e=choice([1,2],'p q')"])
    expected = itertools.product(["a.b=0", "a.b=0.5"], ["+d=1", "+d=2", "+d=3"], ["e=[1,2]", "e='p q'"])
    assert [swept for _, swept in points] == [list(p) for p in expected]
    for overrides, swept in points:
        assert overrides == [swept[0], "c=x", *swept[1:]]


@pytest.mark.parametrize(
    ("sweep", "values"),
    [
        ("k=choice('1',2,'null')", ["1", 2, "null"]),
        ("k=choice('p, q',\"it's\",a/b-c.d,[1,'2'])", ["p, q", "it's", "a/b-c.d", [1, "2"]]),
        ("k='1',1,'x y',{a: 'b c'},true,1e-3,'',null", ["1", 1, "x y", {"a": "b c"}, True, 1e-3, "", None]),
        ("k=range(0,1,0.25)", [0.0, 0.25, 0.5, 0.75]),
    ],
)
def test_a_point_has_the_value_that_was_swept_quoted_or_not(sweep, values):
    got = [value_of(overrides, "k") for overrides, _ in expand([sweep])]
    assert got == values
    assert list(map(type, got)) == list(map(type, values))


@pytest.mark.parametrize(
    ("overrides", "say"),
    [
        (["a=1"], "several values"),
        (["a=glob(*)"], "a=glob(*): its values are not known"),
        (["a=interval(0,1)"], "its values are not known"),
        (["a=1,2,1"], "a value stands twice"),
        (["a=range(3,1)"], "a=range(3,1): is empty"),
        (["a=1,2", "a=3"], "a is given twice"),
        (["a=1,2", "+a=3,4"], "a is given twice"),
        (["a=(1,2"], "cannot read the arguments"),
    ],
)
def test_what_is_no_sweep_is_explained(overrides, say):
    with pytest.raises(UserError) as error:
        expand(overrides)
    assert say in str(error.value)


@pytest.mark.parametrize("text", ["runs/a b", "it's", "a=1,b=2", "${name}", "x\\", "\\'", "5", "null", '"q"', "[1]"])
def test_an_assignment_says_just_its_text(text):
    assert value_of([assignment("key", text)], "key") == text


# ---- names -----------------------------------------------------------------------------------------------------------

SWEPT = [
    ["a=1"], ["a=-1"], ["a=1", "b=2"], ["a=[1,2]"], ["a=[1_2]"], ["a=[12]"], ["a='x y'"], ["a=x_y"], ["a=x/y"],
    ["a=../../x"], ["a='é'"], ["a='è'"], ["a=" + "x" * 300], ["a=" + "x" * 301], ["+a.b_c=1e-3"],
]  # fmt: skip


def test_labels_are_files_names_that_differ_and_can_be_said_without_quotes():
    labels = [label(swept) for swept in SWEPT]
    assert len(set(labels)) == len(labels)
    for text in labels:
        assert len(text) < 200
        assert "/" not in text
        assert value_of([f"checkpoint=runs/{text}"], "checkpoint") == f"runs/{text}"
    assert label(["sampler.solver.eta=0.5", "+n=10"]) == "sampler.solver.eta-0.5+n-10"


DIGITS = ["experiment=digits", "data.shards=shards/*.tar"]


@pytest.mark.parametrize(
    ("given", "folders"),
    [
        (["seed=0,1", "lanes=4,8"], [f"runs/digits/seed-{s}+lanes-{n}" for s in (0, 1) for n in (4, 8)]),
        (["name=a,b"], ["runs/a", "runs/b"]),
        (["name=a,b", "seed=0,1"], [f"runs/{n}/seed-{s}" for n in "ab" for s in (0, 1)]),
        (["folder=x,y"], ["x", "y"]),
        (["folder=here", "seed=0,1"], ["here/seed-0", "here/seed-1"]),
        (["folder='far/${name}'", "seed=0,1"], ["far/digits/seed-0", "far/digits/seed-1"]),
    ],
)
def test_each_point_of_train_is_its_configuration_in_a_folder_of_its_own(given, folders):
    """Nothing but name and folder differs from the combination run alone."""
    points = plan("train", train.show, [*DIGITS, *given])
    combinations = [overrides for overrides, _ in expand([*DIGITS, *given])]
    assert [str(p.place.out) for p in points] == folders
    for p, overrides, folder in zip(points, combinations, folders, strict=True):
        ours, alone = (yaml.safe_load(train.show(o)) for o in (p.overrides, overrides))
        assert ours["folder"] == folder
        assert ours | {"name": "", "folder": ""} == alone | {"name": "", "folder": ""}
        assert p.place.report == Path(folder) / "metrics.json"
    if given[0].startswith("seed"):
        assert {str(p.place.home) for p in points} == {"runs/digits"}


def finished(**keys):
    """A verb's show, for a checkpoint that exists."""
    return lambda overrides: yaml.safe_dump({"checkpoint": "runs/x", "out": value_of(overrides, "out"), **keys})


@pytest.mark.parametrize(("verb", "suffix"), [("evaluate", ".json"), ("likelihood", ".json"), ("sample", "")])
def test_points_of_a_finished_run_write_into_it_unless_told(monkeypatch, verb, suffix):
    monkeypatch.setattr(places, "checkpoint_in", lambda path: path.absolute() / "checkpoints" / "images-1")
    points = plan(verb, finished(), ["seed=0,1"])
    assert [str(p.place.out) for p in points] == [f"runs/x/multirun/{verb}/seed-{s}{suffix}" for s in (0, 1)]
    assert [value_of(p.overrides, "out") for p in points] == [str(p.place.out) for p in points]
    told = plan(verb, finished(), ["out=a.json,b.json"])
    assert [str(p.place.out) for p in told] == ["a.json", "b.json"]
    with pytest.raises(UserError, match=r"seed=0 and seed=1 would both write to a.json"):
        plan(verb, finished(), ["out=a.json", "seed=0,1"])
