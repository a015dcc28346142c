"""WeightStore: what ES and ESTrainer ask of one, on a store whose weights lie in other tensors than the model's."""

import pytest
import torch
from test_trainer import ROWS, config, count_digits, equal, weights

import esfast
from esfast.core.ops import add_noise_
from esfast.es import MODES, LocalStore, WeightStore
from esfast.rollout import TransformersEngine
from esfast.tasks import embedded
from esfast.update.updater import Rule, Updater
from esfast.utils.names import WEIGHT_MODES


class Remote(WeightStore):
    """A model "elsewhere": a copy in this process that only this store refers to."""

    mode = "base"

    def __init__(self, net, tokenizer):
        self.net, self.hidden = net, esfast.Plan(net)
        self.source, self.tokenizer = "somewhere/model", tokenizer
        self.whole_names, self.whole_numel = self.hidden.names, self.hidden.numel
        self.layout, self.log = self.hidden.layout, []

    def begin(self, rule):
        self.base = self.hidden.clone()
        self.updates = Updater(self.base, rule)
        self.log.append(rule)

    def perturb(self, seed, coeff, rounding="nearest"):
        add_noise_(self.hidden, [seed], [coeff], base=self.base)

    def restore(self):
        add_noise_(self.hidden, [], [], base=self.base)

    def update(self, record):
        self.updates(record)
        self.restore()
        self.log.append(record.generation)

    def fingerprint(self):
        return self.hidden.fingerprint()

    def save(self, folder, gathered=None):
        self.net.save_pretrained(folder)


@pytest.fixture
def model():
    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    return embedded.make_model(tokenizer).eval(), tokenizer


class Asks:
    """An evaluator of a Remote's members: sequential, through whichever store ES has."""

    tokens = 0

    def __init__(self, net, tokenizer):
        self.engine = TransformersEngine(net, tokenizer, 6)

    def evaluate(self, members, prompts, seeds):
        for member in members:
            yield member, self.engine.generate(prompts, seeds)

    def close(self):
        self.engine.close()


def test_a_run_of_a_store_is_the_run_of_the_model(tmp_path, model):
    """Journal, saved model and resume; no checkpoint, as the store has no updater, and no sample of its weights."""
    net, tokenizer = model
    before = weights(net)
    esfast.ESTrainer(net, count_digits, config(tmp_path / "model"), ROWS, ROWS, tokenizer).train()
    after = weights(net)
    net.load_state_dict(before, strict=False)

    def trainer(generations, **changes):
        settings = config(tmp_path / "store", generations=generations, checkpoint_every=1, **changes)
        evaluator = Asks(net, tokenizer)
        return esfast.ESTrainer(
            Remote(net, tokenizer), count_digits, settings, ROWS, ROWS, tokenizer, evaluator=evaluator
        )

    first = trainer(2)
    first.train()
    assert first.es.store.log == [Rule(), 0, 1] and first.es.plan is None and first.es.drift() is None
    assert not list((tmp_path / "store").glob("checkpoints/*"))
    net.load_state_dict(before, strict=False)
    second = trainer(3, resume=True)
    assert second.es.store.log == [Rule(), 0, 1]
    second.train()
    assert second.es.store.log == [Rule(), 0, 1, 2] and equal(weights(net), after)
    for name in ("model", "store"):
        saved = type(net).from_pretrained(tmp_path / name / "model")
        assert equal(weights(saved), after)
        esfast.journal.replay(replayed := esfast.Plan(start(model, before)), tmp_path / name / "journal.jsonl")
        assert replayed.fingerprint() == esfast.Plan(net).fingerprint()
    assert "base_model: somewhere/model" in (tmp_path / "store" / "model" / "README.md").read_text()
    assert "update_norm" not in second.folder.read_metrics()[-1]


def start(model, before):
    made = embedded.make_model(model[1])
    made.load_state_dict(before, strict=False)
    return made


@pytest.mark.parametrize(
    ("changes", "options", "error", "words"),
    [
        ({"kl_to_base": True}, {}, ValueError, "kl_to_base: with the weights in "),
        ({"exclude": "*norm*"}, {}, ValueError, "exclude: with the weights in "),
        ({"weights": "master"}, {}, ValueError, "are of mode 'base', asked for is 'master'"),
        ({}, {"evaluator": None}, TypeError, "weights in a store need an evaluator"),
        ({}, {"peft_config": object()}, TypeError, "peft_config: expected a model"),
    ],
)
def test_what_a_store_cannot_do(tmp_path, model, changes, options, error, words):
    store = Remote(*model)
    options = {"evaluator": Asks(*model)} | options
    with pytest.raises(error, match=words):
        esfast.ESTrainer(store, count_digits, config(tmp_path / "run", **changes), ROWS, None, model[1], **options)
    assert store.log == []


def test_es_takes_a_local_store_with_the_rule_it_was_made_with(model):
    plan = esfast.Plan(model[0])
    es = esfast.ES(MODES["master"](plan, Rule("rademacher")), noise="rademacher", weights="master", population_size=2)
    assert isinstance(es.store, LocalStore) and es.plan is plan
    with pytest.raises(ValueError, match=r"follow Rule\(noise='gaussian'.*asked for is Rule\(noise='rademacher'"):
        esfast.ES(MODES["base"](plan, Rule()), noise="rademacher")


def test_modes_are_those_of_the_settings():
    assert tuple(MODES) == WEIGHT_MODES and all(issubclass(store, WeightStore) for store in MODES.values())
