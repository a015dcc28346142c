"""What the tests of a real vLLM engine run under: `make test-vllm`, in an environment of its own. Elsewhere they skip."""

import os

import pytest

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # up in 4 s rather than 30
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # more only wait for each other, at this size
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_COMPILE_DISABLE": "1",
}
LENGTH = 512
MODELS = ("qwen2-tied", "qwen2-untied", "llama-tied", "llama-untied")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: vLLM reads cache that it has not written, and masks it."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder(name): a tiny random bfloat16 model whose vocabulary vLLM pads (1000 to 1024 rows)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from esfast.tasks import embedded

    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            config, model = (Qwen2Config, Qwen2ForCausalLM) if "qwen2" in name else (LlamaConfig, LlamaForCausalLM)
            made[name] = tmp_path_factory.mktemp("models") / name
            model(
                config(
                    vocab_size=1000,
                    hidden_size=128,
                    intermediate_size=192,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=LENGTH,
                    tie_word_embeddings="untied" not in name,
                    bos_token_id=0,
                    eos_token_id=1,
                    initializer_range=0.1,
                )
            ).to(torch.bfloat16).save_pretrained(made[name])
            embedded.make_tokenizer().save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="module")
def one_ray():
    """Ray on this machine, for the fleets of a module's tests."""
    ray = pytest.importorskip("ray", reason="Ray is not installed here; `make test-vllm` runs these tests where it is")
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=2)
    yield
    ray.shutdown()


class Engine:
    """An LLM, and the Hugging Face model that it was loaded from."""

    def __init__(self, path, **options):
        import torch
        from transformers import AutoModelForCausalLM
        from vllm import LLM

        import esfast

        options = {
            "worker_extension_cls": "esfast.integrations.vllm.WorkerExtension",
            "max_num_seqs": 8,
            "dtype": "bfloat16",
        } | options
        self.path = path
        self.llm = LLM(str(path), enforce_eager=True, max_model_len=LENGTH, **options)
        self.hf = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, options["dtype"]))
        self.plan = esfast.Plan(self.hf)

    def rpc(self, method, *args, **kwargs):
        return self.llm.collective_rpc(method, args=args, kwargs=kwargs)

    def fingerprint(self):
        found = set(self.rpc("esfast_fingerprint"))
        assert len(found) == 1  # all ranks agree
        return found.pop()

    def tokens(self, length=12, prompts=("What is the sum of 3 and 4? " * 12, "Hello")):
        from vllm import SamplingParams

        done = self.llm.generate(list(prompts), SamplingParams(temperature=0, max_tokens=length), use_tqdm=False)
        return [list(d.outputs[0].token_ids) for d in done]

    def members(self, seeds, sigmas, rank):
        """Members of low-rank noise as LoRA adapters, the same from all ranks."""
        from vllm.lora.request import LoRARequest

        given = self.rpc("esfast_members", seeds, sigmas, rank)
        assert all(adapters == given[0] for adapters in given)
        return [LoRARequest(**fields) for fields in given[0]]

    def ask(self, adapters, rows, length=8):
        """The tokens of each adapter for each prompt, in one batch."""
        from vllm import SamplingParams

        done = self.llm.generate(
            [{"prompt_token_ids": row} for _ in adapters for row in rows],
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True),
            use_tqdm=False,
            lora_request=[adapter for adapter in adapters for _ in rows],
        )
        found = [list(d.outputs[0].token_ids) for d in done]
        return [found[i : i + len(rows)] for i in range(0, len(found), len(rows))]

    def assert_greedy(self, rows, answers):
        """The answers are those of the Hugging Face model as it is now, greedy; where two tokens are equally likely to
        4 digits, either."""
        import torch

        for row, answer in zip(rows, answers, strict=True):
            with torch.no_grad():
                logits = self.hf(input_ids=torch.tensor([row + answer])).logits[0, len(row) - 1 : -1]
            short = logits.max(-1).values - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
            assert short.max() < 1e-4 * logits.abs().max(), (row, answer, short)

    def assert_forgets_other_weights(self):
        """The prompt is the same at every call, so keys of the weights before would be taken for it. Returns each seed's
        tokens as they are without any keys of before."""
        fresh = {}
        for seed in (1, 2):
            self.rpc("perturb_self_weights", seed, 0.05)
            self.llm.reset_prefix_cache()
            fresh[seed] = self.tokens()
            self.rpc("restore_self_weights", seed, 0.05)
        assert fresh[1] != fresh[2]
        for seed in (2, 1):
            self.tokens()
            self.rpc("perturb_self_weights", seed, 0.05)
            assert self.tokens() == fresh[seed]
            self.rpc("restore_self_weights", seed, 0.05)
        return fresh

    def close(self):
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def start(folder):
    """start(name, **options): an Engine."""

    def begin(name, **options):
        return Engine(folder(name), **options)

    return begin
