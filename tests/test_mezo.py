"""MeZO on esfast: as functions, as a Trainer, and in front of a trainer with a loop of its own."""

import statistics

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM, Trainer, TrainerCallback, TrainingArguments

import esfast
from esfast.es.es import member_seed
from esfast.integrations.mezo import MeZOMixin, ZOParameters, zo_perturb_parameters, zo_update

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate: pip install esfast[mezo]")


@pytest.fixture(autouse=True)
def one_thread():
    """More only wait for each other, at this size."""
    torch.set_num_threads(1)


def opt(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=64,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            dropout=0.1,
        )
    ).to(dtype)


def batch(seed=0):
    ids = torch.randint(0, 16, (8, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def loss(model, data):
    model.eval()
    with torch.no_grad():
        return model(**data).loss.item()


def original(model, seed, factor):
    """MeZO's way: every move draws the noise again, in the weights' dtype, and rounds."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data.add_(torch.normal(0.0, 1.0, p.shape, dtype=p.dtype) * factor)


@pytest.mark.parametrize("weights", ["base", "master", "host"])
def test_three_moves_are_exact(weights, same_bits):
    model = opt(dtype=torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    zo = ZOParameters(model, 1e-3, weights=weights)
    plan, at = esfast.Plan(model), {}
    for factor in (1, -1):
        with esfast.perturbed(plan, 5, factor * 1e-3):
            at[factor] = [t.clone() for t in plan.tensors]
    for round in range(30):
        for factor, wanted in ((1, at[1]), (-2, at[-1]), (1, before)):
            zo_perturb_parameters(zo, 5, factor)
            # moves from member to member carry the rounding of the moves in host's mode, until it is restored
            assert same_bits(plan.tensors, wanted) or (weights == "host" and factor == -2), (round, factor)
    drifting = opt(dtype=torch.bfloat16)
    for factor in (1e-3, -2e-3, 1e-3):
        original(drifting, 5, factor)
    assert not same_bits(list(drifting.parameters()), before)


def test_an_update_is_one_step_along_the_noise(same_bits):
    model, wanted = opt(), opt()
    zo_update(ZOParameters(model), 7, 0.3, 0.01)
    esfast.add_noise_(esfast.Plan(wanted), [7], [-0.01 * 0.3])
    assert same_bits(list(model.parameters()), list(wanted.parameters()))
    model, wanted = opt(), opt()
    zo_update(ZOParameters(model), [7, 8], [0.3, -0.5], 0.01)
    esfast.add_noise_(esfast.Plan(wanted), [7, 8], [-0.01 * 0.3 / 2, 0.01 * 0.5 / 2])
    assert same_bits(list(model.parameters()), list(wanted.parameters()))


def test_decay_spares_biases_and_layer_norms(same_bits):
    model, wanted = opt(), opt()
    zo_update(ZOParameters(model, weight_decay=0.5), 7, 0.3, 0.01)
    names = dict(wanted.named_parameters())
    spared = {n for n in names if "bias" in n or "layer_norm" in n}
    assert 0 < len(spared) < len(names)
    for chosen, decay in ((names.keys() - spared, 0.005), (spared, 0.0)):
        plan = esfast.Plan([(n, p) for n, p in names.items() if n in chosen])
        esfast.add_noise_(plan, [7], [-0.01 * 0.3], decay=decay)
    assert same_bits(list(model.parameters()), list(wanted.parameters()))


def test_frozen_parameters_stay(same_bits):
    model = opt()
    model.model.decoder.embed_tokens.weight.requires_grad_(False)
    frozen = model.model.decoder.embed_tokens.weight.detach().clone()
    zo = ZOParameters(model)
    zo_perturb_parameters(zo, 1)
    assert same_bits(model.model.decoder.embed_tokens.weight, frozen)


def test_what_is_refused_changes_nothing(same_bits):
    model = opt()
    before = [p.detach().clone() for p in model.parameters()]
    zo = ZOParameters(model)
    with pytest.raises(ValueError, match="finite"):
        zo_update(zo, 1, float("nan"), 0.1)
    with pytest.raises(ValueError, match="zo_eps"):
        ZOParameters(model, zo_eps=0)
    with pytest.raises(ValueError, match="weights: expected one of"):
        ZOParameters(model, weights="copy")
    assert same_bits(list(model.parameters()), before)
    zo_perturb_parameters(zo, 1)
    with pytest.raises(RuntimeError, match="noise of seed 1 is still in place"):
        zo_update(zo, 1, 0.1, 0.1)
    zo_perturb_parameters(zo, 1, -1)
    assert same_bits(list(model.parameters()), before)


class ZOTrainer(MeZOMixin, Trainer):
    pass


def trainer(path, model, steps, lr=3e-3, data=8, **options):
    rows = [{k: v[i % 8] for k, v in batch().items()} for i in range(data)]
    settings = dict(
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=10,
    )
    arguments = TrainingArguments(path, **{**settings, **options})
    return ZOTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def test_the_trainer_takes_mezo_s_steps(tmp_path, same_bits):
    """Compares seeds, gradients and updates, to the bit, with the same steps written out by hand. The loss must
    fall."""
    model, wanted = opt(), opt()
    trained = trainer(tmp_path, model, 30, data=1)
    data = {k: v[:1] for k, v in batch().items()}
    before = loss(model, data)
    trained.train()
    plan = esfast.Plan(wanted)
    for step in range(30):
        seed, losses = member_seed(42, step, 0), []
        for factor in (1e-3, -1e-3):
            with esfast.perturbed(plan, seed, factor):
                losses.append(torch.tensor(loss(wanted, data)))
        esfast.add_noise_(plan, [seed], [-3e-3 * ((losses[0] - losses[1]) / 2e-3).item()])
    assert same_bits(list(model.parameters()), plan.tensors)
    assert loss(model, data) < before - 0.1
    logged = [row["loss"] for row in trained.state.log_history if "loss" in row]
    assert len(logged) == 3 and logged[0] > logged[-1]
    assert all(p.grad is None for p in model.parameters())


def test_gradient_accumulation_and_decay(tmp_path):
    model, data = opt(), batch()
    before = loss(model, data)
    trained = trainer(tmp_path, model, 20, data=16, gradient_accumulation_steps=2, weight_decay=0.01)
    trained.train()
    assert trained.zo_parameters.updates == 20 and loss(model, data) < before - 0.05


def values(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("weights", ["base", "master", "host", "inplace"])
def test_a_resumed_run_is_an_unbroken_one(tmp_path, same_bits, weights, monkeypatch):
    """The checkpoint is loaded in the process that had trained further: the base kept from before must not undo it."""
    monkeypatch.setattr(ZOTrainer, "zo_weights", weights)
    trained = trainer(tmp_path, opt(), 4, save_strategy="steps", save_steps=2)
    trained.train()
    unbroken = values(trained.model)
    trained.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    if weights == "inplace":
        torch.testing.assert_close(values(trained.model), unbroken)
    else:
        assert same_bits(values(trained.model), unbroken)


def test_train_called_again_starts_from_the_weights_of_then(tmp_path):
    """The second `train` starts from the present weights, also if they were written through .data, which PyTorch does
    not count as a write."""
    trained = trainer(tmp_path, opt(), 2)
    trained.train()
    start = opt(seed=1)
    for mine, new in zip(trained.model.parameters(), start.parameters(), strict=True):
        mine.data.copy_(new)
    trained.train()
    fresh = trainer(tmp_path, start, 2)
    fresh.train()
    # nearly: the order of the rows in a batch differs, and with it the loss's last bits
    torch.testing.assert_close(values(trained.model), values(fresh.model), rtol=0, atol=1e-4)


def test_each_trial_of_a_search_trains_its_own_model(tmp_path, same_bits):
    made = []

    def init(trial=None):
        made.append(opt(seed=len(made)))
        return made[-1]

    given = trainer(tmp_path, opt(), 2)
    searching = ZOTrainer(args=given.args, train_dataset=given.train_dataset, model_init=init)
    for _ in range(2):
        searching.train()
        assert not same_bits(values(made[-1]), values(opt(seed=len(made) - 1)))


def test_the_best_model_is_loaded_and_stays(tmp_path, same_bits):
    every_step = {"save_steps": 1, "eval_steps": 1, "save_strategy": "steps", "eval_strategy": "steps"}
    trained = trainer(
        tmp_path,
        opt(),
        3,
        load_best_model_at_end=True,
        metric_for_best_model="worse",
        greater_is_better=False,
        **every_step,
    )
    seen, evaluate = [], trained.evaluate

    def worse(*args, **kwargs):
        seen.append(values(trained.model))
        return evaluate(*args, **kwargs) | {"eval_worse": float(len(seen))}

    trained.evaluate = worse
    trained.train()
    assert len(seen) == 3 and same_bits(values(trained.model), seen[0])
    trained.zo_perturb_parameters(1)
    trained.zo_perturb_parameters(1, -1)
    assert same_bits(values(trained.model), seen[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["base", "master", "host", "inplace"])
def test_weights_loaded_between_two_steps_are_followed(weights, dtype, same_bits):
    def model(seed):
        torch.manual_seed(seed)
        return torch.nn.Linear(9, 5).to(dtype)

    mine, other = model(0), model(1)
    zo, fresh = ZOParameters(mine, weights=weights), ZOParameters(other, weights=weights)
    zo_update(zo, 1, 0.5, 0.1)
    mine.load_state_dict(other.state_dict())
    for parameters in (zo, fresh):
        zo_perturb_parameters(parameters, 5)
    assert same_bits(list(mine.parameters()), list(other.parameters()))
    for parameters in (zo, fresh):
        zo_perturb_parameters(parameters, 5, -1)
    mine.load_state_dict(other.state_dict())
    for parameters in (zo, fresh):
        zo_update(parameters, 2, 0.5, 0.1)
    assert same_bits(list(mine.parameters()), list(other.parameters()))
    mine.weight.data.mul_(2)  # which PyTorch does not count as a write
    zo.refresh()
    before = values(mine)
    zo_perturb_parameters(zo, 5)
    with pytest.raises(RuntimeError, match="noise of seed 5 is still in place"):
        zo.refresh()
    zo_perturb_parameters(zo, 5, -1)
    assert same_bits(values(mine), before) or weights == "inplace"


def test_loops_of_their_own(tmp_path, same_bits):
    """A trainer that calls zo_perturb_parameters and zo_update itself, as MeZO's does."""

    class Loop(MeZOMixin, Trainer):
        def run(self, steps, data):
            self.create_optimizer_and_scheduler(steps)
            for step in range(steps):
                self.zo_random_seed = step
                self.zo_perturb_parameters(scaling_factor=1)
                first = self.zo_forward(self.model, data)
                self.zo_perturb_parameters(scaling_factor=-2)
                second = self.zo_forward(self.model, data)
                self.projected_grad = ((first - second) / (2 * self.zo_eps)).item()
                self.zo_perturb_parameters(scaling_factor=1)
                self.zo_update(self.model)

    model, data = opt(), batch()
    before = loss(model, data)
    Loop(model, TrainingArguments(tmp_path, learning_rate=3e-3, use_cpu=True, report_to=[])).run(40, data)
    assert loss(model, data) < before - 0.1


def test_a_failing_forward_leaves_the_weights(tmp_path, same_bits):
    model = opt()
    before = [p.detach().clone() for p in model.parameters()]
    trained = trainer(tmp_path, model, 1)
    trained.compute_loss = lambda *a, **k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trained.train()
    assert same_bits(list(model.parameters()), before)


def test_parameters_that_were_replaced_and_losses_that_are_no_numbers(tmp_path, same_bits):
    """Both must raise. Otherwise training would go on with tensors that the model no longer reads."""

    class Assigns(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)

    trained = trainer(tmp_path, opt(), 2)
    trained.add_callback(Assigns())
    with pytest.raises(RuntimeError, match="MeZO: 'model.decoder.embed_tokens.weight' is no longer a parameter"):
        trained.train()
    model = opt()
    before = values(model)
    trained = trainer(tmp_path, model, 2)
    trained.compute_loss = lambda *a, **k: torch.tensor(float("nan"))
    with pytest.raises(ValueError, match="MeZO: the losses at step 0 are nan and nan; the weights are as they were"):
        trained.train()
    assert same_bits(values(model), before)


def test_the_loss_falls_as_with_the_original():
    """60 steps, 3 seeds; 300 steps and 5 seeds are `esfast bench dropin`'s."""
    falls = {"esfast": [], "original": []}
    for seed in range(3):
        for who, fallen in falls.items():
            model, data = opt(seed), batch(seed)
            zo, before = ZOParameters(model), loss(model, data)
            for step in range(60):
                move = (
                    (lambda factor, s=step, zo=zo: zo_perturb_parameters(zo, s, factor))
                    if who == "esfast"
                    else (lambda factor, s=step, model=model: original(model, s, factor * 1e-3))
                )
                move(1)
                first = loss(model, data)
                move(-2)
                grad = (first - loss(model, data)) / 2e-3
                move(1)
                if who == "esfast":
                    zo_update(zo, step, grad, 3e-3)
                else:
                    original(model, step, -3e-3 * grad)
            fallen.append(before - loss(model, data))
    ours, theirs = (statistics.mean(f) for f in falls.values())
    assert min(falls["esfast"]) > 0.15 and abs(ours - theirs) < 0.5 * theirs
