"""sigma="auto" and lr="auto": a run goes on with what was found as with numbers."""

import contextlib
import json
import shlex

import pytest
import torch
import yaml

from esfast import ESConfig, ESTrainer, cli, tasks
from esfast.es.es import member_seed
from esfast.journal import journal
from esfast.tasks import embedded

TOKENIZER = embedded.make_tokenizer()
ROWS = [{"prompt": f"{i}="} for i in range(24)]


def words(prompts, completions, **columns):
    """A reward with a slope everywhere: how near letters are to the middle of the alphabet."""
    return [sum(-abs(ord(c) - 96) for c in text) / 500 for text in completions]


SETTINGS = {"generations": 400, "population_size": 8, "sigma": "auto", "lr": "auto", "prompts_per_generation": 8}
SETTINGS |= {"max_completion_length": 4, "eval_every": 0, "progress": False}


def make(folder, net=None, reward=words, team=None, **settings):
    torch.manual_seed(0)
    net = net if net is not None else embedded.make_model(TOKENIZER).eval()
    config = ESConfig(**{**SETTINGS, "output_dir": str(folder), **settings})
    return ESTrainer(net, reward, config, ROWS, None, TOKENIZER, team=team)


def stop_after(trainer, generations):
    """Trains so many generations, and fails then, as a run that is cut short."""
    step = trainer.es.step

    def limited(**options):
        if trainer.es.generation == generations:
            raise InterruptedError("cut short")
        return step(**options)

    trainer.es.step = limited
    with pytest.raises(InterruptedError):
        trainer.train()
    return trainer.folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weights": "master", "mirrored": True, "noise": "rademacher"},
        {"weights": "host", "noise": "low_rank", "members_at_once": "1"},
        {"groups": ["*embed*:sigma=0.5,lr=0.5"], "optimizer": "momentum", "shaping": "centered_rank"},
        {"temperature": 1.0, "num_generations": 2, "optimizer": "adam"},
    ],
    ids=["float32", "master", "host low-rank", "groups", "sampled adam"],
)
def test_a_search_leaves_the_weights_as_they_were_to_the_bit(tmp_path, settings, same_bits):
    dtype = torch.bfloat16 if settings.get("weights") == "master" else torch.float32
    torch.manual_seed(0)
    net = embedded.make_model(TOKENIZER).eval().to(dtype)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainer = make(tmp_path / "run", net, **settings)
    print_of = trainer.es.store.fingerprint()
    found = trainer.tune()
    assert all(same_bits(before[name], p.detach()) for name, p in net.named_parameters())
    assert trainer.es.store.fingerprint() == print_of and trainer.es.generation == 0 and trainer.es.members == []
    assert found.responses <= 0.05 * found.run and set(found.settings) == {"sigma", "lr"}
    assert all(isinstance(v, float) and v > 0 for v in found.settings.values())
    assert json.loads((tmp_path / "run" / "tuning.json").read_text())["settings"] == found.settings


def test_a_run_with_auto_is_the_run_with_the_numbers(tmp_path, caplog):
    """Journal, config.yaml and weights hold plain numbers; the same seed finds the same; a resume searches no more."""
    first = stop_after(make(tmp_path / "auto"), 3)
    config = yaml.safe_load(first.config.read_text())
    sigma, lr = config["sigma"], config["lr"]
    assert isinstance(sigma, float) and isinstance(lr, float)
    groups = config["groups"]
    assert (
        len(groups) > 5
        and groups == json.loads(first.tuning.read_text())["groups"]
        and all(text.partition(":")[1] for text in groups)
    )
    plain = stop_after(make(tmp_path / "plain", sigma=sigma, lr=lr, groups=groups), 3)
    assert journal.read(plain.journal).records == journal.read(first.journal).records
    assert all((r.sigma, r.lr) == (sigma, lr) for r in journal.read(first.journal).records)
    # a resume, with "auto" and with the numbers
    for folder, numbers in ((first.path, {}), (plain.path, {"sigma": sigma, "lr": lr, "groups": groups})):
        caplog.clear()
        trainer = make(folder, resume=True, **numbers)
        assert (trainer.args.sigma, trainer.args.lr) == (sigma, lr)
        stop_after(trainer, 5)
        assert not any("found sigma" in r.getMessage() for r in caplog.records)
    assert journal.read(plain.journal).records == journal.read(first.journal).records
    with pytest.raises(ValueError, match="the run has sigma"):
        make(first.path, resume=True, sigma=2 * sigma)


def test_the_users_settings_stay_as_they_are(tmp_path):
    settings = ESConfig(**SETTINGS, output_dir=str(tmp_path / "run"))
    trainer = ESTrainer(embedded.make_model(TOKENIZER).eval(), words, settings, ROWS, None, TOKENIZER)
    trainer.tune()
    assert isinstance(trainer.args.sigma, float) and settings.sigma == "auto"


@pytest.mark.parametrize("given", [{"sigma": 0.01}, {"lr": 0.003}])
def test_what_is_given_is_not_searched_for(tmp_path, given):
    trainer = make(tmp_path / "run", **given)
    found = trainer.tune()
    (name,) = {"sigma", "lr"} - set(given)
    assert set(found.settings) == {name} and {n: getattr(trainer.args, n) for n in given} == given
    # A sigma of one's own is one for all weights.
    assert bool(trainer.args.groups) == (name == "sigma")
    # What is said about a number is about the one of the run.
    assert found.why[0].startswith("sigma: 0.01 is given; the search would take ") == ("sigma" in given)
    assert any(line.startswith("lr: ") for line in found.why) == (name == "lr")


def test_groups_are_said_with_the_span_of_their_factors(tmp_path):
    said = make(tmp_path / "run", groups=["*:sigma=1"], generations=1).tune().why[-1]
    assert said == "groups: 1, whose weights have 1 times the run's sigma"
    said = make(tmp_path / "two", groups=["*norm*:sigma=0,lr=0", "*embed*:sigma=0.5"], generations=1).tune().why[-1]
    assert said == "groups: 2, whose weights have 0 to 0.5 times the run's sigma"


def test_the_search_has_seeds_of_its_own(tmp_path):
    trainer, seen = make(tmp_path / "run"), set()
    trial = trainer.es.trial

    def watched(members, sigma):
        seen.update(m.seed for m in members)
        return trial(members, sigma)

    trainer.es.trial = watched
    trainer.tune()
    assert seen and not seen & {member_seed(0, g, i) for g in range(400) for i in range(8)}


def test_nothing_to_learn_from(tmp_path, caplog):
    trainer = make(tmp_path / "run", reward=lambda prompts, **columns: [0.0] * len(prompts), generations=400)
    found = trainer.tune()
    assert not found.learns and "there is nothing to learn from: sigma is a guess" in found.why[0]
    assert found.responses <= 5 * 24 and found.settings["sigma"] == pytest.approx(found.scale / 10, rel=0.05)


def test_a_reward_function_that_fails(tmp_path):
    def fails(prompts, completions, **columns):
        raise ZeroDivisionError("mine")

    with pytest.raises(ValueError, match="mine"):
        make(tmp_path / "run", reward=fails).train()
    with pytest.raises(ValueError, match="gives no text that a reward function judges.*give sigma and lr as numbers"):
        make(tmp_path / "skips", reward=fails, on_reward_error="skip").train()


@pytest.mark.parametrize("method", ["train", "tune"])
@pytest.mark.parametrize("at", ["asking", "trying a step"])
def test_a_search_that_was_interrupted_begins_again(tmp_path, at, method, same_bits, caplog):
    """Whatever it was doing, the weights are as they were, and there is no run yet."""
    trainer = make(tmp_path / "run")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    generate, asked = trainer.engine.generate, []

    def interrupted(*args):
        asked.append(1)
        raise KeyboardInterrupt

    if at == "asking":
        trainer.scoring.scorer.submit = interrupted
    else:
        trainer.engine.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        getattr(trainer, method)()
    assert asked and same_bits(before, [p.detach() for p in trainer.model.parameters()])
    assert trainer.es.generation == 0 and not trainer.folder.tuning.exists() and not trainer.folder.config.exists()
    assert method == "tune" or any("nothing is lost, start it again" in r.getMessage() for r in caplog.records)
    trainer.engine.generate = generate
    del trainer
    # with and without resume
    assert make(tmp_path / "run", resume=True).args.sigma == "auto"
    assert make(tmp_path / "run").args.sigma == "auto"


def test_an_untrained_model_ends_the_search_at_once(tmp_path, caplog):
    """It never gets a reward, and the log warns of it."""
    task = tasks.get("countdown", style="compact")
    torch.manual_seed(0)
    net = embedded.make_model(TOKENIZER).eval().to(torch.bfloat16)
    config = ESConfig(**{**SETTINGS, "output_dir": str(tmp_path / "run"), "generations": 10**6})
    rows = task.train_dataset(0)
    trainer = ESTrainer(net, list(task.reward_funcs), config, rows, None, TOKENIZER)
    found = json.loads(stop_after(trainer, 0).tuning.read_text())
    assert found["responses"] == 5 * 64 and not found["learns"]
    (said,) = [r for r in caplog.records if "nothing to learn from" in r.getMessage()]
    assert said.levelname == "WARNING"


def test_a_short_run_is_searched_with_fewer_prompts(tmp_path):
    """Rather than with too few members."""
    found = make(tmp_path / "run", generations=100).tune()
    assert found.rows and found.responses <= 0.05 * found.run and found.responses % 8 == 0


def test_a_trial_step_whose_rewards_fail(tmp_path):
    """Members are left out with "skip"; a step that is tried is then one that breaks the model."""
    sometimes = Sometimes()
    trainer = make(tmp_path / "run", reward=sometimes, on_reward_error="skip")
    stepped = trainer.es.stepped

    @contextlib.contextmanager
    def watched(terms):
        with stepped(terms):
            sometimes.fails = True
            yield

    trainer.es.stepped = watched
    found = trainer.tune()
    assert [why for why in found.why if "100% lost" in why] and found.settings["lr"] > 0


class Sometimes:
    """`words`, which fails once after `fails` was set."""

    fails = False
    __name__ = "sometimes"

    def __call__(self, prompts, completions, **columns):
        if self.fails:
            self.fails = False
            raise ZeroDivisionError("mine")
        return words(prompts, completions)


def test_weight_decay_bounds_lr(tmp_path):
    found = make(tmp_path / "run", weight_decay=1e5).tune()
    assert found.settings["lr"] <= 1e-5


def test_numbers_leave_nothing_to_find(tmp_path):
    with pytest.raises(ValueError, match="nothing is to be found, since sigma is 0.01 and lr 0.02"):
        make(tmp_path / "run", sigma=0.01, lr=0.02).tune()


def test_a_trainer_trains_after_it_has_tuned(tmp_path):
    trainer = make(tmp_path / "run")
    found = trainer.tune()
    with pytest.raises(ValueError, match="nothing is to be found"):
        trainer.tune()
    folder = stop_after(trainer, 2)
    assert [r.sigma for r in journal.read(folder.journal).records] == [found.settings["sigma"]] * 2


def test_what_an_earlier_start_found_does_not_stay(tmp_path):
    trainer = make(tmp_path / "run")
    trainer.tune()
    del trainer
    folder = stop_after(make(tmp_path / "run", sigma=0.01, lr=0.01), 1)
    assert not folder.tuning.exists()


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_evidence_and_the_command(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    folder = tmp_path / "model"
    embedded.make_model(TOKENIZER).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "my_words.py").write_text(
        "def words(prompts, completions, **columns):\n"
        "    return [sum(-abs(ord(c) - 96) for c in text) / 500 for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(folder), "--task", "file:rows.jsonl", "--reward", "my_words:words"]
    options += ["--generations", "400", "--population-size", "8", "--prompts-per-generation", "8"]
    options += ["--max-completion-length", "4", "--reward-workers", "0", "--no-progress"]
    assert cli.main(["tune", *options]) == 0
    out = capsys.readouterr().out
    assert "signal" in out and "to train with it:" in out
    command = shlex.split(out.strip().splitlines()[-1])
    assert command[:2] == ["esfast", "train"] and "--sigma" in command and "--no-progress" in command
    # what is found goes with the groups
    assert command[command.index("--groups") + 1] == "auto"
    # and nothing was left behind
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == [
        "model",
        "my_words.py",
        "rows.jsonl",
    ]
    cli.parser.parser_of_all().parse_args(command[1:])
    assert cli.main(["tune", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert float(command[command.index("--sigma") + 1]) == found["settings"]["sigma"]
    # a number that is given stays; those of a run's config.yaml are what is to be replaced
    config = {"sigma": 7.0, "lr": 7.0, "output_dir": "runs/x", "resume": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["tune", *options, "--config", "config.yaml", "--sigma", "0.01"]) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert command[command.index("--sigma") + 1] == "0.01" and float(command[command.index("--lr") + 1]) < 1
    assert "--groups" not in command
    assert cli.main(["tune", *options, "--groups", "*:sigma=1"]) == 0
    command = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert command.count("--groups") == 1 and command[command.index("--groups") + 1] == "*:sigma=1"
    assert cli.main(["tune", *options, "--out", "runs/x"]) == 1
    assert cli.main(["tune", *options, "--sigma", "0.01", "--lr", "0.1"]) == 1
    assert "nothing to find" in capsys.readouterr().err
    assert cli.main(["tune", *options, "--num-engines", "2"]) == 1
    assert not (tmp_path / "runs").exists()
