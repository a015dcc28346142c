"""esfast.perturbed: inside the block the weights have the bits that add_noise_ gives, after it those that they had."""

import pytest
import torch

import esfast
from esfast.es import perturbation


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(torch.bfloat16)


def bits_of(m):
    return [p.detach().clone() for p in m.parameters()]


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "low_rank"])
@pytest.mark.parametrize("with_base", [False, True])
def test_the_model_is_the_member_and_then_itself(kind, with_base, same_bits):
    m = model()
    plan, before, wanted = esfast.Plan(m), bits_of(m), model()
    esfast.add_noise_(esfast.Plan(wanted), [7], [0.1], noise=kind)
    base = plan.clone() if with_base else None
    with esfast.perturbed(plan if with_base else m, 7, 0.1, base=base, noise=kind) as inside:
        assert same_bits(inside.tensors, bits_of(wanted)) and same_bits(bits_of(m), bits_of(wanted))
    assert same_bits(bits_of(m), before)


def test_blocks_may_be_nested(same_bits):
    m = model()
    before = bits_of(m)
    with esfast.perturbed(m, 1, 0.1):
        outer = bits_of(m)
        with esfast.perturbed(m, 2, 0.1):
            assert not same_bits(bits_of(m), outer)
        assert same_bits(bits_of(m), outer)
    assert same_bits(bits_of(m), before)


def test_restored_after_an_exception_and_a_return(same_bits):
    m = model()
    before = bits_of(m)

    def leaves():
        with esfast.perturbed(m, 1, 0.5):
            return bits_of(m)

    assert not same_bits(leaves(), before) and same_bits(bits_of(m), before)
    with pytest.raises(ZeroDivisionError), esfast.perturbed(m, 1, 0.5):
        raise ZeroDivisionError
    assert same_bits(bits_of(m), before)


@pytest.mark.parametrize("call", [1, 2])  # the perturbing one, the restoring one
def test_ctrl_c_in_either_pass_leaves_the_bits(call, monkeypatch, same_bits):
    m, original, calls = model(), perturbation.add_noise_, []
    before = bits_of(m)

    def pressed(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            if call == 1:
                original(*arguments, **options)
            raise KeyboardInterrupt
        original(*arguments, **options)

    monkeypatch.setattr(perturbation, "add_noise_", pressed)
    with pytest.raises(KeyboardInterrupt), esfast.perturbed(m, 1, 0.5):
        pass
    assert same_bits(bits_of(m), before)


def test_what_is_refused_changes_nothing(same_bits):
    m = model()
    before = bits_of(m)
    for error, words, options in (
        (ValueError, "seed", {"seed": -1, "sigma": 1.0}),
        (ValueError, "finite", {"seed": 1, "sigma": float("nan")}),
        (ValueError, "noise", {"seed": 1, "sigma": 1.0, "noise": "uniform"}),
        (TypeError, "base: expected a Plan", {"seed": 1, "sigma": 1.0, "base": m}),
        (ValueError, "base", {"seed": 1, "sigma": 1.0, "base": esfast.Plan([("a", torch.zeros(3))])}),
    ):
        with pytest.raises(error, match=words), esfast.perturbed(m, **options):
            pytest.fail("the block must not run")
        assert same_bits(bits_of(m), before)
