"""The command line: what it accepts, and one clear line for what it does not."""

import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import evaluate
import train_ppo_binpack as ppo
import train_search_distill_binpack as script

ROOT = Path(__file__).parent.parent


def parse(*words):
    return evaluate.parse_command_line(list(words), script.Config, script.PRESETS)


def test_every_form_of_a_key_means_the_same():
    forms = ["num_simulations=64"], ["--num_simulations", "64"], ["--num_simulations=64"], ["--num-simulations", "64"]
    assert len({parse(*form)[0] for form in forms}) == 1
    config, preset = parse("--num_simulations", "64", "--seed", "42", "learning_rate=1e-4")
    assert (config.num_simulations, config.seed, config.learning_rate, preset) == (64, 42, 1e-4, "full")


def test_defaults_are_those_of_the_full_run():
    config, _ = parse()
    expected = dict(
        env_id="BinPack-v2", seed=0, max_num_iters=800, rollout_batch_size=1024, num_simulations=32,
        training_batch_size=4096, learning_rate=1e-3, num_transformer_layers=4, transformer_num_heads=4,
        transformer_key_size=32, transformer_mlp_units=(256, 256), discount=1.0, max_grad_norm=1.0,
        value_loss_weight=1.0, eval_interval=20, eval_batch_size=1024, save_dir="./checkpoints",
        wandb_project="jumanji-binpack",
    )  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected


def test_the_full_run_is_the_recipe_of_the_small_one_at_scale():
    scale = {"max_num_iters", "rollout_batch_size", "num_simulations", "max_num_considered_actions", "learning_rate",
             "training_batch_size", "learning_rate_decay_iters", "num_transformer_layers", "transformer_key_size",
             "transformer_mlp_units", "eval_interval", "save_interval"}  # fmt: skip
    (full, _), (small, _) = parse(), parse("preset=cpu")
    assert {key for key, value in full if value != getattr(small, key)} == scale
    assert full.leaf_value == "completion" and full.min_target_kl > 0


@pytest.mark.parametrize(
    "word, key, value",
    [
        ("transformer_mlp_units=[64,32]", "transformer_mlp_units", (64, 32)),
        ("transformer_mlp_units=(64,32)", "transformer_mlp_units", (64, 32)),
        ("transformer_mlp_units=(64,)", "transformer_mlp_units", (64,)),
        ("seed=010", "seed", 10),
        ("save_dir=123", "save_dir", "123"),
        ("overwrite=true", "overwrite", True),
        ("--overwrite", "overwrite", True),
        ("wandb_project=a=b", "wandb_project", "a=b"),
    ],
)
def test_values_mean_what_they_look_like(word, key, value):
    assert getattr(parse(word)[0], key) == value


def test_single_keys_override_the_preset_wherever_they_stand():
    for words in (["preset=cpu", "seed=3", "num_simulations=7"], ["num_simulations=7", "seed=3", "--preset", "cpu"]):
        config, preset = parse(*words)
        assert preset == "cpu" and config.num_simulations == 7 and config.seed == 3
        assert config.rollout_batch_size == parse("preset=cpu")[0].rollout_batch_size == 64


@pytest.mark.parametrize(
    "words, expected",
    [
        (["learning_rat=1"], "did you mean 'learning_rate'"),
        (["--num-simulation", "3"], "did you mean 'num_simulations'"),
        (["prest=cpu"], "did you mean 'preset'"),
        (["preset=gpu"], "expected one of full, cpu"),
        (["learning_rate=fast"], "learning_rate=fast: expected a valid number; for example learning_rate=0.001"),
        (["learning_rate=-1"], "expected greater than 0"),
        (["learning_rate=nan"], "expected a finite number"),
        (["num_simulations=true"], "not true or false"),
        (["num_simulations=2.5"], "num_simulations=2.5: expected"),
        (["num_simulations=0"], "expected greater than 0"),
        (["env_id=Snake-v1"], "expected 'BinPack-v2'"),
        (["leaf_value=oracle"], "'network' or 'completion'"),
        (["seed=1", "seed=2"], "given twice"),
        (["seed"], "expected key=value"),
        (["--seed"], "expected a value after it"),
        (["transformer_mlp_units=[]"], "transformer_mlp_units=[]"),
        (["transformer_mlp_units=${x}"], "transformer_mlp_units=${x}"),
        (["token_sizes=[[8,20],[16,12],[40,20]]"], "expected sizes that each hold the one before, none twice"),
        (["token_sizes=[[40,20],[40,20]]"], "none twice; for example token_sizes=[[8,12],"),
        (["token_sizes=[[true,20],[40,20]]"], "not true or false"),
        (["training_batch_size=30000"], "expected at most 19 x rollout_batch_size = 19456"),
        (["preset=cpu", "max_num_iters=350"], "type learning_rate_decay_iters=350"),
        (["resume=auto", "overwrite=true"], "exclude each other"),
        (["resume=a.pkl", "init_from=b.pkl"], "resume=a.pkl and init_from exclude each other"),
        (["init_from=gs://bucket/a.pkl"], "or leave init_from out"),
        (["--overwrit"], "did you mean 'overwrite'"),
        (
            ["num_processes=2"],
            "all or none of distributed=true coordinator_address=HOST:PORT num_processes=2",
        ),
        (["distributed=true", "coordinator_address=me", "num_processes=2"], "coordinator_address=HOST:PORT"),
        (["distributed=true", "coordinator_address=me:1", "num_processes=2", "process_id=2"], "below num_processes"),
        (["save_dir=" + "x" * 300], "File name too long"),
        (["resume=nowhere.pkl"], "expected a checkpoint file"),
        (["rollout_batch_size=1023"], "expected a multiple of the 4 devices; type rollout_batch_size=1024"),
        (["training_batch_size=1001"], "expected a multiple of the 4 devices; type training_batch_size=1000"),
    ],
)
def test_a_mistake_gives_one_line_and_status_2_and_writes_nothing(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert script.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_key_with_default_and_meaning_and_the_presets(capsys):
    assert script.main(["--help"]) == 0
    text = capsys.readouterr().out
    for key, field in script.Config.model_fields.items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [key])
        assert field.description in line and (evaluate.as_typed(field.default) or "''") in line
    assert list(script.PRESETS) == list(ppo.PRESETS) == ["full", "cpu", "cpu_50"]
    assert len(script.PRESETS["cpu"].split()) > 10
    for name, words in script.PRESETS.items():
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
        assert line.split()[1:] == (words or "the defaults above").split()


def test_what_help_and_errors_show_can_be_typed_back():
    for key, field in script.Config.model_fields.items():
        config, _ = parse(f"{key}={evaluate.as_typed(field.default)}")
        assert config == script.Config()


@pytest.mark.parametrize("module", ["train_search_distill_binpack", "train_ppo_binpack", "evaluate"])
def test_import_does_nothing(module, tmp_path):
    code = (
        f"import sys; sys.argv = ['x', '--help', 'seed=banana']; import {module};"
        "import jax._src.xla_bridge as bridge; assert not bridge._backends, bridge._backends"
    )
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert time.perf_counter() - start < 5.0
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
