"""Fixtures for all tests. JAX sees four CPU devices, so that one process can compare 1, 2 and 4 of them."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"binpack-tests-cache-{os.getuid()}")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ.update(WANDB_MODE="disabled", WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")

import jax
import pytest

import train_search_distill_binpack as script

# A network and search that compile in seconds; every test that does not name its own configuration uses them.
SMALL = dict(
    max_num_iters=4,
    rollout_batch_size=8,
    num_simulations=2,
    search_width=48,
    max_num_considered_actions=2,
    training_batch_size=32,
    num_transformer_layers=1,
    transformer_num_heads=2,
    transformer_key_size=8,
    transformer_mlp_units=(16,),
    pair_units=8,
    eval_interval=2,
    eval_batch_size=8,
    eval_num_simulations=0,
    save_interval=2,
)
SMALL_WORDS = [f"{key}={script._as_typed(value)}" for key, value in SMALL.items()]


@pytest.fixture(scope="session")
def config():
    return script.Config(**SMALL)


@pytest.fixture(scope="session")
def env():
    return script.make_env()


@pytest.fixture(scope="session")
def network(config):
    return script.make_network(config)


@pytest.fixture(scope="session")
def model(env, network, config):
    """Random parameters, with a policy that is neither uniform nor certain."""
    state = script.init_train_state(env, network, config)
    return script.Model(jax.tree.map(lambda x: 3.0 * x, state.params), state.net_state)


@pytest.fixture(scope="session")
def played(env, model):
    """States and observations along random episodes, leaves [B, T, ...], with B = 128."""

    def act(model, key, state, observation, memory):
        logits = jax.numpy.where(script.legal_actions(observation), 0.0, script.MASKED)
        return jax.random.categorical(key, logits), state, memory  # The state in the place of the decision.

    rollout = script.make_rollout(env, script.Policy(start=lambda *_: (), act=act))
    trajectory = jax.jit(rollout)(model, jax.random.split(jax.random.PRNGKey(7), 128))
    return trajectory.decision, trajectory.observation
