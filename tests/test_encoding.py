"""Prompts as the model is given them: no end token that the tokenizer puts behind every text, one bos, the right limit."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MptConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
    XLNetConfig,
)

from esfast.rollout.encoding import PromptEncoder, context_limit
from esfast.rollout.engine import TransformersEngine
from esfast.tasks import embedded
from esfast.trainer.kl import KLToBase

EOS, BOS, SEP, CLS = "<|endoftext|>", "<s>", "[SEP]", "[CLS]"


def tokenizer_with(template, **special):
    """The embedded model's, with a post-processor such as those of Llama (add_eos_token), BERT and T5."""
    made = embedded.make_tokenizer()
    if transformers.__version__ < "5" and "extra_special_tokens" in special:  # its name in Transformers 4
        special["additional_special_tokens"] = special.pop("extra_special_tokens")
    made.add_special_tokens({name: token for name, token in special.items()})
    tokens = [(t, made.convert_tokens_to_ids(t)) for t in template.split() if t != "$A"]
    made._tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    return made


def texts(made, prompts):
    return [made.decode(row) for row in PromptEncoder(made)(prompts)]


@pytest.mark.parametrize(
    ("template", "special", "given"),
    [
        (f"$A {EOS}", {}, "7"),
        (f"{BOS} $A {EOS}", {"bos_token": BOS}, f"{BOS}7"),
        (f"{CLS} $A {SEP}", {"cls_token": CLS, "sep_token": SEP}, f"{CLS}7"),
        (f"$A {SEP} {CLS}", {"cls_token": CLS, "sep_token": SEP}, "7"),
        (f"$A {EOS} {EOS}", {}, "7"),
        (f"$A {EOS} en_XX", {"extra_special_tokens": ["en_XX"]}, "7"),
        (f"{EOS} $A {EOS}", {"bos_token": EOS}, f"{EOS}7"),
        (f"{BOS} $A", {"bos_token": BOS}, f"{BOS}7"),
        ("$A", {}, "7"),
    ],
)
def test_what_a_tokenizer_puts_behind_a_text_is_left_out(template, special, given):
    made = tokenizer_with(template, **special)
    # what the prompt spells out itself stays
    assert texts(made, ["7", f"7{EOS}", ""]) == [given, given + EOS, given[:-1]]


def test_a_token_behind_a_text_that_does_not_end_it_stays():
    """For example the token at which ChatGLM's answers begin."""
    made = tokenizer_with("[gMASK] $A <sop>", extra_special_tokens=["[gMASK]", "<sop>"])
    assert texts(made, ["7"]) == ["[gMASK]7<sop>"]


def test_a_vocabulary_without_letters():
    core = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, **{str(i): i + 2 for i in range(10)}}))
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    assert made("7")["input_ids"] == [9, 1] and PromptEncoder(made)(["7"]) == [[9]]


def test_a_tokenizer_that_heeds_no_wish():
    made = tokenizer_with(f"$A {EOS}")

    class Stubborn(type(made)):
        def __call__(self, texts, add_special_tokens=True, **options):
            return super().__call__(texts, **options)

    made.__class__ = Stubborn
    assert texts(made, ["7", f"7{EOS}"]) == ["7", f"7{EOS}"]


@pytest.mark.parametrize("template", [f"{BOS} $A", f"{BOS} $A {EOS}"])
def test_a_prompt_that_spells_out_the_bos_token_gets_one(template):
    made = tokenizer_with(template, bos_token=BOS)
    assert texts(made, [f"{BOS}7", "7", f"7{BOS}"]) == [f"{BOS}7", f"{BOS}7", f"{BOS}7{BOS}"]


def test_engine_and_kl_give_the_model_no_end_token():
    plain, ending = embedded.make_tokenizer(), tokenizer_with(f"$A {EOS}")
    torch.manual_seed(0)
    model = embedded.make_model(plain).eval()
    assert TransformersEngine(model, ending, 4).prompts(["7"]) == TransformersEngine(model, plain, 4).prompts(["7"])
    assert KLToBase(model, ending, 4)._ids("7", "8") == KLToBase(model, plain, 4)._ids("7", "8")


def test_a_prompt_of_appended_tokens_alone_is_empty():
    ending = tokenizer_with(f"$A {EOS}")
    with pytest.raises(ValueError, match="no tokens"):
        TransformersEngine(embedded.make_model(ending), ending, 4).generate([""])


class Configured(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (XLNetConfig(), None),  # says -1
        (MptConfig(max_seq_len=77), 77),
        (GPT2Config(n_positions=99), 99),
    ],
)
def test_context_limits(config, limit):
    assert context_limit(Configured(config)) == limit


def test_positions_that_no_token_gets():
    """RoBERTa has a table of 20, and counts from behind its padding's number: 18 tokens fit, and no more."""
    sizes = dict(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = RobertaForCausalLM(RobertaConfig(**sizes, max_position_embeddings=20, pad_token_id=1, is_decoder=True))
    assert context_limit(model) == 18
    model(input_ids=torch.full((1, 18), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 19), 5))
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=20))
    assert context_limit(learned) == 20
