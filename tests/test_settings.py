"""Settings from wherever they come: what is converted, what is refused, and that config.yaml can hold the result."""

import dataclasses
import datetime
import enum
import inspect
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import esfast
from esfast import cli
from esfast.cli.run_options import FIELDS, SETTINGS, RunOptions, read_yaml
from esfast.trainer.config import ESConfig
from esfast.update.optimizers import OPTIMIZERS
from esfast.utils.settings import options_of


class Schedule(enum.Enum):
    COSINE = "cosine"


# (field, value, what it becomes)
CONVERTED = [
    *[
        ("sigma", value, 0.5)
        for value in (
            "0.5",
            "5e-1",
            " 5E-1 ",
            np.float32(0.5),
            np.array(0.5),
            torch.tensor(0.5),
            torch.tensor(0.5, dtype=torch.bfloat16),
            Decimal("0.5"),
        )
    ],
    *[("sigma", value, 2.0) for value in (2, "2", np.int64(2), torch.tensor(2), 2.0)],
    *[
        ("generations", value, 30)
        for value in (30.0, "30", "3e1", "30.0", np.int32(30), np.float64(30), torch.tensor(30))
    ],
    ("seed", str(2**63 + 1), 2**63 + 1),
    ("seed", np.uint64(2**63 + 1), 2**63 + 1),
    *[
        ("mirrored", value, True)
        for value in (True, "true", "True", "yes", "on", 1, "1", np.bool_(True), torch.tensor(True))
    ],
    *[("mirrored", value, False) for value in (False, "false", "False", "no", "off", 0, "0", np.bool_(False))],
    ("output_dir", Path("a/b"), "a/b"),
    ("output_dir", np.str_("a"), "a"),
    ("output_dir", 2024, "2024"),
    *[("include", value, ["*a*", "b"]) for value in (("*a*", "b"), ["*a*", "b"], np.array(["*a*", "b"]), {"*a*", "b"})],
    ("include", "*a*", ["*a*"]),
    ("include", None, None),
    ("exclude", Path("x"), ["x"]),
    ("batch_size", None, None),
    ("batch_size", "None", None),
    ("batch_size", "null", None),
    ("batch_size", 4.0, 4),
    *[
        ("reward_weights", value, [1.0, 2.0])
        for value in ((1, 2), ["1", "2.0"], np.array([1, 2]), torch.tensor([1.0, 2.0]))
    ],
    ("reward_weights", 2, [2.0]),
    ("groups", esfast.Group("*a*", lr=0.1), ["*a*:sigma=1.0,lr=0.1"]),
    ("groups", "*a*:lr=0.1", ["*a*:lr=0.1"]),
    ("groups", (esfast.Group("a:b", np.float64(2)), "*c*:sigma=3"), ["a:b:sigma=2.0,lr=1.0", "*c*:sigma=3"]),
    ("groups", [], None),
    ("report_to", "tensorboard", ["tensorboard"]),
    ("report_to", ("tensorboard",), ["tensorboard"]),
    *[("report_to", value, None) for value in ("none", ["none"], None, [], "None")],
    ("lr_schedule", Schedule.COSINE, "cosine"),
    ("chat_template_kwargs", {"a": {"b": (np.int64(1), Path("x"))}}, {"a": {"b": [1, "x"]}}),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"), CONVERTED, ids=lambda v: "set" if isinstance(v, set) else repr(v)[:40]
)
def test_converted(name, value, expected):
    config = ESConfig(**{name: value})
    found = getattr(config, name)
    assert type(found) is type(expected) and (
        sorted(found) == sorted(expected) if isinstance(value, set) else found == expected
    )
    written = yaml.safe_dump(dataclasses.asdict(config))
    assert ESConfig(**yaml.safe_load(written)) == config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("generations", 30.5, "expected an int, got float 30.5"),
        ("generations", "many", "expected an int, got str 'many'"),
        ("generations", True, "expected an int, got bool True"),
        ("generations", None, "expected an int, got NoneType None"),
        ("generations", float("inf"), "expected an int, got float inf"),
        ("generations", [3], "expected an int, got list [3]"),
        ("generations", np.array([3, 4]), "expected an int, got list [3, 4]"),
        ("sigma", True, "expected a number, got bool True"),
        ("sigma", "small", "expected a number, got str 'small'"),
        ("sigma", None, "expected a number, got NoneType None"),
        ("sigma", 1j, "expected a number, got complex 1j"),
        ("sigma", 10**400, "expected a number, got int 1000"),
        ("sigma", "nan", "expected a positive finite number, got nan"),
        ("lr", "inf", "expected a positive finite number, got inf"),
        ("lr", 0, "expected a positive finite number, got 0.0"),
        ("weight_decay", -0.1, "expected a finite number of at least 0, got -0.1"),
        ("weight_decay", float("nan"), "expected a finite number of at least 0, got nan"),
        ("temperature", float("inf"), "expected a finite number of at least 0, got inf"),
        ("mirrored", "maybe", "expected true or false, got str 'maybe'"),
        ("mirrored", 2, "expected true or false, got int 2"),
        ("resume", "runs/a", "expected true or false, got str 'runs/a'"),
        ("progress", None, "expected true or false, got NoneType None"),
        ("output_dir", None, "expected a text, got NoneType None"),
        ("output_dir", True, "expected a text, got bool True"),
        ("output_dir", "", "expected the name of a folder, got ''"),
        ("output_dir", " ", "expected the name of a folder, got ' '"),
        ("output_dir", "a\0b", "expected the name of a folder, got 'a\\x00b'"),
        ("include", {"*a*": 1}, "expected a list, got {'*a*': 1}"),
        ("include", [1.5], "expected a text, got float 1.5"),
        ("reward_weights", ["big"], "expected a number, got str 'big'"),
        ("reward_weights", [float("nan")], "expected a finite number"),
        ("reward_timeout", float("inf"), "expected seconds, more than 0 and at most 1e+08, got inf"),
        ("groups", {"*a*": {"lr": 1}}, "expected PATTERN:sigma=X,lr=Y"),
        ("groups", 3, "expected PATTERN:sigma=X,lr=Y"),
        ("chat_template_kwargs", {"a": [len]}, "'a' is a list, [<built-in function len>]; expected what JSON has"),
        ("chat_template_kwargs", {"day": datetime.date(2024, 7, 26)}, "'day' is a date"),
        ("seed", 2**64, "expected 0 <="),
        ("noise", "cauchy", "expected one of 'gaussian', 'rademacher', 'low_rank', got 'cauchy'"),
        ("noise", None, "expected one of 'gaussian', 'rademacher', 'low_rank', got None"),
        ("weights", "copy", "expected one of 'base', 'master', 'host', 'inplace', 'auto', got 'copy'"),
        ("shaping", "rank", "expected one of 'zscore', 'centered_rank', got 'rank'"),
        ("shaping", len, "expected one of 'zscore', 'centered_rank', got <built-in"),
        ("decoding", "fast", "expected one of 'auto', 'plain', 'static', 'continuous', got 'fast'"),
        ("rounding", "up", "expected one of 'nearest', 'stochastic', got 'up'"),
        ("perturb_rounding", "up", "expected one of 'nearest', 'stochastic', got 'up'"),
        ("optimizer", "adamw", "expected one of 'sgd', 'momentum', 'adam', got 'adamw'"),
        ("decay_to", "base", "expected one of 'zero', 'initial', got 'base'"),
        ("on_reward_error", "ignore", "expected one of 'stop', 'skip', got 'ignore'"),
        ("report_to", "mlflow", "expected one of 'tensorboard', 'wandb', 'none', got 'mlflow'"),
    ],
)
def test_refused_by_name_before_a_model_is_loaded(name, value, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        ESConfig(**{name: value})
    assert message in str(caught.value) and name.removesuffix("s") in str(caught.value).split(":")[0]


def test_what_es_would_refuse_later_is_refused_by_the_settings():
    with pytest.raises(ValueError, match="mirrored sampling needs an even number, got 7"):
        ESConfig(mirrored=True, population_size=7)
    with pytest.raises(
        ValueError, match="4 equal responses to a prompt at temperature 0; leave it at 1, or set a temp"
    ):
        ESConfig(num_generations=4)


def test_an_optimizer_with_its_numbers():
    config = ESConfig(optimizer=esfast.Adam(beta1=0.8, eps=1e-6))
    assert (config.optimizer, config.adam_beta1, config.adam_beta2, config.adam_eps) == ("adam", 0.8, 0.999, 1e-6)
    assert config.make_optimizer() == esfast.Adam(beta1=0.8, eps=1e-6)
    assert ESConfig(optimizer=esfast.Momentum(window=3)).make_optimizer() == esfast.Momentum(window=3)


def test_what_was_changed_since_is_checked_again():
    config = ESConfig()
    config.sigma, config.generations = "1e-2", np.int64(3)
    config.check()
    assert (config.sigma, config.generations, type(config.generations)) == (0.01, 3, int)
    config.noise = "cauchy"
    with pytest.raises(ValueError, match="ESConfig.noise"):
        config.check()


def test_yaml_as_people_write_it(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        "sigma: 1e-3\nlr: 5e-4\ntemperature: 0\nmirrored: 'false'\nlearning_rate: null\nmax_steps: 3e1\n"
        "batch_size: None\nlogging_steps: 1\n2: 3\n".replace("learning_rate: null\n", "").replace("2: 3\n", "")
    )
    assert cli.main(["train", "--config", str(path), "--print-config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert (settings["sigma"], settings["lr"], settings["mirrored"], settings["generations"]) == (1e-3, 5e-4, False, 30)
    path.write_text("2: 3\n")
    with pytest.raises(ValueError, match="run.yaml: unknown setting '2'"):
        read_yaml(path)


def test_a_number_on_the_command_line_as_people_write_it(capsys):
    assert cli.main(["train", "--generations", "1e2", "--sigma", "1e-2", "--report-to", "none", "--print-config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["generations"] == 100 and settings["sigma"] == 0.01 and settings["report_to"] is None


@pytest.mark.parametrize("given", ["auto", " Auto ", "AUTO"])
def test_a_word_in_the_place_of_a_number(given, capsys):
    config = ESConfig(sigma=given, lr=given)
    assert config.sigma == config.lr == "auto" and config.open_questions() == ["sigma", "lr", "groups"]
    assert ESConfig(learning_rate=given).lr == "auto"
    assert cli.main(["train", "--sigma", given, "--lr", "1e-3", "--print-config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert (settings["sigma"], settings["lr"]) == ("auto", 0.001)


def test_another_word_is_refused(capsys):
    with pytest.raises(TypeError, match="ESConfig.sigma: expected a number, got str 'large', or 'auto'"):
        ESConfig(sigma="large")
    with pytest.raises(SystemExit):
        cli.main(["train", "--lr", "large"])
    assert "invalid float or auto value: 'large'" in capsys.readouterr().err
    with pytest.raises(TypeError):
        ESConfig(weight_decay="auto")


def test_run_options_are_converted_too():
    options = RunOptions(model=Path("a/b"), train_prompts=np.int64(3), reward="m:f", num_engines=2.0)
    assert (options.model, options.train_prompts, options.reward, options.num_engines) == ("a/b", 3, ["m:f"], 2)
    with pytest.raises(ValueError, match="engine: expected one of"):
        RunOptions(engine="sglang")
    with pytest.raises(ValueError, match="train_prompts: expected 1 <="):
        RunOptions(train_prompts=0)


def test_every_setting_is_of_a_type_that_is_converted():
    for name, field in FIELDS.items():
        inner = (
            field.type.removesuffix(" | None")
            .removesuffix(" | Literal['auto']")
            .removeprefix("list[")
            .removesuffix("]")
        )
        assert inner in ("int", "float", "bool", "str", "dict") and "choices" in field.metadata, name


def test_es_takes_names_after_lr_and_the_trainer_gives_it_all_that_it_knows():
    parameters = inspect.signature(esfast.ES).parameters
    by_place = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_place == ["model", "sigma", "lr"]
    with pytest.raises(TypeError, match="positional argument"):
        esfast.ES([("a", torch.zeros(3))], 1e-3, 1e-3, 30)
    known = {f.name for f in dataclasses.fields(ESConfig)} & parameters.keys()
    # whether a process goes on depends on the team, too
    assert ESConfig().es_settings().keys() == known - {"resume"}


def test_defaults_of_an_optimizer_are_the_optimizers():
    for name, kind in OPTIMIZERS.items():
        assert ESConfig(optimizer=name).make_optimizer() == kind()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adam_beta1": 1.5}, "ESConfig.adam_beta1: expected a number between 0 and 1, got 1.5"),
        ({"optimizer": "momentum", "momentum_window": 1}, "ESConfig.momentum_window: expected 2 <="),
        ({"groups": ["*a*:lrr=2"]}, "ESConfig.groups: group: unknown factor 'lrr'. Did you mean 'lr'?"),
        ({"lr": 0.5, "weight_decay": 4}, "ESConfig.weight_decay: 4.0 times lr 0.5 is more than all of the weights"),
        ({"noise": "gausian"}, "got 'gausian'. Did you mean 'gaussian'?"),
        ({"report_to": ["wandbb"]}, "got ['wandbb']. Did you mean 'wandb'?"),
    ],
)
def test_refused_by_the_fields_own_name(settings, message):
    with pytest.raises(esfast.EsfastError) as caught:
        ESConfig(**settings)
    assert message in str(caught.value)


# of every type of field: a value that it can't take, whatever the field is called
WRONG = {int: 1.5, float: "much", bool: "maybe", str: {"a": 1}, dict: [1]}
EVERY = {name: kind for owner in SETTINGS for name, (_, kind) in options_of(owner).items()}


@pytest.mark.parametrize("name", EVERY)
def test_a_wrong_value_of_any_field_is_refused_before_a_model_is_loaded(name, tmp_path, monkeypatch, capsys):
    kind = EVERY[name]
    wrong = {"a": 1} if kind.is_list else WRONG[kind.item]
    (owner,) = (o for o in SETTINGS if name in options_of(o))
    with pytest.raises(esfast.EsfastError, match=rf"\A{owner.__name__}\.{name}: (group: )?expected "):
        owner(**{name: wrong})
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump({name: wrong}))
    assert cli.main(["train", "--config", "run.yaml"]) == 1
    flag = "--out" if name == "output_dir" else "--" + name.replace("_", "-")
    assert f"esfast: error: {flag}: expected " in capsys.readouterr().err
    Path("run.yaml").write_text(yaml.safe_dump({name[:-1] + "qq": 1}))
    assert cli.main(["train", "--config", "run.yaml"]) == 1
    assert f"unknown setting '{name[:-1]}qq'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", f"{flag[:-1]}q", "1"])
    assert f"unrecognized arguments: {flag[:-1]}q 1. Did you mean '--" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_a_text_for_a_truth_is_no_wish_to_resume(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("resume: 'false'\noutput_dir: run\nmodel: ''\n")
    assert cli.main(["train", "--config", "run.yaml"]) == 1
    assert "esfast: error: --model: expected a name, got an empty text" in capsys.readouterr().err
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text('{"generation": 0}\n{"generation": 1}\n')
    Path("run.yaml").write_text("resume: 'false'\noutput_dir: run\nmodel: none here\ntask: countdown\nstyle: paper\n")
    assert cli.main(["train", "--config", "run.yaml"]) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_what_the_trainer_would_refuse_is_refused_before_a_model_is_loaded(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    wanted = ["train", "--model", "none here", "--task", "countdown", "--style", "paper", "--device", "cpu"]
    assert cli.main([*wanted, "--reward-weights", "1", "2", "3"]) == 1
    assert "--reward-weights: expected one for each of the " in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main([*wanted, "--report-to", "wandb"]) == 1
    assert "--report-to: wandb is not installed: pip install wandb" in capsys.readouterr().err


class Odd(ESConfig):
    """A subclass as in somebody's script, with an annotation that can't be resolved."""

    mine: "Nowhere" = None  # noqa: F821


def test_fields_of_a_subclass_may_be_of_any_type():
    assert dataclasses.dataclass(Odd)(sigma="0.5", mine=object()).sigma == 0.5
