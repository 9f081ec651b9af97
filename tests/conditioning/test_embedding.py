"""Embeddings as conditions: what of them counts, what is refused, and that each sample is drawn by its own."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion_trainer.conditioning.embedding import Embedding
from diffusion_trainer.conventions import UserError

WIDTH, DIM = 6, 4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def conditioning():
    torch.manual_seed(0)
    return Embedding(WIDTH, DIM)


def read(conditioning, embedding):
    return conditioning.read({"embedding": embedding})


# ---- what of an embedding counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1.0, 7.0, 1e30])
@pytest.mark.parametrize("tokens", [(), (5,)])
def test_the_length_of_an_embedding_does_not_count_and_its_entries_are_of_unit_size(conditioning, factor, tokens):
    embedding = draw(3, *tokens, WIDTH)
    found = read(conditioning, embedding * factor)
    assert found.shape == (3, WIDTH)
    assert found.dtype == torch.float32
    assert_close(found.square().mean(1), torch.ones(3))
    assert_close(found, read(conditioning, embedding))


def test_a_direction_of_its_own_stays(conditioning):
    embedding = torch.tensor([[3.0, -4.0, 0, 0, 0, 0]])
    assert_close(read(conditioning, embedding), embedding / 5 * WIDTH**0.5)


def test_tokens_count_as_their_mean_in_any_order_and_padding_of_zeros_not_at_all(conditioning):
    tokens = draw(3, 5, WIDTH)
    found = read(conditioning, tokens)
    assert_close(found, read(conditioning, tokens.mean(1)))
    assert_close(found, read(conditioning, tokens[:, torch.randperm(5)]))
    assert_close(found, read(conditioning, torch.cat([tokens, torch.zeros(3, 40, WIDTH)], dim=1)))
    assert not torch.allclose(found, read(conditioning, tokens[:, :4]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_embedding_may_have_any_float(conditioning, dtype):
    tokens = (draw(2, 300, WIDTH) * 300).to(dtype)  # whose sum of 300 is beyond float16
    assert_close(read(conditioning, tokens), read(conditioning, tokens.float()))


# ---- the null condition ----------------------------------------------------------------------------------------------


def test_null_is_an_embedding_of_zeros_and_its_vector_is_the_bias_which_learns(conditioning):
    condition = read(conditioning, draw(3, WIDTH))
    null = conditioning.null(condition)
    assert torch.equal(null, read(conditioning, torch.zeros(3, WIDTH)))
    vectors = conditioning(null)
    assert torch.equal(vectors, conditioning.linear.bias.expand(3, DIM))
    vectors.sum().backward()
    assert (conditioning.linear.bias.grad == 3).all()
    assert (conditioning.linear.weight.grad == 0).all()


@pytest.mark.parametrize("dropped", [[0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]], ids=str)
def test_dropout_nulls_exactly_what_is_told(conditioning, dropped):
    condition, dropped = read(conditioning, draw(4, WIDTH)), torch.tensor(dropped, dtype=torch.bool)
    before = condition.clone()
    found = conditioning.drop(condition, dropped)
    assert torch.equal(found[dropped], conditioning.null(condition)[dropped])
    assert torch.equal(found[~dropped], condition[~dropped])
    assert torch.equal(condition, before)


def test_only_forward_reads_a_parameter(conditioning):
    """Outside of it ZeRO-3 has replaced them by what has the shape (0,)."""
    for p in conditioning.parameters():
        p.data = torch.empty(0)
    batch = {"embedding": draw(3, 2, WIDTH)}
    conditioning.check(batch)
    condition = conditioning.read(batch)
    assert conditioning.null(condition).shape == conditioning.drop(condition, torch.ones(3).bool()).shape == (3, WIDTH)
    assert conditioning.stand_in(3).shape == (3, WIDTH)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (torch.zeros(2, WIDTH + 1), rf"\(2, {WIDTH + 1}\).*takes \(B, {WIDTH}\) or.*conditioning.width"),
        (torch.zeros(2, 3, WIDTH + 1), "conditioning.width"),
        (torch.zeros(2), "conditioning.width"),
        (torch.zeros(2, 3, 4, WIDTH), "conditioning.width"),
        (torch.zeros(2, 0, WIDTH), "conditioning.width"),
        (torch.zeros(2, WIDTH, dtype=torch.int64), "is torch.int64: an embedding is an array of floats"),
        (["a caption", "another"], "is list: an embedding is an array of floats"),
    ],
    ids=lambda v: str(tuple(v.shape)) if torch.is_tensor(v) else "",
)
def test_what_is_no_embedding_is_a_users_error(conditioning, embedding, message):
    with pytest.raises(UserError, match=f"the batch's embedding.*{message}"):
        conditioning.check({"embedding": embedding})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [(), (5,)])
def test_embeddings_that_are_not_finite_are_named(conditioning, value, tokens):
    embedding = draw(4, *tokens, WIDTH)
    assert conditioning.check({"embedding": embedding}) is None
    embedding[2, ..., 1] = value
    with pytest.raises(UserError, match=r"not finite .* in sample 2 of 4"):
        conditioning.check({"embedding": embedding})


@pytest.mark.parametrize("arguments", [(0, 6), (6, 0)])
def test_sizes_must_be_positive(arguments):
    with pytest.raises(ValueError, match="positive"):
        Embedding(*arguments)


def test_the_field_that_it_reads_is_the_one_that_it_is_told(conditioning):
    embedding = draw(2, WIDTH)
    other = Embedding(WIDTH, DIM, "pose")
    assert (conditioning.fields, other.fields) == (("embedding",), ("pose",))
    assert torch.equal(other.read({"pose": embedding, "embedding": None}), read(conditioning, embedding))


# ---- examples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(), (5,)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_examples_are_those_of_the_file_in_turn(tmp_path, tokens, dtype):
    given = draw(3, *tokens, WIDTH).numpy().astype(dtype)
    np.save(tmp_path / "examples.npy", given)
    conditioning = Embedding(WIDTH, DIM, examples=str(tmp_path / "examples.npy"))
    assert torch.equal(conditioning.examples(5), read(conditioning, torch.from_numpy(given))[[0, 1, 2, 0, 1]])
    with torch.device("meta"):  # where checks build it
        assert Embedding(WIDTH, DIM, examples=str(tmp_path / "examples.npy")).examples(4).device.type == "cpu"


def test_without_a_file_the_error_says_how_to_make_one(conditioning):
    with pytest.raises(UserError, match=r"np.save\('examples.npy'.*conditioning.examples=examples.npy"):
        conditioning.examples(1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, WIDTH + 1), np.float32), "conditioning.width"),
        (np.zeros((3, WIDTH), np.int64), r"is int64 \(3, 6\); it must be floats"),
        (np.zeros((0, WIDTH), np.float32), "n > 0"),
        (np.zeros((), np.float32), "must be floats"),
        (np.full((3, WIDTH), np.nan, np.float16), "not finite"),
        (np.array([None]), "cannot be read as npy"),
        (b"text", "cannot be read as npy"),
        (None, "cannot be read as npy"),
    ],
    ids=str,
)
def test_a_file_of_no_examples_is_named(tmp_path, array, message):
    path = tmp_path / "e.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array, allow_pickle=True)
    with pytest.raises(UserError, match=f"conditioning.examples=.*e.npy.*{message}"):
        Embedding(WIDTH, DIM, examples=str(path)).examples(1)
