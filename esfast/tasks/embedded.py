"""The embedded model: a tiny Qwen2 that esfast makes itself, so that everything can be tried with nothing to download.

It has about 124 000 weights and a tokenizer of bytes. It is pre-trained in about a minute on one CPU core, on worked
examples of one task: its "compact" prompts, and only problems of the split "train". Those of Countdown have three
numbers from 1 to 9. The model learns to calculate a little, and to put the result into answer tags only if the first
number is small. So it can do more than its rewards show, as a pre-trained language model can, and ES has something to
bring out. The RECIPE of each task's module says how its examples are made.
"""

import ast
import hashlib
import os
import re
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from ..core import random_stream
from ..utils.errors import BadValue, FileTaken
from ..utils.files import check_writable, whole_folder
from . import GAMES, MODULES, base, environment, gym, gym_options, gym_problems, tags

STEPS = 1600
BATCH = 64
LEARNING_RATE = 3e-3
CORPUS = 20  # thousands of worked examples
STYLE = "compact"  # of the prompts
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def cached(seed: int = 0, progress: bool = True, task: str = "countdown") -> Path:
    """Folder of the embedded model for a task, built on first use, under $ESFAST_CACHE or else ~/.cache/esfast.

    The folder's name holds a hash of the code that makes the model, without comments and docstrings, so that a changed
    recipe never uses an old model; and the version of transformers, since older releases can't read the tokenizer of
    newer ones. ValueError for a task without a recipe.
    """
    files = (__file__, *_made_for(task)[1], base.__file__, tags.__file__, random_stream.__file__)
    code = "".join(code_of(Path(file).read_text(encoding="utf-8")) for file in files)
    digest = hashlib.sha256(code.encode()).hexdigest()[:12]
    root = Path(os.environ.get("ESFAST_CACHE") or Path.home() / ".cache" / "esfast").expanduser()
    named = re.sub(r"[^\w.+-]+", "-", task)
    if named != task:
        named = f"{named[:40]}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"
    folder = root / f"embedded-{named}-{digest}-transformers{transformers.__version__}-seed{seed}"
    if not folder.exists():
        check_writable("the folder of the embedded model (set ESFAST_CACHE to another one)", folder, folder=True)
        try:
            build(folder, seed, progress=progress, task=task)
        except OSError:
            if not folder.exists():  # else another process was faster, and its model is the same
                raise
    return folder


def code_of(text: str) -> str:
    """What a module's text does, as Python's parser reads it: without comments, docstrings and layout."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node) is not None:
                del node.body[0]
    return ast.dump(tree)


def build(
    folder: str | os.PathLike,
    seed: int = 0,
    steps: int = STEPS,
    progress: bool = True,
    task: str = "countdown",
    recipe: base.Recipe | None = None,
) -> Path:
    """Makes, pre-trains and saves the embedded model as an ordinary Hugging Face folder, whole or not at all.

    The same seed and steps give the same weights to the bit on the same machine and versions, since one thread does a
    fixed number of steps. The caller's random state and number of threads stay as they are. A `recipe` takes the place
    of the task's.
    Raises FileExistsError if `folder` is there already, ValueError if steps is below 1 or the task has no recipe.
    """
    folder, recipe = Path(folder), recipe or _made_for(task)[0]
    if folder.exists():
        raise FileTaken(f"{folder} exists: remove it or build the embedded model in another folder")
    if steps < 1:
        raise BadValue(f"steps must be at least 1, got {steps}")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # at this size more threads only wait for each other
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(seed)  # of the CPU only: fork_rng forks no other
            tokenizer = make_tokenizer()
            tokenizer.chat_template = recipe.chat_template
            model = make_model(tokenizer)
            _pretrain(model, _corpus(tokenizer, seed, recipe), steps, progress)
        # saved with the model, so that `esfast eval` of a tuned one asks as it was taught
        model.config.prompt_task, model.config.prompt_style = task, STYLE
        with whole_folder(folder, replace=False) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    finally:
        torch.set_num_threads(threads)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that any text survives the round trip, plus one for each of the tags, for pad and eos.
    (From its folder, AutoTokenizer makes it a Qwen2Tokenizer, with equal ids but text brought to Unicode form NFC.)

    The tags are ordinary tokens: skip_special_tokens=True leaves them in the text, where the reward looks for them.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",  # Qwen2's: AutoTokenizer would add it, one beyond the embeddings
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """The untrained model in float32: 2 layers of width 64, tied embeddings. Draws from torch's global generator."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _pretrain(model: Qwen2ForCausalLM, corpus: tuple[torch.Tensor, torch.Tensor], steps: int, progress: bool) -> None:
    ids, labels = corpus
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    model.train()
    bar = tqdm(range(steps), desc="pre-training the embedded model", unit="step", disable=not progress)
    for _ in bar:
        batch = torch.randint(len(ids), (BATCH,))
        loss = model(input_ids=ids[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if bar.n % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def _corpus(tokenizer, seed: int, recipe: base.Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (examples, longest), padded on the right; only completions are labelled (not -100)."""
    pairs = recipe.examples(seed, CORPUS)
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    completions = tokenizer([completion + tokenizer.eos_token for _, completion in pairs])["input_ids"]
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        ids[i, : len(p) + len(c)] = torch.tensor(p + c)
        labels[i, len(p) : len(p) + len(c)] = torch.tensor(c)
    return ids, labels


def settings(task: str) -> dict:
    """ES settings, fields of ESConfig, under which the embedded model learns the task reliably within minutes."""
    return dict(_made_for(task)[0].settings)


def _made_for(task: str) -> tuple[base.Recipe, tuple[str, ...]]:
    """The recipe for a task, and the files that its code is in."""
    known = MODULES | GAMES
    if task.startswith(gym.PREFIX):
        files = (str(module.__file__) for module in (gym, gym_problems, gym_options))
        return gym.recipe(task.removeprefix(gym.PREFIX)), tuple(files)
    if task.startswith(environment.PREFIX):
        # The model that knows conversations
        task = "guess"
    if task not in known:
        raise BadValue(f"the embedded model knows only {', '.join(known)} and gym:NAME, not {task!r}: give a --model")
    return known[task].RECIPE, (str(known[task].__file__),)
