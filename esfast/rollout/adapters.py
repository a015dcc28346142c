"""PEFT adapters: the weights of a PeftModel that require a gradient are tuned, and all of them are saved.

A run folder keeps the adapter that the run began with in adapter/, as PEFT saves it. The base model, this folder and
the journal give the tuned adapter, whatever random numbers PyTorch draws elsewhere.
"""

from __future__ import annotations

import copy
import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..core.finite import some
from ..core.plan import Plan
from ..core.segments import FORMATS
from ..utils.changes import same_bits
from ..utils.errors import BadImport, BadType, BadValue
from ..utils.files import whole_folder
from ..utils.unwrap import named_parameters

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
# LoRA's initialisations that take random numbers or data to change the base weights, which no adapter folder holds.
CHANGES_BASE = ("pissa_niter", "loftq", "corda", "lora_ga")


def is_peft(model) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "base_model") and hasattr(model, "get_base_model")


def base_of(path: str | os.PathLike) -> str | None:
    """The name of the base model if `path` is the folder of an adapter, else None.

    ValueError if the folder doesn't name its base model; ImportError without peft."""
    if not (Path(path) / CONFIG).is_file():
        return None
    name = _peft("an adapter folder").PeftConfig.from_pretrained(os.fspath(path)).base_model_name_or_path
    if not name:
        raise BadValue(
            f"model: the adapter in {path} does not say which model it is of (base_model_name_or_path); load that "
            "model and wrap it: peft.PeftModel.from_pretrained(model, folder, is_trainable=True)"
        )
    return name


def attach(model, folder: str | os.PathLike):
    """Puts all adapters of a folder that `save_pretrained` wrote into the base model; returns the PeftModel."""
    PeftModel, wrapped = _peft("an adapter folder").PeftModel, None
    for name, place in _places(Path(folder)):
        # PEFT refuses to load learned prompts as trainable, so make them trainable afterwards.
        learned = _peft("").PeftConfig.from_pretrained(place).is_prompt_learning
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, place, adapter_name=name, is_trainable=not learned)
        else:
            wrapped.load_adapter(place, adapter_name=name, is_trainable=not learned)
        if learned:
            wrapped.prompt_encoder[name].requires_grad_(True)
    return wrapped


def wrap(model, peft_config, seed: int):
    """Puts the adapters of a PEFT configuration into the model. Their first values are a function of the seed.

    Raises ImportError without peft. Raises TypeError or ValueError if the configuration is not one of a causal LM's
    adapters, or the model has adapters already.
    """
    peft = _peft("peft_config")
    if not isinstance(peft_config, peft.PeftConfig):
        raise BadType(f"peft_config: expected a configuration such as peft.LoraConfig, got {peft_config!r:.80}")
    if not isinstance(model, torch.nn.Module):
        raise BadType(f"peft_config: adapters go into a model of this process, not into a {type(model).__name__}")
    if is_peft(model) or _tuner_layers(model):
        raise BadValue(
            "peft_config: the model has adapters already: leave peft_config out to tune those, or merge them first: "
            "model = model.merge_and_unload()"
        )
    if peft_config.task_type not in (None, "CAUSAL_LM"):
        raise BadValue(f"peft_config: its task_type is {peft_config.task_type!s}, expected CAUSAL_LM")
    peft_config = copy.deepcopy(peft_config)
    # Without a task type, learned prompts are never put before a text.
    peft_config.task_type = peft.TaskType.CAUSAL_LM
    device = next(model.parameters()).device
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, peft_config)


def check(model) -> None:
    """ValueError for adapters that can't be tuned, saved or loaded again; it names them and says what to do instead."""
    layers = _tuner_layers(model)
    if not is_peft(model) or type(model).__name__ == "PeftMixedModel":
        if layers or getattr(model, "_hf_peft_config_loaded", False) or is_peft(model):
            raise BadValue(
                f"model: a {type(model).__name__} with adapters that PEFT does not save as a folder of their own; make "
                "it with peft.get_peft_model(model, config), or load the adapter by "
                "peft.PeftModel.from_pretrained(model, folder, is_trainable=True)"
            )
        return
    if any(getattr(layer, "merged", False) for layer in layers):
        raise BadValue("model: its adapters are merged into the base weights: model.unmerge_adapter() first")
    for name in model.active_adapters:
        config = model.peft_config[name]
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.startswith(CHANGES_BASE):
            raise BadValue(
                f"model: the adapter {name!r} with init_lora_weights={start!r} changes the base weights, which its "
                "folder would not hold; take another initialisation"
            )
        if config.is_prompt_learning and hasattr(config, "num_tasks"):
            raise BadValue(f"model: the adapter {name!r} ({config.peft_type.value}) needs task_ids to generate")


def check_generates(model) -> None:
    """ValueError if learned prompts have no effect on the generated text. Some pairs of Transformers and PEFT versions
    drop them without an error."""
    if not is_peft(model):
        return
    from transformers import GenerationConfig

    from .engine import generating

    def scores() -> torch.Tensor:
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        with torch.no_grad(), generating(model, settings):
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return found.scores[0]

    learned = [n for n in model.active_adapters if model.peft_config[n].is_prompt_learning]
    settings = GenerationConfig(
        max_new_tokens=1, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_scores=True
    )
    for name in learned:
        tensors = [p.detach() for p in model.prompt_encoder[name].parameters()]
        before, found = [t.clone() for t in tensors], scores()
        try:
            for t in tensors:
                t.mul_(-3).add_(1)
            changed = not same_bits(found, scores())
        finally:
            for t, own in zip(tensors, before, strict=True):
                t.copy_(own)
        if not changed:
            kind = model.peft_config[name].peft_type.value
            raise BadValue(
                f"model: generate gives the same whatever the adapter {name!r} ({kind}) holds, with these "
                "versions of Transformers and PEFT, so nothing could be learned; take another kind"
            )


def patterns(model) -> list[str] | None:
    """Default patterns of the weights to tune: for a PeftModel the names that require a gradient, else None (all).
    ValueError if no weight of a PeftModel requires a gradient."""
    if not isinstance(model, torch.nn.Module):
        return None
    frozen = [name for name, p in named_parameters(model) if not p.requires_grad]
    if is_peft(model):
        trained = [glob.escape(name) for name, p in named_parameters(model) if p.requires_grad]
        if not trained:
            raise BadValue(
                "model: nothing of this PeftModel requires a gradient, so nothing is to be tuned; load it with "
                "is_trainable=True, or choose an adapter: model.set_adapter(name)"
            )
        return trained
    if frozen and len(frozen) < len(list(model.parameters())):
        log.warning(
            "all weights are tuned, also those that require no gradient (%s): ES needs none. exclude= leaves weights "
            "as they are",
            some(frozen),
        )
    return None


def check_saved(model, names: Sequence[str]) -> None:
    """ValueError if a PeftModel would not save one of the tuned weights."""
    if not is_peft(model):
        return
    from peft.utils import get_peft_model_state_dict

    states = [get_peft_model_state_dict(model, adapter_name=a, save_embedding_layers=False) for a in model.peft_config]
    saved = [t for state in states for t in state.values()]
    memory = {t.data_ptr() for t in saved}
    # PEFT saves learned prompts as a copy, so their memory is not that of the parameter.
    learned = any(config.is_prompt_learning for config in model.peft_config.values())
    parameters = dict(named_parameters(model))
    lost = [
        name
        for name in names
        if parameters[name].data_ptr() not in memory
        and not (learned and any(same_bits(parameters[name], t) for t in saved))
    ]
    if lost:
        kinds = ", ".join(sorted({config.peft_type.value for config in model.peft_config.values()}))
        raise BadValue(
            f"model: PEFT ({kinds}) does not save {some(lost)}, so what is tuned would be lost; leave such weights out "
            "(exclude=, requires_grad_(False)), name their modules in modules_to_save, or take another kind of adapter"
        )


def identity(model) -> dict[str, str]:
    """The fingerprint of the base weights, which a journal of adapters doesn't cover; empty without adapters."""
    if not is_peft(model):
        return {}
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad and p.dtype in FORMATS and p.numel()]
    return {"frozen weights": Plan(frozen).fingerprint()} if frozen else {}


def begin(model, folder: Path, resumed: bool, writes: bool) -> None:
    """Saves the adapter that a run begins with in `folder`; a resumed run loads it from there.

    ValueError if the resumed run's adapters had another configuration; the message names what differs."""
    if not is_peft(model):
        return
    if resumed and folder.is_dir():
        _take(model, folder)
    elif writes and not resumed:
        with whole_folder(folder) as unfinished:
            model.save_pretrained(str(unfinished), selected_adapters=list(model.active_adapters))


def _take(model, folder: Path) -> None:
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    there = dict(_places(folder))
    if set(there) != set(model.active_adapters):
        raise BadValue(f"resume: the run tuned the adapters {sorted(there)}, here are {sorted(model.active_adapters)}")
    for name, place in there.items():
        found, mine = (_plain(config) for config in (PeftConfig.from_pretrained(place), model.peft_config[name]))
        for key in found.keys() & mine.keys():
            if found[key] != mine[key]:
                raise BadValue(f"resume: the run's adapter has {key} {found[key]!r}, this one has {mine[key]!r}")
        set_peft_model_state_dict(model, load_peft_weights(str(place), device="cpu"), adapter_name=name)


def _plain(config) -> dict:
    """A configuration's settings, without those that say where and how it was loaded."""
    apart = ("base_model_name_or_path", "inference_mode", "auto_mapping", "peft_version", "revision", "runtime_config")
    fields = {name: value for name, value in config.to_dict().items() if name not in apart}
    return {name: sorted(v, key=str) if isinstance(v, (set, list, tuple)) else v for name, v in fields.items()}


def _places(folder: Path) -> list[tuple[str, str]]:
    """Names and folders of the adapters in a folder of PEFT's: "default" in itself, others in folders of their own."""
    found = {"default": folder} | {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    return [(name, str(path)) for name, path in found.items() if (path / CONFIG).exists()]


def _tuner_layers(model) -> list:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return []
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)] if isinstance(model, torch.nn.Module) else []


def _peft(what: str):
    try:
        import peft
    except ImportError:
        raise BadImport(f"{what}: needs the peft package: pip install 'esfast[peft]'") from None
    return peft
