"""Chats as prompts: rendered as TRL's data_utils does it, continued where they end with the assistant's words."""

import copy
import json

import pytest
import torch

import esfast
from esfast.rollout import chat
from esfast.tasks import embedded

CHATML = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
ONLY_TEXTS = "{% for m in messages %}<{{ m.role }}>{{ m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
ONLY_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PRINTS_WHATEVER = ONLY_TEXTS.replace("m.content + '\n'", "m.content }}{{ '\n'")
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + ONLY_TEXTS


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.fixture
def tokenizer():
    made = embedded.make_tokenizer()
    made.chat_template = CHATML
    return made


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, user("Make 6 of 1 2 3.")]},
        {"prompt": [user("Make 6 of 1 2 3."), assistant("Let me think.\n<think>")]},
        {"prompt": [user("1"), assistant("2"), user("3"), assistant("")]},
        {"prompt": [user(parts("What ", "is it? ")), assistant(parts("It", " is"))]},
        {"prompt": [user("add"), CALL, {"role": "tool", "content": "3"}], "tools": [TOOL]},
        {"prompt": [user("add")], "tools": []},
        {"prompt": [user("1")], "chat_template_kwargs": {"enable_thinking": False}},
        {"prompt": [user("1"), assistant("It is")], "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_as_trl_renders_it(tokenizer, row):
    data_utils = pytest.importorskip("trl.data_utils", reason="needs trl, to compare with what it is today")
    given = copy.deepcopy(row)
    theirs = {key: value for key, value in row.items() if key != "tools"}
    wanted = data_utils.maybe_apply_chat_template(theirs, tokenizer, row.get("tools"))["prompt"]
    assert chat.render([row], tokenizer) == [wanted] and row == given


def test_a_continued_message_has_no_end_and_begins_no_other(tokenizer):
    row = {"prompt": [user("Make 6."), assistant("Let me think.\n<think>")]}
    assert chat.render([row], tokenizer) == [
        "<|im_start|>user\nMake 6.<|im_end|>\n<|im_start|>assistant\nLet me think.\n<think>"
    ]


def test_reward_functions_get_the_whole_message(tmp_path, tokenizer):
    """A message that the model continues is whole in the completion and removed from the prompt, as in TRL, so that
    prompt + completion is the conversation."""
    torch.manual_seed(0)
    model, seen = embedded.make_model(tokenizer), {}
    rows = [
        {"prompt": [user("a"), assistant("so: ")], "n": 0},
        {"prompt": [user("b"), assistant(parts("s", "o: "))], "n": 1},
        {"prompt": [user("c")], "n": 2},
        {"prompt": "d", "n": 3},
    ]
    given = copy.deepcopy(rows)

    def reward(prompts, completions, n, **columns):
        seen.update({i: (p, c) for i, p, c in zip(n, prompts, completions, strict=True)})
        return [float(len(str(c))) for c in completions]

    settings = {"output_dir": str(tmp_path), "generations": 1, "population_size": 2, "progress": False}
    config = esfast.ESConfig(**settings, prompts_per_generation=4, chat_template_kwargs={"enable_thinking": False})
    asked = []

    def engine(texts):
        asked.extend(texts)
        return ["yes"] * len(texts)

    esfast.ESTrainer(model, reward, config, rows, rows, tokenizer, engine=engine).train()
    assert rows == given
    assert seen == {
        0: ([user("a")], [assistant("so: yes")]),
        1: ([user("b")], [assistant("so: yes")]),
        2: ([user("c")], [assistant("yes")]),
        3: ("d", "yes"),
    }
    assert "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think></think>" in asked


@pytest.mark.parametrize("template", [ONLY_TEXTS, PRINTS_WHATEVER, ONLY_PARTS, STRICT])
def test_content_takes_the_form_that_the_template_reads(tokenizer, template):
    tokenizer.chat_template = template
    rows = [
        {"prompt": [user(content), assistant(content)]} for content in ("1 + 1", parts("1 ", "+ 1"), parts("1 + 1"))
    ]
    assert chat.render(rows, tokenizer) == ["<user>1 + 1\n<assistant>1 + 1"] * 3


def test_what_a_dataset_adds_to_records_is_left_out(tokenizer):
    """The columns of a datasets.Dataset have the keys of all rows; a row without a key gets None."""
    datasets = pytest.importorskip("datasets", reason="needs datasets, an optional package")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.keys() | list }}{{ m.content }}{% endfor %}{{ tools }}{{ mode }}"
    )
    rows = [
        {"prompt": [{**user("1"), "name": "Ann"}], "chat_template_kwargs": {"mode": "a"}, "tools": [{"name": "x"}]},
        {"prompt": [user("2")], "chat_template_kwargs": {"other": 1}, "tools": [{"name": "y", "more": 1}]},
    ]
    options = {"mode": "default"}
    wanted = chat.render(rows, tokenizer, options)
    assert chat.render(datasets.Dataset.from_list(rows), tokenizer, options) == wanted
    assert wanted[0].endswith("1[{'name': 'x'}]a") and wanted[1].endswith("2[{'name': 'y', 'more': 1}]default")
    as_json = [
        {**row, "tools": json.dumps(row["tools"]), "chat_template_kwargs": json.dumps(row["chat_template_kwargs"])}
        for row in rows
    ]
    assert chat.render(as_json, tokenizer, options) == wanted


def test_values_that_are_missing_and_tools_as_texts(tokenizer):
    """A table has NaN or a blank where a row has no value; some data sets have a text for each tool."""
    chats = {"prompt": [user("1")]}
    wanted = chat.render([chats], tokenizer)
    for missing in (None, float("nan"), "", " ", "null"):
        assert chat.render([{**chats, "tools": missing, "chat_template_kwargs": missing}], tokenizer) == wanted
    with_tool = chat.render([{**chats, "tools": [TOOL]}], tokenizer)
    assert chat.render([{**chats, "tools": [json.dumps(TOOL)]}], tokenizer) == with_tool != wanted


IMAGE = {"type": "image", "image": "cat.png"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": []}, "a chat needs at least one message"),
        ({"prompt": [{"role": "usr", "content": "1"}]}, "message 0 has the role 'usr', expected one of system, "),
        ({"prompt": [{"content": "1"}]}, "message 0 has the role None"),
        ({"prompt": [SYSTEM]}, "the last message has the role 'system', expected user or tool"),
        ({"prompt": [user([IMAGE, *parts("?")])]}, "message 0 has content of type 'image'; only text can be had"),
        ({"prompt": [user([{"type": "input_audio"}])]}, "content of type 'input_audio'"),
        ({"prompt": [user(["1"])]}, "content of type 'str'"),
        ({"prompt": [user(None)]}, "message 0 has the content None, expected a text"),
        ({"prompt": [user("1"), user(7)]}, "message 1 has the content 7, expected a text"),
        ({"prompt": [user("1"), {**CALL, "content": None}]}, "no text that could be continued"),
        ({"prompt": [user("1")], "tools": "add"}, "tools: expected JSON, got 'add'"),
        ({"prompt": [user("1")], "tools": {"name": "add"}}, "tools: expected a list of JSON schemas"),
        ({"prompt": [user("1")], "tools": ["add"]}, "tools: expected JSON, got 'add'"),
        ({"prompt": [user("1")], "chat_template_kwargs": {"tokenize": True}}, "'tokenize' is not to be chosen"),
        ({"prompt": [user("1")], "chat_template_kwargs": [1]}, "chat_template_kwargs: expected a dict"),
        ({"prompt": [user("1")], "chat_template_kwargs": "3"}, "chat_template_kwargs: expected a dict"),
        ({"prompt": [user("1")], "chat_template_kwargs": True}, "chat_template_kwargs: expected a dict"),
        ({"prompt": [user("1")], "chat_template_kwargs": {1: 2}}, "chat_template_kwargs: expected a dict"),
    ],
)
def test_what_is_no_chat_of_texts_is_refused(tokenizer, row, message):
    with pytest.raises(ValueError) as caught:
        chat.render([{"prompt": "1"}, row], tokenizer)
    assert message in str(caught.value)


def test_what_the_template_refuses(tokenizer):
    tokenizer.chat_template = STRICT
    with pytest.raises(ValueError, match="prompt: the tokenizer's chat template refuses the chat: no system"):
        chat.render([{"prompt": [SYSTEM, user("1")]}], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="prompt: .*needs a tokenizer with a chat template"):
        chat.render([{"prompt": [user("1")]}], tokenizer)


@pytest.mark.parametrize("bad", [{"prompt": [SYSTEM]}, {"prompt": [user([IMAGE])]}])
def test_they_are_refused_before_anything_is_done(tmp_path, tokenizer, bad):
    model = embedded.make_model(tokenizer)
    config = esfast.ESConfig(output_dir=str(tmp_path / "run"), progress=False)
    for what, rows in (("train_dataset", ([bad], None)), ("eval_dataset", ([{"prompt": "1"}], [bad]))):
        with pytest.raises(ValueError, match=f"{what}: row 0: prompt: "):
            esfast.ESTrainer(model, lambda completions, **k: [], config, *rows, tokenizer)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_the_setting(given):
    assert esfast.ESConfig(chat_template_kwargs=given).chat_template_kwargs == {"enable_thinking": False}
    for wrong, error in (("text", TypeError), ([1], TypeError), ({"tokenize": True}, ValueError)):
        with pytest.raises(error, match="ESConfig.chat_template_kwargs: "):
            esfast.ESConfig(chat_template_kwargs=wrong)


@pytest.mark.parametrize(
    "message",
    [user("5"), {"content": "5", "role": "user"}, {"name": "a", "content": "ünï", "role": "user", "more": ""}],
)
def test_a_message_of_texts_is_rendered_as_one_with_other_fields(tokenizer, message):
    """What needs no look for None comes to the template in the same order: its content last."""
    tokenizer.chat_template = "{{ messages | tojson }}"
    before = json.dumps(message)
    (text,), (other,) = (chat.render([{"prompt": [m]}], tokenizer) for m in (message, {**message, "tool_calls": None}))
    assert text == other and list(json.loads(text)[0])[-1] == "content"
    assert json.dumps(message) == before
