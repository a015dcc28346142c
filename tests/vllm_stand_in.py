"""vLLM and Ray as far as a fleet uses them, in this process: an engine computes with the Hugging Face model itself, whose
weights esfast's own WorkerExtension finds, perturbs and updates. What real ones do is tests/with_vllm's."""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esfast.integrations import vllm_plugin
from esfast.integrations.vllm import WorkerExtension


class Worker(WorkerExtension):
    def __init__(self, path, model):
        self._model = model
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=model.config, model=path))

    def get_model(self):
        return self._model


@dataclasses.dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    seed: int | None = None


class LLM:
    """Attributes: `asked`, the prompts of each call of `generate` as token ids; of the class, `made`, all there are."""

    made: list = []

    def __init__(
        self,
        model,
        tensor_parallel_size,
        dtype,
        worker_extension_cls,
        disable_log_stats,
        tokenizer=None,
        max_model_len=None,
    ):
        self._model = AutoModelForCausalLM.from_pretrained(model).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
        self._worker, self.asked, self.running = Worker(model, self._model), [], True
        config = self._model.config
        stated = SimpleNamespace(
            max_model_len=max_model_len or config.max_position_embeddings, get_vocab_size=lambda: config.vocab_size
        )
        core = SimpleNamespace(shutdown=lambda: setattr(self, "running", False))
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=stated), engine_core=core)
        LLM.made.append(self)

    def get_tokenizer(self):
        return self._tokenizer

    def collective_rpc(self, method, args=(), kwargs=None):
        return [getattr(self._worker, method)(*args, **(kwargs or {}))]

    def generate(self, prompts, settings, use_tqdm):
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        self.asked.append(rows)
        settings = settings if isinstance(settings, list) else [settings] * len(rows)
        return [self._done(row, params) for row, params in zip(rows, settings, strict=True)]

    @torch.no_grad()
    def _done(self, row, params):
        sampling = torch.Generator().manual_seed(params.seed or 0)
        new = []
        while len(new) < params.max_tokens and self._tokenizer.eos_token_id not in new:
            logits = self._model(input_ids=torch.tensor([row + new])).logits[0, -1]
            if params.temperature == 0:
                new.append(int(logits.argmax()))
            else:
                chances = (logits / params.temperature).softmax(-1)
                new.append(int(torch.multinomial(chances, 1, generator=sampling)))
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=new, text=text)])


class RayError(Exception): ...


class RayActorError(RayError): ...


class Reference:
    """What was put into Ray's store, or an actor answers; an error if that has died."""

    def __init__(self, value, actor=None):
        self.value, self.actor = value, actor


class Actor:
    def __init__(self, kind, args, options):
        self.alive, self.made, self.error = True, None, None
        try:
            self.made = kind(*args, **options)
        except Exception as error:
            self.error = error

    def __getattr__(self, method):
        def remote(*args):
            if method == "__ray_ready__" or self.made is None:
                return Reference(None, self)
            args = [a.value if isinstance(a, Reference) else a for a in args]
            try:
                return Reference(getattr(self.made, method)(*args), self)
            except Exception as error:
                return Reference(error, self)

        return SimpleNamespace(remote=remote)


def get(reference):
    if reference.actor is not None and not reference.actor.alive:
        raise RayActorError("the actor died")
    if reference.actor is not None and reference.actor.error is not None:
        raise RayError(str(reference.actor.error))
    if isinstance(reference.value, Exception):
        raise reference.value
    return reference.value


def remote(**resources):
    def factory(kind):
        start = SimpleNamespace(remote=lambda *args, **options: Actor(kind, args, options))
        return SimpleNamespace(options=lambda runtime_env: start)

    return factory


def kill(actor):
    if actor.alive and actor.made is not None:
        actor.made.close()
    actor.alive = False


def install(monkeypatch):
    """Puts both in the place of the packages; returns (LLM, kill), with no LLM made so far."""
    vllm, distributed, ray = ModuleType("vllm"), ModuleType("vllm.distributed"), ModuleType("ray")
    vllm.LLM, vllm.SamplingParams, vllm.distributed = LLM, SamplingParams, distributed
    distributed.get_tp_group = lambda: SimpleNamespace(rank_in_group=0, world_size=1, ranks=[0])
    ray.exceptions = SimpleNamespace(RayError=RayError, RayActorError=RayActorError)
    ray.is_initialized, ray.cluster_resources = lambda: True, dict
    ray.remote, ray.get, ray.put, ray.kill = remote, get, Reference, kill
    ray.wait = lambda references, num_returns: (references[:num_returns], references[num_returns:])
    for module in (vllm, distributed, ray):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vllm_plugin, "registered", True)
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return LLM, kill
