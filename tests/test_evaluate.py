"""evaluate.py: its figures are those of training, its floors those of obvious loops, its files what they say."""

import dataclasses
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import evaluate
import train_ppo_binpack as ppo
import train_search_distill_binpack as search_distill


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Small chunks, where a test plays few instances and needs no figure of a training run."""
    monkeypatch.setattr(evaluate, "instances_at_a_time", lambda: 4)


def run(tmp_path, *words) -> dict:
    """The JSON of an evaluation on a few instances."""
    path = tmp_path / "scores.json"
    words = [str(word) for word in words]
    small = [] if any(word.startswith("num_episodes=") for word in words) else ["num_episodes=8"]
    assert evaluate.main([*words, *small, f"json={path}"]) == 0
    return json.loads(path.read_text())


def last_row(run_dir) -> dict:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])


def test_greedy_figures_are_those_that_training_logged(search_run, ppo_run, tmp_path, capsys):
    """To the last digit, for both methods, by folder and by file."""
    scores = run(tmp_path, search_run, ppo_run / "iter_000004.pkl")
    assert [row["policy"] for row in scores["rows"]] == ["greedy", "greedy"]
    for row, run_dir in zip(scores["rows"], (search_run, ppo_run), strict=True):
        logged = last_row(run_dir)
        for key in ("avg_return", "avg_return_se", "solved_rate", "packed_items"):
            assert row[key] == logged[f"eval/greedy/{key}"], key
        assert len(row["returns"]) == 8 and np.mean(row["returns"]) == pytest.approx(row["avg_return"], abs=1e-6)
        assert row["decisions_per_second"] > 0
    table = capsys.readouterr().out
    assert "nsim_2/seed_0/iter_000004" in table and "ppo/seed_0/iter_000004" in table and table.count("\n") == 3
    delta = np.array(scores["rows"][1]["returns"]) - np.array(scores["rows"][0]["returns"])
    half = 1.96 * delta.std(ddof=1) / 8**0.5
    np.testing.assert_allclose(
        scores["rows"][1]["difference"], [delta.mean(), delta.mean() - half, delta.mean() + half], atol=1e-6
    )


@pytest.mark.slow
def test_attempts_only_add_to_greedy_play(few_at_a_time, search_run, ppo_run, tmp_path):
    """And a checkpoint of PPO is searched with as the other one is."""
    early = search_run / "iter_000001.pkl"  # It leaves room.
    rows = run(tmp_path, early, ppo_run, "policy=greedy,search", "num_simulations=8")["rows"]
    for greedy, search in (rows[0::2], rows[1::2]):
        greedy, search = np.array(greedy["returns"]), np.array(search["returns"])
        assert (search >= greedy).all() and search.mean() > greedy.mean()
    assert rows[2]["search"] == rows[3]["search"] and rows[2]["returns"] != rows[3]["returns"]
    greedy = np.array(rows[0]["returns"])
    rows = run(tmp_path, early, "policy=best_of_n,sample", "n=8")["rows"]
    best, sample = (np.array(row["returns"]) for row in rows)
    assert (
        (sample != greedy).any() and (best >= greedy).all() and (best >= sample).all() and best.mean() > greedy.mean()
    )


@pytest.mark.parametrize("method", evaluate.METHODS)
def test_shipped_checkpoints_are_for_evaluation_alone(method, tmp_path, capsys):
    """What they reach, test_readme.py tests."""
    path = ROOT / "checkpoints" / f"{method}_cpu.pkl"
    assert path.stat().st_size < 15e6 and evaluate.read_checkpoint(path)["opt_state"] == []
    script = evaluate.import_script(method)
    longer = ["max_num_iters=999", "learning_rate_decay_iters=999"]
    assert script.main(["preset=cpu", *longer, f"resume={path}", f"save_dir={tmp_path / 'runs'}"]) == 2
    assert "without the optimizer's state; give one that a run saved" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def rule(observation) -> tuple[int, int]:
    """Largest item first, for it the smallest space that holds it, by plain loops."""
    volume = [float(x * y * z) for x, y, z in zip(*map(np.asarray, observation.items))]
    ems = jax.tree.map(np.asarray, observation.ems)
    space = (ems.x2 - ems.x1) * (ems.y2 - ems.y1) * (ems.z2 - ems.z1)
    pairs = [tuple(pair) for pair in np.argwhere(np.asarray(observation.action_mask))]
    return min(pairs, key=lambda pair: (-volume[pair[1]], space[pair[0]], pair[0] * len(volume) + pair[1]))


def test_floors_need_no_checkpoint_and_equal_plain_loops(few_at_a_time, env, tmp_path):
    scores = run(tmp_path, "policy=largest_first,random,lookahead", "num_episodes=3")
    largest, _, lookahead = (row["returns"] for row in scores["rows"])
    step = jax.jit(env.step)

    def play(state, timestep, total=0.0):
        while timestep.observation.action_mask.any():
            state, timestep = step(state, jnp.array(rule(timestep.observation)))
            total += float(timestep.reward)
        return total

    for key, returns in zip(evaluate.evaluation_keys(1_000_000, 3), largest, strict=True):
        start = jax.jit(env.reset)(jax.random.fold_in(key, 19))
        assert play(*start) == pytest.approx(returns, abs=1e-5)
    assert np.mean(lookahead) >= np.mean(largest)
    assert all(a >= b - 1e-6 for a, b in zip(lookahead, largest))


def test_lookahead_takes_the_best_completed_action_of_the_rules_16_best(played):
    states, observations = played
    checkpoint = evaluate.without_network(evaluate.Sizes())
    act = jax.jit(evaluate.make_lookahead_policy(checkpoint).act)
    order_of, first_of = jax.jit(evaluate.largest_first_order), jax.jit(evaluate.largest_first)
    step = jax.jit(functools.partial(search_distill.step_flat, checkpoint.env))
    differs = 0
    for b in range(8):
        state, observation = jax.tree.map(lambda x: x[b, 7], (states, observations))
        order = np.asarray(order_of(observation))
        legal = np.asarray(search_distill.legal_actions(observation))
        assert legal[order[: legal.sum()]].all() and order[0] == first_of(observation)
        assert divmod(int(order[0]), 20) == rule(observation)
        outcomes = []
        for action in [a for a in order[:16] if legal[a]]:
            after, timestep = step(jax.tree.map(lambda x: x, state), jnp.int32(action))
            total = float(timestep.reward)
            while timestep.observation.action_mask.any():
                after, timestep = step(after, first_of(timestep.observation))
                total += float(timestep.reward)
            outcomes.append(total)
        action = int(act((), None, state, observation, ())[0])
        assert outcomes[order.tolist().index(action)] == pytest.approx(max(outcomes), abs=1e-5)
        differs += action != order[0]
    assert differs > 0


def test_pictures_of_one_instance_and_curves(few_at_a_time, search_run, ppo_run, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    gif, png, curves = tmp_path / "episode.gif", tmp_path / "episode.png", tmp_path / "curves.png"
    run(tmp_path, search_run, ppo_run, f"render={gif}", "instance=3", f"curves={curves}")
    run(tmp_path, search_run, f"render={png}")
    with Image.open(gif) as image:
        assert image.n_frames > 8 and image.width > 1.8 * image.height
    for path in (png, curves):
        with Image.open(path) as image:
            assert image.format == "PNG" and len(set(image.convert("L").get_flattened_data())) > 20


def test_boxes_are_painted_from_back_to_front():
    """Eight octants of a cube: none is painted after one that it is hidden by, whatever their order was."""
    lower = np.array(list(np.ndindex(2, 2, 2)), float)
    for items in (np.arange(8), np.arange(8)[::-1], np.random.default_rng(0).permutation(8)):
        order = evaluate.back_to_front(items, lower, lower + 1)
        assert sorted(order) == list(range(8))
        for after, i in enumerate(order):
            x, y, z = lower[i]
            hidden = [j for j in order[after + 1 :] if (lower[j] * [1, -1, 1] <= [x, -y, z]).all()]
            assert not hidden


def test_runs_of_the_same_name_are_told_apart(ppo_run, tmp_path, few_at_a_time):
    """Two losses, say, under two folders: their rows have names of their own, and their pictures and curves too."""
    other = tmp_path / "cispo" / "BinPack-v2" / "ppo" / "seed_0"
    shutil.copytree(ppo_run, other)
    rows = run(tmp_path, ppo_run, other, f"render={tmp_path / 'a.png'}", f"curves={tmp_path / 'c.png'}")["rows"]
    first, second = (row["checkpoint"] for row in rows)
    assert first != second and second.endswith("cispo/BinPack-v2/ppo/seed_0/iter_000004")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1.8 * image.height
    assert evaluate.distinct_names([ppo_run.parent, other.parent, other.parent], 1)[1].endswith("cispo/BinPack-v2/ppo")


def test_speed_is_that_of_all_that_is_played_without_compilation(monkeypatch):
    """Two attempts add up, another one of the same policy compiles nothing, and what is filled is not played again."""
    clock, cost = [0.0], {"a": 1.0, "b": 2.0, "fills half": 4.0}
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: clock[0])

    def make_player(policy):
        compiled = []

        def play(params, keys, advance=lambda count: None):
            is_padding = (keys == evaluate.NO_INSTANCE).all()
            clock[0] += 100.0 * (not compiled) + cost[policy] * len(keys) * (not is_padding)
            compiled.append(True)
            solved = (policy == "fills half") & (np.arange(len(keys)) % 2 == 0)
            return evaluate.Episodes(np.where(solved, 1.0, 0.5), np.full(len(keys), 10), solved)

        return play

    monkeypatch.setattr(evaluate, "make_player", make_player)
    script = SimpleNamespace(make_rollout=lambda env, policy: policy)
    checkpoint = dataclasses.replace(evaluate.without_network(evaluate.Sizes()), script=script)
    seconds = {("a",): 1, ("b",): 2, ("a", "b"): 3, ("a", "b", "b"): 5, ("fills half", "a"): 4.5}
    for attempts, expected in seconds.items():
        keys, pairs = np.zeros((40, 2), np.uint32), [(policy, ()) for policy in attempts]
        assert evaluate.score("x", checkpoint, pairs, keys)[1] == pytest.approx(10 / expected), attempts


def test_rendered_episode_is_the_scored_one(search_run, tmp_path):
    scores = run(tmp_path, search_run)
    checkpoint = evaluate.load_checkpoint(search_run)
    log = (search_run / "metrics.jsonl").read_text().splitlines()
    training = dict(method="search_distill", iteration=4, frames=json.loads(log[-1])["frames"])
    assert scores["rows"][0]["training"] == training | dict(config=checkpoint.config.model_dump(mode="json"))
    key = evaluate.evaluation_keys(1_000_000, 8)[3]
    policy = search_distill.make_greedy_policy(checkpoint.network, checkpoint.config)
    states = evaluate.make_state_player(checkpoint, policy)(checkpoint.params, key)
    assert evaluate.utilisation(states[-1]) == pytest.approx(scores["rows"][0]["returns"][3], abs=1e-5)
    assert [int(state.items_placed.sum()) for state in states] == list(range(len(states)))


def test_a_loaded_checkpoint_applies_acts_and_plays(search_run, ppo_run, played, apply):
    observations = jax.tree.map(lambda x: x[:5, 2], played[1])
    for run_dir, method in ((search_run, "search_distill"), (ppo_run, "ppo")):
        checkpoint = evaluate.load_checkpoint(str(run_dir))
        assert (checkpoint.method, checkpoint.iteration, checkpoint.config.rollout_batch_size) == (method, 4, 8)
        logits, value = checkpoint.apply(observations)
        expected = apply(checkpoint.params, observations)
        np.testing.assert_array_equal(logits, expected[0])
        assert value.shape == (5,) and logits.shape == (5, 800)
        actions = checkpoint.act(observations)
        assert actions.shape == (5, 2)
        assert all(observations.action_mask[i][tuple(action)] for i, action in enumerate(actions))
        states = checkpoint.play(seed=3)
        assert len(states) > 5 and not states[0].items_placed.any() and states[-1].items_placed.sum() == len(states) - 1
        animation = checkpoint.env.animate(states)
        animation._draw_was_started = True  # It is made, and not shown.


def test_a_checkpoint_is_played_by_the_code_of_its_own_script(search_run, ppo_run, tmp_path):
    """With a greedy policy in PPO's script that takes the worst action, a checkpoint of PPO plays worse, and one of
    search distillation as before."""
    for module in (evaluate, ppo, search_distill):
        shutil.copy(module.__file__, tmp_path)
    changed = tmp_path / "train_ppo_binpack.py"
    source, best = changed.read_text(), "argmax(predict(params, observation)[0])"
    worst = "argmax(jnp.where(legal_actions(observation), -predict(params, observation)[0], MASKED))"
    assert source.count(best) == 1
    changed.write_text(source.replace(best, worst))
    command = [sys.executable, "evaluate.py", search_run, ppo_run, "num_episodes=8", "json=scores.json"]
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    search, ours = (row["avg_return"] for row in rows)
    assert search == last_row(search_run)["eval/greedy/avg_return"]  # Of the same 8 instances.
    assert ours < last_row(ppo_run)["eval/greedy/avg_return"] - 0.05


def test_search_is_that_of_the_checkpoints_script_or_of_the_first_other_that_has_one(monkeypatch):
    def make_search(name: str):
        return lambda env, network, config, number: evaluate.Policy(None, lambda _: (name, config.leaf_value, number))

    def checkpoint_of(name: str, searches: bool, **keys) -> evaluate.Checkpoint:
        script = SimpleNamespace(make_greedy_policy=lambda network, config: f"greedy {name}")
        if searches:
            script.make_playing_search = make_search(name)
        config = search_distill.Config(**keys)
        return dataclasses.replace(
            evaluate.without_network(evaluate.Sizes()), config=config, script=script, params=name
        )

    a, b = checkpoint_of("a", True, value_scale=3.0, leaf_value="network"), checkpoint_of("b", True)
    none = checkpoint_of("none", False)
    config, default = evaluate.Config(num_simulations=5, tries=3), search_distill.Config()
    monkeypatch.setattr(search_distill, "make_playing_search", make_search("default"))
    for checkpoint, others, search, scale in (
        (a, [none, b, a], ("a", "network"), 3.0),
        (none, [none, b, a], ("b", default.leaf_value), default.value_scale),
        (none, [none, a, b], ("a", "network"), 3.0),
        (none, [none], ("default", default.leaf_value), default.value_scale),
    ):
        (greedy, *searches), settings = evaluate.make_attempts("search", checkpoint, others, config)
        assert greedy == (f"greedy {checkpoint.params}", checkpoint.params)
        # Four simulations come first, then five for what these leave, three times.
        assert [params for _, params in searches] == [(checkpoint.params, number) for number in (0, 0, 1, 2)]
        assert [policy.start(params) for policy, params in searches] == [(*search, n) for n in (4, 5, 5, 5)]
        assert settings["value_scale"] == scale and settings["leaf_value"] in search
    assert len(evaluate.make_attempts("search", a, [a], evaluate.Config(num_simulations=4))[0]) == 2


def test_a_script_is_needed_only_where_its_code_plays(few_at_a_time, ppo_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(evaluate.METHODS, "search_distill", "no_such_script")
    rows = run(tmp_path, ppo_run, "policy=greedy,largest_first", "num_episodes=2")["rows"]
    assert [row["policy"] for row in rows] == ["greedy", "largest_first"]
    capsys.readouterr()
    assert evaluate.main([str(ppo_run), "policy=search", "num_episodes=2"]) == 2
    expected = "error: method=search_distill: expected no_such_script.py beside evaluate.py; copy it there\n"
    assert capsys.readouterr() == ("", expected)


class Attack:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("kind", ["shell", "nested", "numpy"])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(kind, tmp_path, search_run, capsys):
    marker, path = tmp_path / "marker", tmp_path / "iter_000001.pkl"
    attack = {
        "shell": lambda: Attack(os.system, f"touch {marker}"),
        "nested": lambda: np.array([{"x": Attack(os.system, f"touch {marker}")}], dtype=object),
        "numpy": lambda: Attack(np.save, str(marker), np.zeros(1)),
    }[kind]()
    contents = pickle.loads((search_run / "iter_000004.pkl").read_bytes())
    path.write_bytes(pickle.dumps(contents | {"model": attack}))
    with pytest.raises(evaluate.UsageError, match="only numpy arrays are allowed"):
        evaluate.load_checkpoint(path)
    assert evaluate.main([str(path)]) == 2
    out, err = capsys.readouterr()
    asked = {"shell": "posix.system", "nested": "posix.system", "numpy": "numpy.save"}[kind]
    assert out == "" and err.count("\n") == 1 and str(path) in err and asked in err
    assert not list(tmp_path.glob("marker*"))
    pickle.loads(path.read_bytes())
    assert list(tmp_path.glob("marker*"))  # The attack is real: an ordinary reader runs it.


FORGED = {
    "pointers": pickle.dumps({"model": Attack(np.ndarray, (1,), np.dtype("O"), b"A" * 8)}),
    "pointers in use": pickle.dumps(Attack(np.ndarray, Attack(np.ndarray, (1,), np.dtype("O"), b"A" * 8))),
    "object": pickle.dumps(np.array([{}], dtype=object)),
    "record": pickle.dumps(np.zeros(2, [("a", "i4")])),
    "class": b"\x80\x04cnumpy\nndarray\nN}X\x01\x00\x00\x00aI1\ns\x86b.",
    "function": b"\x80\x04cnumpy._core.numeric\n_frombuffer\nN}X\x0c\x00\x00\x00__defaults__(I1\nts\x86b.",
    "doubling": b"\x80\x04]" + b"q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b".",
    "endless": b"\x80\x04]q\x00h\x00a.",
    "too short": pickle.dumps(np.zeros(4)).replace(b"K\x04\x85", b"K\x09\x85"),
}


def test_numpys_own_classes_cannot_be_misused(tmp_path):
    """Such files make an ordinary reader touch memory that is not its own, or grow without bounds: in a process of its
    own, the reader must refuse each in one line."""
    for kind, data in FORGED.items():
        (tmp_path / kind).write_bytes(data)
    code = """
import sys, numpy, evaluate
before = numpy._core.numeric._frombuffer.__defaults__
for path in sys.argv[1:]:
    try:
        evaluate.read_checkpoint(path)
    except evaluate.UsageError as error:
        print(error)
assert numpy._core.numeric._frombuffer.__defaults__ == before
"""
    command = [sys.executable, "-c", code, *(str(tmp_path / kind) for kind in FORGED)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and len(lines) == len(FORGED), run.stderr
    assert all("not a checkpoint that can be read" in line for line in lines)


def test_arrays_of_every_kind_come_back_as_they_were(tmp_path):
    kinds = [np.arange(6).reshape(2, 3).astype(dtype) for dtype in ("f4", "f8", "i4", "u1", ">f4", "c8", "?")]
    contents = {
        "a": kinds,
        "b": (np.asfortranarray(kinds[0]), np.float32(2.5), np.array(7)),
        "c": [None, True, "x", 1.5],
    }
    for protocol in (3, 4, 5):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(contents, protocol))
        found = evaluate._PlainUnpickler((tmp_path / "x.pkl").read_bytes()).load()
        for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(contents), strict=True):
            assert np.array_equal(mine, theirs) and getattr(mine, "dtype", None) == getattr(theirs, "dtype", None)


@pytest.mark.parametrize("kind", ["method", "environment", "newer", "truncated", "text", "leaves", "names", "config"])
def test_a_file_that_is_no_sound_checkpoint_is_refused_in_one_line(kind, search_run, tmp_path, capsys):
    good, path = search_run / "iter_000004.pkl", tmp_path / "bad.pkl"
    contents = pickle.loads(good.read_bytes())
    params, state = contents["model"]
    config, first = contents["config"], next(iter(params))
    data, expected = {
        "method": (contents | {"method": "dreamer"}, "expected a checkpoint of search_distill or ppo"),
        "environment": (
            contents | {"config": config | {"env_id": "Snake-v1"}},
            "env_id: expected 'BinPack-v2'",
        ),
        "newer": ({"format_version": 99, "network": {}}, "expected format_version=1, got 99"),
        "truncated": (good.read_bytes()[:-100], "not a checkpoint that can be read"),
        "text": (b"hello", "not a checkpoint that can be read"),
        "leaves": (contents | {"config": config | {"pair_units": 9}}, "do not belong together"),
        "names": (contents | {"model": ({**params, first: {"x": 1}}, state)}, "do not belong together"),
        "config": (contents | {"config": config | {"colour": "red"}}, "colour: Extra inputs are not permitted"),
    }[kind]
    path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))
    assert evaluate.main([str(path), f"json={tmp_path / 'scores.json'}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(path) in err and expected in err
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "expected a checkpoint, got none; type python evaluate.py CHECKPOINT"),
        (["nowhere.pkl"], "nowhere.pkl: expected a checkpoint file"),
        (["."], "expected a run's folder with an iter_*.pkl"),
        (["policy=random,best_of_n"], "policy=best_of_n: expected a checkpoint"),
        (["policy=wild"], "expected 'greedy', 'sample', 'search'"),
        (["polic=random"], "did you mean 'policy'"),
        (["policy="], "policy=: expected a valid tuple"),
        (["policy=random", "num_episodes=1"], "greater than or equal to 2"),
        (["policy=random", "render=a.mp4"], "ends in .gif or .png"),
        (["policy=random", "json=no/where.json"], "folder that exists"),
        (["~nobody/x.pkl"], "expected a checkpoint file"),
        (["a=" + "x" * 300], "unknown key 'a'"),
        (["policy=random", "render=a.png", "instance=2000"], "type instance=0"),
        (["policy=random", "preset=cpu"], "unknown key 'preset'"),
    ],
)
def test_a_mistake_gives_one_line_and_status_2_and_writes_nothing(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and expected in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more", [{}, {"perf/iteration_seconds": None, "eval/greedy/avg_return": 0.5}, {"eval/greedy/avg_return": "high"}]
)
def test_a_log_without_evaluations_is_refused(more, search_run, tmp_path, capsys):
    """Or one that no run has written."""
    shutil.copy(search_run / "iter_000004.pkl", tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "frames": 10, "hours": 0.1} | more) + "\n")
    assert evaluate.main([str(tmp_path), "policy=[]", f"curves={tmp_path / 'curves.png'}"]) == 2
    assert "expected evaluations after the first iteration" in capsys.readouterr().err


def test_help_lists_every_key(capsys):
    assert evaluate.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {key} " in text for key in evaluate.Config.model_fields) and "Presets" not in text
