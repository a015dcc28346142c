"""sigma="auto" and lr="auto": what the search decides on landscapes that are known, and that a run goes on as with
numbers."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
import yaml

import esfast
from esfast import ESConfig, ESTrainer, cli, tasks
from esfast.es.es import member_seed
from esfast.journal import journal
from esfast.tasks import embedded
from esfast.trainer import scales
from esfast.trainer.search import Look, search

TOKENIZER = embedded.make_tokenizer()
ROWS = [{"prompt": f"{i}="} for i in range(24)]
SCALE, PROMPTS = 0.08, 64


# ---- the search, on landscapes whose optimum is known ----------------------------------------------------------------


class Landscape:
    """Members of sigma s keep exp(-(s / broken)^2) of what the model gets. A pair differs by slope * s along its
    direction, on every prompt alike, beside noise of the prompts."""

    def __init__(self, broken=0.02, slope=3.0, base=0.4, noise=0.3, floor=0.0, dead_from=math.inf, seed=0):
        self.broken, self.slope, self.noise, self.floor, self.dead_from = broken, slope, noise, floor, dead_from
        random = np.random.default_rng(seed)
        self.directions = random.standard_normal(64)
        self.of_prompts = random.standard_normal((64, 2, PROMPTS))
        self.base = np.full(PROMPTS, base) + noise * random.standard_normal(PROMPTS)
        self.asked = 1

    def __call__(self, sigma, pairs):
        self.asked += 2 * pairs
        kept = math.exp(-((sigma / self.broken) ** 2))
        d = self.slope * sigma * kept * self.directions[:pairs, None, None] * np.array([1, -1])[:, None]
        same = min(1.0, sigma / 0.01)
        rewards = self.floor + kept * (self.base - self.floor + same * self.noise * self.of_prompts[:pairs]) + d
        if sigma > self.dead_from:
            rewards[0, 0] = math.nan
        return Look(sigma, self.base, rewards)


@pytest.mark.parametrize("broken", [0.0005, 0.002, 0.008, 0.03])
@pytest.mark.parametrize("offset", [0.0, -20.0, 1000.0])
def test_sigma_is_where_members_are_not_yet_broken_whatever_the_scale_of_rewards(broken, offset):
    found = search(Landscape(broken, slope=2 / broken, base=offset + 0.4, floor=offset), SCALE, 150)
    # half is lost at 0.83 broken, a tenth at 0.32
    assert broken / 8 < found.sigma <= 0.9 * broken and broken / 8 < found.tolerated < 0.7 * broken and found.learns


def test_the_noise_that_the_weights_tolerate_does_not_depend_on_the_unit_of_rewards():
    one, other = (search(Landscape(0.01, base=0.4 * u, noise=0.3 * u, slope=3 * u), SCALE, 150) for u in (1, 1e3))
    assert other.sigma == one.sigma and other.tolerated == pytest.approx(one.tolerated)


def test_weights_whose_scale_says_little():
    """As those of LoRA, half of which are zeros: members at their RMS are whole."""
    found = search(Landscape(broken=0.6, slope=3.0), SCALE, 300)
    assert 0.05 < found.sigma < 0.6 and found.losses[-1] == 1.0


@pytest.mark.parametrize("members", [30, 60, 150, 750])
def test_no_more_members_than_allowed(members):
    asked = Landscape()
    search(asked, SCALE, members)
    assert asked.asked <= members


def test_too_few_members_to_search():
    asked = Landscape()
    found = search(asked, SCALE, 10)
    assert asked.asked == 1 and found.sigma == SCALE / 10 and not found.learns and "too few" in found.why


def test_members_that_give_no_text_are_broken():
    found = search(Landscape(broken=10, dead_from=0.011, slope=30), SCALE, 150)
    assert found.sigma <= 0.011 and found.learns


def test_rewards_that_are_all_the_same():
    asked = Landscape(base=0.0, noise=0.0, slope=0.0)
    found = search(asked, SCALE, 1000)
    assert not found.learns and "nothing to learn from" in found.why and asked.asked <= 5


def test_a_signal_that_chance_explains_is_none():
    """Of noise alone half of the estimates are above zero, and one of four nearly always is."""
    random = np.random.default_rng(3)
    base, said = np.full(PROMPTS, 0.5), []
    for _ in range(20):

        def ask(sigma, pairs):
            kept = math.exp(-((sigma / 0.02) ** 2))
            return Look(sigma, base, kept * (base + 0.3 * random.standard_normal((pairs, 2, PROMPTS))))

        said.append(search(ask, SCALE, 150).why.startswith("no signal"))
    assert sum(said) >= 8


def test_no_signal_is_said():
    found = search(Landscape(broken=0.02, slope=0.0, noise=0.0), SCALE, 150)
    assert found.why.startswith("no signal") and found.sigma < 0.02


def test_a_model_that_is_no_better_than_noise_has_nothing_to_lose():
    found = search(Landscape(broken=1e9, slope=4.0, noise=0.05), SCALE, 150)
    assert found.sigma >= 0.02 and found.losses == (0.0,) * len(found.losses)


@pytest.mark.parametrize("rare", [False, True], ids=["noise", "rare success"])
def test_a_model_of_which_nothing_can_be_told_gets_a_guess(rare):
    """Neither does it get more than noise does, nor do members differ by more than chance: the largest sigma would
    break it for nothing."""
    found = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        base = np.eye(1, PROMPTS)[0] if rare else random.standard_normal(PROMPTS)

        def ask(sigma, pairs, base=base, random=random):
            rewards = random.standard_normal((pairs, 2, PROMPTS))
            return Look(sigma, base, (rewards > 2.15).astype(float) if rare else rewards)

        found.append(search(ask, SCALE, 150))
    guesses = [each for each in found if "guess" in each.why]
    assert len(guesses) >= 14 and not any(each.learns for each in guesses)
    assert all(each.sigma == each.tolerated == SCALE / 10 for each in guesses)


def test_a_model_that_gains_by_noise_is_not_searched_beyond_its_weights():
    """As one whose reward pays for short text, which noise makes shorter up to the RMS, and longer beyond."""
    landscape = Landscape(broken=1e9, slope=0.0, noise=0.1)

    def ask(sigma, pairs):
        look = landscape(sigma, pairs)
        better = 8 * min(sigma, SCALE) - 8 * max(0.0, sigma - SCALE)
        slope = 6 * min(sigma, SCALE / 2) * landscape.directions[:pairs, None, None] * np.array([1, -1])[:, None]
        return Look(sigma, look.base, look.rewards + better + slope)

    found = search(ask, SCALE, 150)
    assert SCALE / 16 <= found.sigma <= SCALE / 2 and found.tolerated <= SCALE / 2 and found.learns


def test_rewards_of_prompts_alone_are_nothing_to_learn_from():
    prompts = np.arange(float(PROMPTS))
    found = search(lambda sigma, pairs: Look(sigma, prompts, np.tile(prompts, (pairs, 2, 1))), SCALE, 150)
    assert not found.learns and "nothing to learn from" in found.why and found.sigma == found.tolerated == SCALE / 10


def test_members_that_are_broken_at_every_sigma():
    found = search(Landscape(broken=1e-12), SCALE, 150)
    assert "broken at every sigma" in found.why and found.sigma < SCALE / 1000 and found.tolerated > 0


def test_completions_that_no_function_judges_at_large_sigmas():
    """Of broken members a reward function may return None for nearly all completions, so that no prompt is left."""
    whole = Landscape(broken=0.02, slope=30)

    def ask(sigma, pairs):
        look = whole(sigma, pairs)
        if sigma > 0.02:
            look.rewards[np.arange(2 * pairs * PROMPTS).reshape(look.rewards.shape) % 3 > 0] = math.nan
            look.rewards[0, 0, ::3] = math.nan
        return look

    found = search(ask, SCALE, 150)
    assert 0 < found.tolerated < found.sigma <= 0.02 and all(map(math.isfinite, found.losses))


def test_signal_is_not_made_by_the_noise_of_prompts():
    """Over many draws the estimate of a signal of zero is zero, and that of a known one is right."""
    random = np.random.default_rng(1)

    def of(slope):
        rewards = random.standard_normal((4000, 2, 16)) + slope * random.standard_normal((4000, 1, 1)) * np.array(
            [[[1.0], [-1.0]]]
        )
        return Look(1.0, np.zeros(16), rewards)

    assert abs(of(0.0).signal) < 4 / 16 / math.sqrt(4000) and of(0.5).signal == pytest.approx(0.25, rel=0.1)
    assert of(0.0).noise == pytest.approx(0.5 / 16, rel=0.1)


def test_prompts_that_nobody_judges_are_left_out():
    look = Landscape()(0.01, 4)
    look.rewards[1, 0, 3] = math.nan
    kept = [i for i in range(PROMPTS) if i != 3]
    other = Look(0.01, look.base[kept], look.rewards[:, :, kept])
    assert (look.signal, look.noise, look.lost) == (other.signal, other.noise, other.lost)


# ---- runs ------------------------------------------------------------------------------------------------------------


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
    plain = stop_after(make(tmp_path / "plain", sigma=sigma, lr=lr), 3)
    assert journal.read(plain.journal).records == journal.read(first.journal).records
    assert all((r.sigma, r.lr) == (sigma, lr) for r in journal.read(first.journal).records)
    # a resume, with "auto" and with the numbers
    for folder, numbers in ((first.path, {}), (plain.path, {"sigma": sigma, "lr": lr})):
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
    with pytest.raises(ValueError, match="the model itself gives no text that a reward function judges"):
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


# ---- groups ----------------------------------------------------------------------------------------------------------


def scaled_model():
    torch.manual_seed(0)
    net = embedded.make_model(TOKENIZER).eval()
    with torch.no_grad():
        for layer in net.model.layers:
            layer.mlp.up_proj.weight.mul_(4)
    return net


def test_groups_in_proportion_to_the_tensors(tmp_path):
    net = scaled_model()
    plan = esfast.Plan(net)
    found = {text.rpartition(":")[0]: text for text in scales.groups(plan)}
    trainer = make(tmp_path / "run", net, groups="auto", sigma=0.01, lr=0.01)
    rule = trainer.es.rule
    assert [str(g) for g in rule.groups] == trainer.args.groups == list(found.values())
    factor = {g.pattern: g.sigma for g in rule.groups}
    assert factor["model.layers.*.mlp.up_proj.weight"] / factor["model.layers.*.mlp.gate_proj.weight"] == pytest.approx(
        4, rel=0.1
    )
    # of biases, which are all zero, nothing is known
    assert factor["model.layers.*.self_attn.q_proj.bias"] == 1.0 and all(g.sigma == g.lr for g in rule.groups)
    folder = stop_after(trainer, 2)
    del trainer
    # a resumed run takes the groups that it began with
    again = make(folder.path, scaled_model(), groups="auto", sigma=0.01, lr=0.01, resume=True)
    assert again.args.groups == list(found.values()) and again.es.generation == 2


@pytest.mark.parametrize("given", ["Auto", " AUTO ", ["auto"], ("Auto ",)])
def test_the_word_auto_is_read_in_any_form(given):
    assert ESConfig(groups=given).open_questions() == ["groups"]
    (word,) = given if isinstance(given, (list, tuple)) else [given]
    assert ESConfig(sigma=word, lr=word).open_questions() == ["sigma", "lr"]


def test_groups_auto_stands_alone():
    with pytest.raises(ValueError, match="groups: 'auto' makes a group of every kind of tensor, and stands alone"):
        ESConfig(groups=["*embed*:lr=0.1", "Auto"])
    for word in ("automatic", "autos", ""):
        with pytest.raises((TypeError, ValueError), match="sigma: expected a number.*'auto'"):
            ESConfig(sigma=word)


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
    command = out.strip().splitlines()[-1].split()
    assert command[:2] == ["esfast", "train"] and "--sigma" in command and "--no-progress" in command
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
    assert cli.main(["tune", *options, "--out", "runs/x"]) == 1
    assert cli.main(["tune", *options, "--sigma", "0.01", "--lr", "0.1"]) == 1
    assert "nothing to find" in capsys.readouterr().err
    assert cli.main(["tune", *options, "--num-engines", "2"]) == 1
    assert not (tmp_path / "runs").exists()
