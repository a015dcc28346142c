"""sigma="auto" and groups="auto": groups are made by the tensors' scale, unless some are named."""

import json

import pytest
import torch
import yaml
from test_tuning import TOKENIZER, make, stop_after

import esfast
from esfast import ESConfig
from esfast.tasks import embedded
from esfast.trainer import scales


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


@pytest.mark.parametrize("noise", [{}, {"noise": "low_rank"}], ids=["gaussian", "low-rank"])
def test_with_sigma_auto_groups_are_made_unless_some_are_named(tmp_path, noise):
    """One word does for both, and the weights' dtype does not matter."""
    net = scaled_model().to(torch.bfloat16)
    made = scales.groups(esfast.Plan(net))
    trainer = make(tmp_path / "run", net, **noise)
    assert trainer.args.groups == made == [str(g) for g in trainer.es.rule.groups] and trainer.args.sigma == "auto"
    row = json.loads(stop_after(trainer, 1).metrics.read_text().splitlines()[-1])
    # The doctor sees whether rounding takes updates away.
    assert 0 < row["update_kept"] < 1.5
    del trainer
    for given in (["*embed*:sigma=0,lr=0"], ["*:sigma=1"]):
        trainer = make(tmp_path / given[0][1:3], scaled_model(), groups=given, **noise)
        assert [(g.pattern, g.sigma) for g in trainer.es.rule.groups] == [
            (given[0].partition(":")[0], float(given[0][-1] != "0"))
        ]
        before = trainer.model.model.embed_tokens.weight.detach().clone()
        stop_after(trainer, 1)
        assert torch.equal(before, trainer.model.model.embed_tokens.weight) == given[0].endswith("lr=0")


def test_a_run_from_before_groups_were_made_goes_on_without(tmp_path):
    """Its config.yaml has a number for sigma, and no groups."""
    folder = stop_after(make(tmp_path / "run", sigma=0.01, lr=0.01), 2)
    trainer = make(folder.path, resume=True)
    assert (trainer.args.sigma, trainer.args.lr, trainer.args.groups) == (0.01, 0.01, None)
    assert trainer.es.generation == 2 and trainer.es.rule.groups == () and not trainer.args.open_questions()
    del trainer
    with pytest.raises(ValueError, match="resume: .*config.yaml does not say what groups was found to be"):
        make(folder.path, resume=True, groups="auto")
    # A config.yaml that is older than groups does not name them.
    config = yaml.safe_load(folder.config.read_text())
    del config["groups"]
    folder.config.write_text(yaml.safe_dump(config))
    trainer = make(folder.path, resume=True)
    assert trainer.args.groups is None and trainer.es.generation == 2


def test_a_file_of_groups_is_no_group(tmp_path):
    (tmp_path / "groups.txt").write_text("*embed*:lr=0.1")
    with pytest.raises(ValueError, match="ESConfig.groups: group: expected PATTERN:sigma=X,lr=Y.*groups.txt"):
        ESConfig(sigma="auto", groups=[str(tmp_path / "groups.txt")])


@pytest.mark.parametrize("given", ["Auto", " AUTO ", ["auto"], ("Auto ",)])
def test_the_word_auto_is_read_in_any_form(given):
    assert ESConfig(groups=given).open_questions() == ["groups"]
    (word,) = given if isinstance(given, (list, tuple)) else [given]
    assert ESConfig(sigma=word, lr=word).open_questions() == ["sigma", "lr", "groups"]
    assert ESConfig(lr=word).open_questions() == ["lr"]
    assert ESConfig(sigma=word, groups=["*:sigma=1"]).open_questions() == ["sigma"]


def test_groups_auto_stands_alone():
    with pytest.raises(ValueError, match="groups: 'auto' makes a group of every kind of tensor, and stands alone"):
        ESConfig(groups=["*embed*:lr=0.1", "Auto"])
    for word in ("automatic", "autos", ""):
        with pytest.raises((TypeError, ValueError), match="sigma: expected a number.*'auto'"):
            ESConfig(sigma=word)
