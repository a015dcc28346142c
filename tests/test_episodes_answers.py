"""Answers that are made without the library's validation are the objects that it would make."""

import pytest

from esfast.rollout.episodes.answers import maker
from esfast.rollout.episodes.protocol import CHAT, TEXT, Answer

openai = pytest.importorskip(
    "openai", reason="episodes ask through the package openai: pip install esfast[environments]"
)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CASES = {
    "a chat": (CHAT, {"content": "5 ünï"}),
    "an empty answer": (CHAT, {"content": ""}),
    "calls": (CHAT, {"tool_calls": [CALL]}),
    "calls and a text": (CHAT, {"content": "5", "tool_calls": [CALL]}),
    "a text": (TEXT, {"content": "5"}),
}


def answer_type(kind):
    return openai.types.chat.ChatCompletion if kind is CHAT else openai.types.Completion


def answers(said):
    message = {"role": "assistant", **said}
    return [Answer("esfast-3-0", "member", message, "stop", 7, 1), Answer("esfast-4-1", "a", message, "length", 8, 2)]


def state(value):
    """All that an object of pydantic has, and what that has."""
    if isinstance(value, openai.BaseModel):
        # in the order of its fields
        fields = [(name, state(item)) for name, item in vars(value).items()]
        given, extra, private = (getattr(value, f"__pydantic_{part}__") for part in ("fields_set", "extra", "private"))
        return type(value), fields, (type(given), given), (type(extra), extra), private
    return type(value), [state(item) for item in value] if type(value) is list else value


def changeable(value):
    """What an episode could change in place, by identity."""
    if isinstance(value, openai.BaseModel):
        yield from map(id, (value, vars(value), value.__pydantic_fields_set__, value.__pydantic_extra__))
        value = list(vars(value).values())
    elif not isinstance(value, (str, int, type(None))):
        yield id(value)
    for item in value if type(value) is list else ():
        yield from changeable(item)


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_the_object_that_the_library_makes_of_its_json(case):
    kind, said = CASES[case]
    made_of = maker(kind, answer_type(kind))
    for answer in answers(said):
        made, real = made_of(answer), answer_type(kind).model_validate(kind.json(answer))
        # as in answers that came by HTTP
        vars(real)["_request_id"] = None
        assert state(made) == state(real) and made == real and repr(made) == repr(real)
        for options in ({}, {"exclude_unset": True}, {"exclude_none": True}):
            assert made.model_dump(**options) == real.model_dump(**options)
            assert made.model_dump_json(**options) == real.model_dump_json(**options)


@pytest.mark.parametrize("case", CASES)
def test_what_is_done_to_an_answer_changes_no_other(case):
    kind, said = CASES[case]
    made_of = maker(kind, answer_type(kind))
    first, second = (made_of(answers(said)[0]) for _ in range(2))
    before = state(second)
    assert not set(changeable(first)) & set(changeable(second))
    first.system_fingerprint, first.usage.total_tokens, first.choices[0].further = "a", 5, [1]
    first.choices.append(first.choices[0])
    assert first.model_dump() != second.model_dump() and first.choices[1].further == [1]
    assert state(second) == before == state(made_of(answers(said)[0]))
