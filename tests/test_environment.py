"""The environment is Jumanji's, field by field, and its helpers keep their promises."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import AS_FOR_USERS
from jumanji.environments.packing.bin_pack.types import Item, Location, Space
from measure_environment import compare_episodes

import evaluate
import train_search_distill_binpack as script


def test_every_field_of_state_and_timestep_equals_jumanji():
    """The quick form of measure_environment.py, which plays heuristic and searched episodes as well."""
    result = compare_episodes("random", 32, seed=100)
    assert result["steps"] > 32 * 10 and result["overflow_states"] >= 25
    assert result["differing_fields"] == []


def test_the_compiled_update_has_no_sequential_loop(env):
    state, _ = env.reset(jax.random.PRNGKey(0))
    states = jax.tree.map(lambda x: jnp.stack([x] * 4), state)
    text = (
        jax.jit(jax.vmap(functools.partial(script.step_flat, env)))
        .lower(states, jnp.zeros(4, jnp.int32))
        .compile(AS_FOR_USERS)
        .as_text()
    )
    assert " while(" not in text


def test_instances_have_at_most_max_decisions_items(env):
    state, _ = jax.vmap(env.reset)(jax.random.split(jax.random.PRNGKey(3), 256))
    assert set(np.asarray(state.items_mask.sum(-1)).tolist()) == {evaluate.Sizes().max_decisions}
    assert env.obs_num_ems * env.generator.max_num_items == 800


def test_flat_action_is_ems_times_items_plus_item(env, played):
    states, observations = played
    mask = np.asarray(script.legal_actions(observations))
    real = np.asarray(script.has_legal_action(observations))
    assert (mask == np.asarray(observations.action_mask).reshape(mask.shape))[real].all()
    state = jax.tree.map(lambda x: x[0, 0], states)
    action = int(np.flatnonzero(mask[0, 0])[5])
    flat, _ = script.step_flat(env, state, jnp.int32(action))
    pair, _ = env.step(jax.tree.map(lambda x: x[0, 0], states), jnp.array(divmod(action, 20)))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), flat, pair))


def test_finished_rows_have_one_legal_entry_and_absorb_every_action(env, played):
    states, observations = played
    finished = np.argwhere(~np.asarray(script.has_legal_action(observations)))
    assert len(finished) > 10
    mask = np.asarray(script.legal_actions(observations))
    assert mask.any(-1).all()
    for b, t in finished[:5]:
        state = jax.tree.map(lambda x: x[b, t], states)
        assert mask[b, t].sum() == 1
        for action in (0, 399, 799):
            after, timestep = script.step_flat(env, jax.tree.map(lambda x: x, state), jnp.int32(action))
            assert float(timestep.reward) == 0.0 and float(timestep.discount) == 0.0
            assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), after, state))


def plain_blocks(items: list[tuple], box: tuple) -> set:
    """Every block, as (lengths, how many items of each kind), found by trying all pairs until nothing new comes."""
    kinds = list(dict.fromkeys(items))
    one = lambda item: tuple(int(kind == item) for kind in kinds)
    blocks = {(item, one(item)) for item in kinds}
    found = set(blocks)
    while True:
        new = set()
        for (a, a_uses), (b, b_uses) in itertools.combinations_with_replacement(found, 2):
            uses = tuple(map(sum, zip(a_uses, b_uses)))
            for axis in range(3) if all(n <= items.count(kind) for n, kind in zip(uses, kinds)) else ():
                length = tuple(a[x] + b[x] if x == axis else a[x] for x in range(3))
                if all(a[x] == b[x] for x in range(3) if x != axis) and length[axis] <= box[axis]:
                    new.add((length, uses))
        if new <= found:
            return found - blocks
        found |= new


def test_blocks_are_all_that_can_be_joined(env):
    """With exact lengths and every order of joining, where there is room. Mostly the whole container is one of them."""
    states, timesteps = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.PRNGKey(5), 24))
    box = (5870, 2330, 2200)
    complete = whole = twins = 0
    for i in range(24):
        items = list(zip(*(np.asarray(x[i, :19]).astype(int).tolist() for x in states.items)))
        blocks = jax.tree.map(lambda x: np.asarray(x[i]), timesteps.observation.blocks)
        kinds = [items.index(item) for item in items]
        assert blocks.kind[:19].tolist() == kinds
        uses = blocks.uses[sorted(set(kinds))]
        lengths = np.round(blocks.length.T * box).astype(int).tolist()
        found = {(tuple(length), tuple(n)) for length, n in zip(lengths, uses.T.tolist()) if sum(n) > 1}
        assert blocks.uses.sum() == uses.sum()
        whole += (uses.sum(0) == 19).any()
        expected = plain_blocks(items, box)
        assert found <= expected
        complete, twins = complete + (found == expected), twins + (found == expected and len(set(kinds)) < 19)
    assert complete >= 20 and whole >= 20 and twins >= 5


def test_axis_permutation_is_a_symmetry_of_the_dynamics(env, played):
    """Permuting the axes before a placement or after it gives the same set of spaces."""
    states, observations = played
    compared = 0
    for b, t in itertools.product(range(8), (2, 5, 8)):
        state = jax.tree.map(lambda x: x[b, t], states)
        mask = np.asarray(observations.action_mask[b, t])
        if not mask.any() or int(state.ems_mask.sum()) > 20:
            continue
        ems_id, item_id = np.argwhere(mask)[-1]
        slot = state.sorted_ems_indexes[ems_id]
        expected = _active_spaces(env._pack_item(jax.tree.map(lambda x: x, state), slot, item_id))
        for axes in itertools.permutations(range(3)):
            after = env._pack_item(_permute_state(state, axes), slot, item_id)
            found = {tuple(box[axes.index(axis)] for axis in range(3)) for box in _active_spaces(after)}
            assert found == expected
            compared += 1
    assert compared > 60


def test_permuted_observation_keeps_actions_and_volumes(played):
    _, observations = played
    observation = jax.tree.map(lambda x: x[0, 4], observations)
    seen = set()
    for number, axes in enumerate(itertools.permutations(range(3))):
        permuted = script.permute_axes(observation, jnp.int32(number))
        items, original = np.stack(permuted.items), np.stack(observation.items)
        np.testing.assert_array_equal(items, original[list(axes)])
        np.testing.assert_array_equal(permuted.ems.y1, getattr(observation.ems, "xyz"[axes[1]] + "1"))
        np.testing.assert_array_equal(permuted.ems.z2, getattr(observation.ems, "xyz"[axes[2]] + "2"))
        np.testing.assert_array_equal(permuted.action_mask, observation.action_mask)
        seen.add(items.tobytes())
    assert len(seen) == 6


def _active_spaces(state) -> set:
    lower = np.stack([state.ems.x1, state.ems.y1, state.ems.z1], -1)
    upper = np.stack([state.ems.x2, state.ems.y2, state.ems.z2], -1)
    mask = np.asarray(state.ems_mask)
    return {tuple(zip(low.tolist(), up.tolist())) for low, up in zip(lower[mask], upper[mask])}


def _permute_state(state, axes):
    def space(s):
        pairs = [(getattr(s, f"{'xyz'[a]}1"), getattr(s, f"{'xyz'[a]}2")) for a in axes]
        return Space(x1=pairs[0][0], x2=pairs[0][1], y1=pairs[1][0], y2=pairs[1][1], z1=pairs[2][0], z2=pairs[2][1])

    return state.replace(
        container=space(state.container),
        ems=space(state.ems),
        items=Item(*[state.items[a] for a in axes]),
        items_location=Location(*[state.items_location[a] for a in axes]),
    )
