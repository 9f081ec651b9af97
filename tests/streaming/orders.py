"""Orders of made-up shards for tests, and what is drawn of them."""

import numpy as np
from hypothesis import strategies as st

from diffusion_trainer.streaming.mixing import Mix
from diffusion_trainer.streaming.order import Order

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=40)
SEEDS = st.integers(0, 2**32)
LANES = st.integers(1, 16)
WINDOWS = st.integers(1, 70)
EPOCHS = st.sampled_from([0, 1, 2, 1000, 10**9])


def order(counts, seed=0, lanes=4, window=8, source="s") -> Order:
    return Order(np.array(counts), seed, source, lanes, window)


def stream(orders: list[Order], numbers: range, shares=(1,)) -> list[tuple]:
    """(source, shard, sample) of each number."""
    places = Mix(orders, shares)(numbers)
    return list(zip(*(p.tolist() for p in places), strict=True))


def lane_of(o: Order, lane: int, epoch: int) -> list[tuple]:
    """All that a lane reads in an epoch, in order."""
    first = epoch * o.total
    first += (lane - first) % o.lanes
    return [(k, i) for _, k, i in stream([o], range(first, (epoch + 1) * o.total, o.lanes))]
