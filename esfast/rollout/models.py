"""Loads a causal language model with all of its weights, or raises an error that says what is wrong.

If weights are missing, Transformers continues with random ones and prints a table. A run of such a model is worthless,
and can't be resumed or replayed, since the next load draws other weights.
"""

from __future__ import annotations

import os

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..core.finite import some
from ..utils.errors import BadFile, BadValue
from . import adapters


def load_model(path: str | os.PathLike, **options) -> torch.nn.Module:
    """Loads the causal LM of a Hugging Face name or folder. `options` go to from_pretrained (dtype=). The folder of a
    PEFT adapter gives its base model with the adapter in it, ready to be tuned.

    Raises OSError if the model or one of its files is missing. Raises ValueError if it is not a causal LM, needs its
    own code, or its weights are damaged, incomplete or of another model. Nothing is unpickled but tensors.
    """
    if (base := adapters.base_of(path)) is not None:
        return adapters.attach(load_model(base, **options), path)
    check_kind(path, load_config(path))
    model, report = _loaded(
        "model",
        path,
        AutoModelForCausalLM.from_pretrained,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        weights_only=True,
        **options,
    )
    # Reports tensors of another size together with missing ones.
    _check_complete(path, model, report)
    return model


def load_config(path: str | os.PathLike):
    """A model's configuration; errors as in `load_model`."""
    return _loaded("model", adapters.base_of(path) or path, AutoConfig.from_pretrained)


def load_tokenizer(path: str | os.PathLike):
    """A model's tokenizer; errors as in `load_model`. If the folder of an adapter has none, that of the base model."""
    if not os.path.exists(os.path.join(path, "tokenizer_config.json")):
        path = adapters.base_of(path) or path
    tokenizer = _loaded("the tokenizer of", path, AutoTokenizer.from_pretrained)
    # If its files are missing, a tokenizer of some classes loads all the same, with nothing but special tokens.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise BadValue(f"the tokenizer of {path} has no vocabulary: are its files there (tokenizer.json)?")
    return tokenizer


def _loaded(what: str, path: str | os.PathLike, load, **options):
    try:
        return load(path, trust_remote_code=False, **options)
    except OSError as error:
        raise BadFile(f"{what} {path}: {_first_lines(error)}") from error
    except MemoryError:
        raise
    except Exception as error:
        # Errors of many libraries: safetensors, pickle, json, a missing package.
        if "trust_remote_code" in str(error):
            raise BadValue(
                f"{what} {path} brings code of its own (trust_remote_code), which esfast does not run. If you trust "
                "it, load the model in a script of yours and hand it to ESTrainer(model=...)"
            ) from error
        raise BadValue(f"{what} {path} can't be loaded: {type(error).__name__}: {_first_lines(error)}") from error


def _first_lines(error: Exception) -> str:
    """The message without the long lists and tables that Transformers appends."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:400]}..."


def check_kind(path: str | os.PathLike, config) -> None:
    """ValueError unless the configuration is that of a causal language model; the message says what the model is."""
    made_as = f" ({', '.join(config.architectures)})" if getattr(config, "architectures", None) else ""
    kind = None
    if getattr(config, "is_encoder_decoder", False):
        kind = "a sequence-to-sequence model"
    elif type(config) not in AutoModelForCausalLM._model_mapping:
        kind = f"a {config.model_type} model, of which Transformers has no causal language model"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not _is_decoder(config):
        kind = "an encoder, which reads the text on both sides (a decoder's configuration says is_decoder)"
    if kind is not None:
        raise BadValue(f"model {path} is {kind}{made_as}: esfast tunes causal language models, which continue a text")


def _is_decoder(config) -> bool:
    # XLM calls it `causal`.
    return bool(getattr(config, "is_decoder", False) or getattr(config, "causal", False))


def _check_complete(path: str | os.PathLike, model: torch.nn.Module, report: dict) -> None:
    """ValueError if the checkpoint has no value for a parameter, nor for one that is tied to it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    absent = {*report["missing_keys"], *mismatched}
    there = {p.data_ptr() for name, p in parameters.items() if name not in absent}
    missing = [name for name, p in parameters.items() if name in absent and p.data_ptr() not in there]
    if missing:
        made_as = getattr(model.config, "architectures", None) or [type(model).__name__]
        raise BadValue(
            f"model {path}: {len(missing)} of {len(parameters)} weights are not in the checkpoint, or of another shape "
            f"there ({some(missing)}), and would be random. Is it a {type(model).__name__}? Its configuration says "
            f"{', '.join(made_as)}"
        )


def check_generates(model) -> None:
    """ValueError for a model that can't continue a text: one without a head, of another kind, or
    sequence-to-sequence."""
    able = getattr(model, "can_generate", None)
    if able is not None and not able():
        raise BadValue(
            f"model: a {type(model).__name__} generates no text; load it with AutoModelForCausalLM.from_pretrained"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise BadValue(
            f"model: a {type(model).__name__} is a sequence-to-sequence model: esfast tunes causal language models, "
            "which continue a text"
        )
