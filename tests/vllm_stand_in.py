"""vLLM and Ray as far as a fleet uses them, in this process: an engine computes with the Hugging Face model itself, whose
weights esfast's own WorkerExtension finds, perturbs and updates. What real ones do is tests/with_vllm's."""

import dataclasses
import sys
import time
from types import ModuleType, SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esfast.integrations import vllm_patches, vllm_plugin
from esfast.integrations.vllm import WorkerExtension


class Worker(WorkerExtension):
    def __init__(self, path, model, lora):
        self._model = model
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=model.config, model=path),
            lora_config=lora,
            device_config=SimpleNamespace(device_type="cpu"),
        )
        self.model_runner = SimpleNamespace()
        if lora is not None:
            self.model_runner.lora_manager = LoRAManager(model, lora)

    def get_model(self):
        return self._model


class BaseLinearLayerWithLoRA:
    def __init__(self, base, lora):
        (rows, cols), (slots, rank) = base.weight.shape, (lora.max_loras, lora.max_lora_rank)
        self.base_layer, self.tp_rank = base, 0
        self.lora_a_stacked = (torch.zeros(slots, 1, rank, cols),)
        self.lora_b_stacked = (torch.zeros(slots, 1, rows, rank),)


class LoRAManager:
    """Of adapters of linear layers, one in a slot at a time: `drawn` of it is added to the model's weights."""

    def __init__(self, model, lora):
        linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
        modules = {name: BaseLinearLayerWithLoRA(base, lora) for name, base in linear.items()}
        self._adapter_manager = SimpleNamespace(modules=modules)
        self.members, self.write, self.removed = {}, None, []

    def remove_adapter(self, number):
        self.removed.append(number)

    @torch.no_grad()
    def weights(self, request):
        """[(weight, its bits)] of the base, after the adapter of a request was added to the weights."""
        assert self.members[request.lora_int_id].name == request.lora_name == request.lora_path
        self.write(0, request.lora_int_id)
        before = []
        for lora in self._adapter_manager.modules.values():
            weight = lora.base_layer.weight
            before.append((weight, weight.clone()))
            weight += lora.lora_b_stacked[0][0, 0] @ lora.lora_a_stacked[0][0, 0]
        return before


class LoRARequest(SimpleNamespace): ...


def draw_adapters(manager, members, write):
    manager.members, manager.write = members, write


@dataclasses.dataclass
class SamplingParams:
    temperature: float
    max_tokens: int = 3
    seed: int | None = None
    top_p: float = 1.0
    detokenize: bool = True


class LLM:
    """Attributes: `asked`, the prompts of each call of `generate` as token ids; `adapters`, how many members each call
    had; of the class, `made`, all there are."""

    made: list = []

    def __init__(
        self,
        model,
        tensor_parallel_size=1,
        dtype="auto",
        worker_extension_cls="",
        disable_log_stats=True,
        tokenizer=None,
        max_model_len=None,
        enable_lora=False,
        max_loras=1,
        max_lora_rank=16,
    ):
        self._model = AutoModelForCausalLM.from_pretrained(model).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
        lora = SimpleNamespace(max_loras=max_loras, max_lora_rank=max_lora_rank) if enable_lora else None
        self._worker, self.asked, self.running = Worker(model, self._model, lora), [], True
        self.adapters = []
        config = self._model.config
        stated = SimpleNamespace(
            max_model_len=max_model_len or config.max_position_embeddings, get_vocab_size=lambda: config.vocab_size
        )
        core = SimpleNamespace(shutdown=lambda: setattr(self, "running", False))
        device = SimpleNamespace(device_type="cpu")
        stated = SimpleNamespace(model_config=stated, lora_config=lora, device_config=device)
        self.llm_engine = SimpleNamespace(vllm_config=stated, engine_core=core)
        LLM.made.append(self)

    def get_tokenizer(self):
        return self._tokenizer

    def collective_rpc(self, method, args=(), kwargs=None):
        return [getattr(self._worker, method)(*args, **(kwargs or {}))]

    def generate(self, prompts, settings, use_tqdm=False, lora_request=None):
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        self.asked.append(rows)
        self.adapters.append(len({request.lora_name for request in lora_request or ()}))
        settings = settings if isinstance(settings, list) else [settings] * len(rows)
        requests = [None] * len(rows) if lora_request is None else lora_request
        return [self._asked(*each) for each in zip(rows, settings, requests, strict=True)]

    def _asked(self, row, params, request):
        before = [] if request is None else self._worker.model_runner.lora_manager.weights(request)
        try:
            return self._done(row, params)
        finally:
            with torch.no_grad():
                for weight, bits in before:
                    weight.copy_(bits)

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
        text = self._tokenizer.decode(new, skip_special_tokens=True) if params.detokenize else ""
        ended = "stop" if self._tokenizer.eos_token_id in new else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=new, text=text, finish_reason=ended)])


class RayError(Exception): ...


class RayActorError(RayError): ...


class Reference:
    """What was put into Ray's store, or an actor answers; an error if that has died. `hung`: it never answers."""

    def __init__(self, value, actor=None, hung=False):
        self.value, self.actor, self.hung = value, actor, hung


class Actor:
    """`trouble`, if it is set, is called with each method's name and arguments: it raises what the actor then raises,
    or returns whether it hangs."""

    def __init__(self, kind, args, options):
        self.alive, self.made, self.error, self.trouble = True, None, None, None
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
                if self.trouble is not None and self.trouble(method, *args):
                    return Reference(None, self, hung=True)
                return Reference(getattr(self.made, method)(*args), self)
            except Exception as error:
                return Reference(error, self)

        return SimpleNamespace(remote=remote)


def get(reference, timeout=None):
    if reference.actor is not None and not reference.actor.alive:
        raise RayActorError("the actor died")
    if reference.actor is not None and reference.actor.error is not None:
        raise RayError(str(reference.actor.error))
    if isinstance(reference.value, Exception):
        raise reference.value
    return reference.value


def wait(references, num_returns, timeout=None):
    ready = [reference for reference in references if not reference.hung][:num_returns]
    if not ready:
        assert timeout is not None, "it would wait forever"
        time.sleep(timeout)
    return ready, [reference for reference in references if reference not in ready]


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
    ray.wait = wait
    lora, request = ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    request.LoRARequest = LoRARequest
    for module in (vllm, distributed, ray, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vllm_plugin, "registered", True)
    monkeypatch.setattr(vllm_patches, "draw_adapters", draw_adapters)
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return LLM, kill
