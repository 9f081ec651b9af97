"""Class labels and their null class."""

import pytest
import torch
from options import built, composed, names

from diffusion_trainer.conditioning.class_label import ClassLabel
from diffusion_trainer.conditioning.unconditional import Unconditional
from diffusion_trainer.conventions import UserError

LABELS = torch.tensor([0, 3, 9, 3])


@pytest.fixture
def conditioning():
    torch.manual_seed(0)
    return ClassLabel(num_classes=10, dim=6)


def test_null_is_one_past_the_last_class_and_has_an_embedding_of_its_own(conditioning):
    null = conditioning.null(LABELS)
    assert null.tolist() == [10] * 4
    assert null.dtype == LABELS.dtype
    assert LABELS.tolist() == [0, 3, 9, 3]
    rows = conditioning(torch.arange(11))
    assert len({tuple(row.tolist()) for row in rows}) == 11


def test_embedding_is_a_row_for_each_label(conditioning):
    vectors = conditioning(LABELS)
    assert vectors.shape == (4, conditioning.dim)
    assert torch.equal(vectors[1], vectors[3])


def test_every_class_and_the_null_class_learn(conditioning):
    conditioning(torch.arange(11)).sum().backward()
    assert (conditioning.embedding.weight.grad == 1).all()


@pytest.mark.parametrize("dropped", [[0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]], ids=str)
def test_dropout_nulls_exactly_what_is_told(conditioning, dropped):
    dropped = torch.tensor(dropped, dtype=torch.bool)
    condition = conditioning.drop(LABELS, dropped)
    assert torch.equal(condition[dropped], conditioning.null(LABELS)[dropped])
    assert torch.equal(condition[~dropped], LABELS[~dropped])
    assert condition.dtype == LABELS.dtype
    assert LABELS.tolist() == [0, 3, 9, 3]


@pytest.mark.parametrize("label", [-1, 10, 11])  # 10 is the null class: no datum may have it
def test_label_out_of_range_is_a_users_error_that_names_it(conditioning, label):
    with pytest.raises(UserError, match=rf"label {label} .*0 to 9"):
        conditioning.check({"label": torch.tensor([0, label, 9])})


def test_labels_in_range_pass(conditioning):
    assert conditioning.check({"label": torch.arange(10)}) is None


def test_condition_is_the_field_that_it_says_it_reads(conditioning):
    assert conditioning.fields == ("label",)
    assert conditioning.read({"label": LABELS, "image": None}) is LABELS


def test_stand_ins_are_like_what_is_read(conditioning):
    stand_in, read = conditioning.stand_in(4), conditioning.read({"label": LABELS})
    assert (stand_in.shape, stand_in.dtype) == (read.shape, read.dtype)
    assert conditioning.check({"label": stand_in}) is None


def test_examples_take_every_class_in_turn(conditioning):
    assert conditioning.examples(13).tolist() == [*range(10), 0, 1, 2]


@pytest.mark.parametrize("arguments", [(0, 6), (10, 0), (-1, 6)])
def test_sizes_must_be_positive(arguments):
    with pytest.raises(ValueError, match="positive"):
        ClassLabel(*arguments)


@pytest.mark.parametrize("name", names("conditioning"))
def test_conditioning_of_conf_has_vectors_of_its_dim_for_any_condition_and_null(name):
    conditioning = built("conditioning")[name]
    given = conditioning.stand_in(5)
    for condition in (given, conditioning.null(given), conditioning.drop(given, torch.ones(5).bool())):
        vectors = conditioning(condition)
        assert vectors is None if conditioning.dim == 0 else vectors.shape == (5, conditioning.dim)


def test_unconditional_says_nothing():
    none = Unconditional()
    assert (none.dim, none.fields, list(none.parameters())) == (0, (), [])
    answers = none.read({"label": LABELS}), none.null(None), none.drop(None, torch.ones(4).bool()), none(None)
    assert all(answer is None for answer in (*answers, none.examples(4), none.stand_in(4), none.check({})))
    with pytest.raises(ValueError, match="dim"):
        Unconditional(dim=3)


def test_dim_of_the_network_follows_the_conditioning():
    network = composed("network", "experiment=digits", "conditioning.dim=24")
    assert network.condition.in_features == 24
    assert composed("network", "experiment=digits", "conditioning=none").condition is None
