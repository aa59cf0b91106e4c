"""The network: what it sees, and that the size at which it runs changes its speed only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jumanji.environments.packing.bin_pack.space import Space
from jumanji.environments.packing.bin_pack.types import Item

import evaluate
import train_search_distill_binpack as script

SIZES = script.Config().token_sizes


@pytest.fixture(scope="module")
def observations(played):
    """Decisions of random episodes, [N, ...]; they use up to 19 spaces, many more than good play."""
    rows = np.argwhere(np.asarray(script.has_legal_action(played[1])))[::12]
    return jax.tree.map(lambda x: x[rows[:, 0], rows[:, 1]], played[1])


def fits(observations, size) -> np.ndarray:
    legal = np.asarray(observations.action_mask)
    return (legal.any(-1).sum(-1) <= size[0]) & (legal.any(-2).sum(-1) <= size[1])


@pytest.mark.parametrize("size", SIZES[:-1])
def test_every_size_that_holds_a_state_gives_the_same(size, network, params, apply, observations):
    rows = fits(observations, size)
    assert rows.sum() > 30
    observations = jax.tree.map(lambda x: x[rows], observations)
    at_size = jax.jit(lambda params, observation: network.apply(params, None, observation, size))
    for found, expected in zip(at_size(params, observations), apply(params, observations), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_runs_at_the_smallest_size_that_holds_all_of_it(observations):
    used = jax.jit(lambda batch: script.at_smallest_size(lambda size: jnp.array(size), SIZES, batch))
    smallest = np.argmax([fits(observations, size) for size in SIZES], 0)
    assert set(smallest) == set(range(len(SIZES)))
    rng = np.random.default_rng(0)
    for largest in range(len(SIZES)):
        rows = np.append(rng.choice(np.flatnonzero(smallest <= largest), 7), np.flatnonzero(smallest == largest)[0])
        assert tuple(used(jax.tree.map(lambda x: x[rows], observations)).tolist()) == SIZES[largest]


def test_prediction_under_vmap_equals_a_state_at_a_time(network, params, apply, observations):
    predict = script.make_predict(network, script.Config())
    together = jax.jit(jax.vmap(functools.partial(predict, params)))
    alone = jax.jit(functools.partial(predict, params))
    for rows in np.arange(64), np.flatnonzero(fits(observations, SIZES[0]))[:64]:
        batch = jax.tree.map(lambda x: x[rows], observations)
        found = together(batch)
        for x, y in zip(found, apply(params, batch), strict=True):
            live = np.asarray(script.has_legal_action(batch))
            np.testing.assert_allclose(x[live], y[live], rtol=1e-4, atol=1e-4)
        one = alone(jax.tree.map(lambda x: x[5], batch))
        for both in zip(one, jax.tree.map(lambda x: x[5], found), strict=True):
            np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)


def test_what_no_legal_action_uses_changes_nothing(params, apply, observations):
    """Spaces that no item fits into and items that fit nowhere can have any coordinates."""
    legal = np.asarray(observations.action_mask)
    dead_space, dead_item = ~legal.any(-1), ~legal.any(-2)
    ems, rng = observations.ems, np.random.default_rng(0)
    assert (dead_space & np.asarray(observations.ems_mask)).any() and dead_item.any()
    scrambled = [np.where(dead_space, rng.random(x.shape), x) for x in jax.tree.leaves(ems)]
    items = type(observations.items)(*(np.where(dead_item, rng.random(x.shape), x) for x in observations.items))
    other = observations._replace(ems=jax.tree.unflatten(jax.tree.structure(ems), scrambled), items=items)
    for found, expected in zip(apply(params, other), apply(params, observations), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_order_of_spaces_and_items_does_not_matter(params, apply, observations):
    """With the slots of both reversed, each action keeps its logit and the state its value. Of instances with more
    blocks than there is room for, other ones are kept then."""
    flip = lambda x, *axes: jnp.flip(x, axes)
    mirrored = observations._replace(
        ems=jax.tree.map(lambda x: flip(x, -1), observations.ems),
        ems_mask=flip(observations.ems_mask, -1),
        items=jax.tree.map(lambda x: flip(x, -1), observations.items),
        items_mask=flip(observations.items_mask, -1),
        items_placed=flip(observations.items_placed, -1),
        action_mask=flip(observations.action_mask, -1, -2),
        blocks=None,
    )
    mirrored = evaluate.checked(mirrored)  # This finds the blocks.
    total = lambda x: np.asarray(x.blocks.length).sum((-1, -2))
    same = np.abs(total(observations) - total(mirrored)) < 1e-4
    assert same.mean() > 0.7
    observations, mirrored = (jax.tree.map(lambda x: x[same], batch) for batch in (observations, mirrored))
    (logits, value), (mirrored_logits, mirrored_value) = apply(params, observations), apply(params, mirrored)
    np.testing.assert_allclose(mirrored_logits[:, ::-1], logits, rtol=1e-4, atol=1e-4)  # Action ems * I + item.
    np.testing.assert_allclose(mirrored_value, value, rtol=1e-4, atol=1e-4)
    legal = np.asarray(script.legal_actions(observations))
    assert np.std(np.asarray(logits)[legal]) > 0.1


def test_a_batch_is_predicted_in_parts_in_which_ended_rows_cost_nothing(network, params, apply, played):
    """Of 80 rows in any order, some of them ended, as many passes are made as parts of 16 have live rows."""
    config, calls = script.Config(), []
    counted = network._replace(
        apply=lambda *arguments: jax.debug.callback(calls.append, 0) or network.apply(*arguments)
    )
    together = jax.jit(jax.vmap(functools.partial(script.make_predict(counted, config), params)))
    observations = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), played[1])
    has_ended = ~np.asarray(script.has_legal_action(observations))
    rng = np.random.default_rng(0)
    for ended in (0, 40, 80):
        kinds = [(has_ended, ended), (~has_ended, 80 - ended)]
        rows = rng.permutation(np.concatenate([rng.choice(np.flatnonzero(kind), n) for kind, n in kinds]))
        batch = jax.tree.map(lambda x: x[rows], observations)
        calls.clear()
        found = jax.block_until_ready(together(batch))
        jax.effects_barrier()
        assert len(calls) == -(-(80 - ended) // 16) if jax.default_backend() == "cpu" else len(calls) <= 1
        for x, y in zip(found, apply(params, batch), strict=True):
            live = ~has_ended[rows]
            np.testing.assert_allclose(x[live], y[live], rtol=1e-4, atol=1e-4)


def observe(item: list, placed: list[bool]) -> evaluate.Observation:
    """An empty container as the one space, though some items are placed, and a slot for another."""
    space = Space(**{f"{axis}{end}": np.array([end - 1, 0], np.float32) for axis in "xyz" for end in (1, 2)})
    waiting = ~np.array(placed)
    legal, items = np.stack([waiting, 0 * waiting]).astype(bool), Item(*np.array(item, np.float32).T)
    return evaluate.checked(
        evaluate.Observation(space, legal.any(1), items, waiting | ~waiting, ~waiting, legal, blocks=None)
    )


@pytest.mark.parametrize("axis", range(3))
def test_a_pair_is_told_what_blocks_of_other_items_would_fill(axis):
    """A beside B and C, which stand one behind the other, along each axis in turn."""
    items = np.roll([[0.4, 1.0, 1.0], [0.6, 0.5, 1.0], [0.6, 0.5, 1.0]], axis, 1).tolist()  # A, B, C

    def relations(items: list, *placed: bool) -> list[list[int]]:
        tokens = script.gather_tokens(observe(items, placed), (2, len(items)))
        return script.end_relations(tokens)[0].astype(int).tolist()

    # Ends where another space begins, by axis; the rest is filled, by axis; part of a block that fits two, three axes;
    # or that ends so: where no other space begins, this is the same.
    filled, nothing = np.roll([1, 0, 0], axis).tolist(), [0, 0, 0]
    assert relations(items, False, False, False) == [nothing + filled + [1, 1] * 2] * 3  # A beside B or C, too.
    # Without B nothing fills beside A.
    assert relations(items, False, True, False)[0] == nothing + nothing + [1, 0] * 2
    assert relations(items, True, False, False)[:2] == [nothing + nothing + [1, 0] * 2] * 2  # B and C are tokens.
    half = np.roll([[0.5, 1.0, 1.0]] * 2, axis, 1).tolist()
    assert relations(half, False, False) == [nothing + filled + [1, 1] * 2] * 2
    assert relations(half, False, True)[0] == nothing + nothing + [1, 0] * 2  # No item stands beside itself.


def test_no_block_is_left_out_however_many_fit(observations):
    """All blocks against all (space, item) pairs at once, in numpy. In some of these states no block ends along two
    axes with a space or where another begins, in others more than three chunks do."""
    rows = jax.tree.map(lambda x: np.asarray(x), observations)
    ems, legal, block = rows.ems, rows.action_mask, rows.blocks.length[:, :, :, None, None]  # [B, 3, N, 1, 1]
    lower, upper = (np.stack([getattr(ems, f"{axis}{end}") for axis in "xyz"], 1) for end in (1, 2))
    space = (upper - lower)[:, :, None, :, None]  # [B, 3, 1, E, 1]
    item = np.stack(list(rows.items), 1)[:, :, None, None]  # [B, 3, 1, 1, I]
    of_kind = np.eye(legal.shape[-1], dtype=int)[rows.blocks.kind] * (rows.items_mask & ~rows.items_placed)[..., None]
    waiting = of_kind.sum(1)[..., None]  # [B, I, 1], of each kind
    possible = (rows.blocks.uses <= waiting).all(1) & (rows.blocks.length > 0).any(1)
    row = np.arange(len(legal))[:, None]
    of_items = (x[row, rows.blocks.kind] for x in (rows.blocks.uses, waiting))
    uses, waiting = (np.swapaxes(x, 1, 2)[:, :, None] for x in of_items)  # [B, N or 1, 1, I]
    slack = space - block
    inside = possible[:, :, None, None] & (slack > -evaluate.EQUAL).all(1)  # [B, N, E, 1]
    same = np.abs(slack) < evaluate.EQUAL
    others = np.stack([same[:, [1, 2]].all(1), same[:, [0, 2]].all(1), same[:, [0, 1]].all(1)], 1)
    fills = others & (np.abs(space - item - block) < evaluate.EQUAL) & (inside & (uses < waiting))[:, None]
    end = lower[:, :, None, :, None] + block  # [B, 3, N, E, 1]
    begins = np.where(legal.any(2)[:, None], lower, np.nan)[:, :, None, None]  # [B, 3, 1, 1, E]
    ends = same | (np.abs(end - begins) < evaluate.EQUAL).any(-1, keepdims=True)
    of_items = [inside & (x.sum(1) >= least) & (uses > 0) for x in (same, ends) for least in (2, 3)]
    expected = np.concatenate([fills.any(2), np.stack([x.any(1) for x in of_items], 1)], 1)  # [B, 7, E, I]
    tokens = script.gather_tokens(rows, legal.shape[1:])
    spaces, items = (np.maximum(np.cumsum(legal.any(axis), -1) - 1, 0) for axis in (2, 1))
    found = np.asarray(script.end_relations(tokens))[row[..., None], spaces[:, :, None], items[:, None]]
    np.testing.assert_array_equal(np.moveaxis(found[..., 3:], -1, 1) * legal[:, None], expected * legal[:, None])
    number = ((ends.sum(1) >= 2) & inside & legal.any(2)[:, None, :, None]).any((2, 3)).sum(1)
    assert number.min() == 0 and number.max() > 3 * script.CHUNK


def test_equal_items_are_one_kind_of_which_a_row_takes_as_many_as_there_are():
    slabs = [[0.2, 1.0, 1.0]] * 4 + [[0.2, 0.5, 1.0]] * 2
    blocks = observe(slabs, [False] * 6).blocks
    assert blocks.kind.tolist() == [0] * 4 + [4] * 2
    lengths = np.round(np.float64(blocks.length.T), 3).tolist()
    made = {(tuple(x), n[0], n[4]) for x, n in zip(lengths, blocks.uses.T.tolist()) if sum(n) > 1}
    rows = {((0.2 * (n + pair), 1.0, 1.0), n, 2 * pair) for n in range(5) for pair in (0, 1) if n + pair > 1}
    rows |= {((0.2, 1.0, 1.0), 0, 2), ((0.4, 0.5, 1.0), 0, 2)}
    assert made == {(tuple(np.round(x, 3).tolist()), *n) for x, *n in rows}


@pytest.mark.parametrize("count", [1, 20, 21, 45])
def test_a_length_is_found_among_however_many(count):
    """Each of them once, and one that none equals."""
    others = np.arange(1, 2 * count + 1, dtype=np.float32).reshape(2, count) / 100  # Of two rows.
    length = np.stack([others, others + 0.005], 1)  # [2, 2, count]
    found = script._equals_any(jnp.array(length), jnp.array(others))
    np.testing.assert_array_equal(found, np.broadcast_to([[[True], [False]]], found.shape))


def test_spaces_are_told_where_others_begin_and_end():
    """The whole container, and what is left of it beside an item that is as long as 0.4 of it."""
    lower, upper = np.float32([[0, 0, 0], [0.4, 0, 0]]), np.ones((2, 3), np.float32)
    relations = script.space_space_relations(lower, upper).astype(int)
    assert relations[0, 1].tolist() == relations[1, 0].tolist() == [0, 1, 1, 1, 1, 1, 1]
    apart = script.space_space_relations(lower, np.float32([[0.4, 1, 1], [1, 1, 1]])).astype(int)
    assert apart[0, 1].tolist() == apart[1, 0].tolist() == [0, 1, 1, 0, 1, 1, 0]  # They touch, and do not overlap.
    ends = observe([[0.4, 0.5, 1.0]], [False])
    tokens = script.gather_tokens(ends, (2, 1))._replace(lower=lower, upper=upper, legal=np.ones((2, 1), bool))
    assert script.end_relations(tokens)[0, 0, :3].tolist() == [1, 0, 0]
