"""An unmodified environment of verifiers v1: a taskset with a harness that talks in this process."""

import contextlib
import shutil
import sys

import pytest
from playing import play, small_engine, small_model

from esfast.cli import main
from esfast.rollout.episodes import Episodes, Limits, Settings
from esfast.tasks import get
from esfast.tasks.verifiers import Verifiers

pytest.importorskip("openai", reason="episodes ask through the package openai: pip install esfast[environments]")

MINE = """
import verifiers.v1 as vf
from openai import AsyncOpenAI


class SumsConfig(vf.TasksetConfig):
    count: int = 12


class Sum(vf.Task):
    @vf.reward
    async def spoken(self, trace) -> float:
        return float(len(trace.assistant_messages))


class Sums(vf.Taskset[Sum, SumsConfig]):
    def load(self):
        for i in range(self.config.count):
            yield Sum(vf.TaskData(prompt=f"{i}+{i}"), self.config.task)


class Twice(vf.Harness):
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, tool_interception_url=None):
        client = AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0)
        messages = [{"role": "user", "content": data.prompt}]
        for turn in range(2):
            answer = await client.chat.completions.create(model=ctx.model, messages=messages)
            messages += [
                {"role": "assistant", "content": answer.choices[0].message.content},
                {"role": "user", "content": "again"},
            ]
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["Sums", "Twice"]
"""


TOOLS = """
import verifiers.v1 as vf


class Adder(vf.Toolset[vf.ToolsetConfig]):
    @vf.tool
    async def add(self, a: int, b: int) -> str:
        \"\"\"The sum of two numbers.\"\"\"
        return str(a + b)


class Sum(vf.Task):
    @classmethod
    def toolsets(cls, config):
        return [Adder(vf.ToolsetConfig())]

    @vf.reward
    async def right(self, trace) -> float:
        return float(trace.assistant_messages[-1].content == "21!")


class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
    def load(self):
        for i in range(8):
            yield Sum(vf.TaskData(prompt=f"{i}+{i}"), self.config.task)


__all__ = ["Sums"]

if __name__ == "__main__":
    Adder.run()
"""
needs_uv = pytest.mark.skipif(shutil.which("uv") is None, reason="the harness null is a program that the tool uv runs")


@pytest.fixture(scope="module")
def engine():
    return small_engine()


@pytest.fixture
def sums(tmp_path, monkeypatch):
    pytest.importorskip("verifiers.v1", reason="an unmodified environment of verifiers: pip install esfast[verifiers]")
    (tmp_path / "sums_vf.py").write_text(MINE)
    (tmp_path / "bare_vf.py").write_text(MINE.replace('"Sums", "Twice"', '"Sums"'))
    monkeypatch.syspath_prepend(tmp_path)
    yield "sums_vf"
    for name in ("sums_vf", "bare_vf", "tools_vf"):
        sys.modules.pop(name, None)


def test_an_unmodified_environment_plays_against_a_member(engine, sums):
    environment = Verifiers(sums)
    rows = environment.rows(0, 4, 1)
    assert rows == environment.rows(0, 4, 1) and len(rows) == 4
    everything = {row["task"] for row in environment.rows(0, 99, 1)}
    held_out = {row["task"] for row in environment.held_out(99)}
    assert not everything & held_out and everything | held_out == set(range(12))
    episodes = play(engine, environment, rows, limits={"seconds": 120.0})
    assert [(e.error, e.reward, e.turns) for e in episodes] == [(None, 2.0, 2)] * 4
    for row, episode in zip(rows, episodes, strict=True):
        told = [m["content"] for m in episode.messages]
        assert told[0] == f"{row['task']}+{row['task']}" and told[2] == "again"
        assert told[1] == engine.generate([f"{told[0]}="])[0]


def test_episodes_that_fail_say_what_the_library_says(engine, sums):
    (episode,) = play(engine, Verifiers(sums), [{"task": 0}], limits={"seconds": 120.0, "turns": 1})
    assert episode.reward is None and "has used its 1 turns (max_episode_turns)" in episode.error


def test_options_are_the_librarys(sums):
    assert len({row["task"] for row in Verifiers(f"{sums}?taskset.count=40").rows(0, 99, 1)}) > 12
    assert get("environment:verifiers:sums_vf?agent.max_turns=1").max_new_tokens == 512
    for options, words in {
        "agent.turns=1": "turns",
        "taskset.count=many": "count",
        "taskset": "expected FIELD=VALUE",
        "taskset=1": "taskset has fields",
        "taskset.count=1&taskset.count=2": "each field once",
        "agent=1&agent.max_turns=1": "each field once",
        "taskset.count=0": "no tasks to train on",
    }.items():
        with pytest.raises(ValueError, match=words):
            Verifiers(f"{sums}?{options}")


def test_unknown_environments_are_errors_at_the_door(sums, capsys, tmp_path):
    with pytest.raises(ValueError, match="verifiers can't make 'nowhere_vf': .*not found"):
        get("environment:verifiers:nowhere_vf")
    assert main(["train", "--environment", "verifiers:nowhere_vf", "--out", str(tmp_path / "run")]) == 1
    assert "verifiers can't make 'nowhere_vf'" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_no_agent_runs_here_what_the_model_writes(sums):
    # bash is what the library takes without a word, and would run on this machine
    with pytest.raises(ValueError, match=r"'bash' of agent would run on this machine .*agent.runtime.type=docker"):
        Verifiers("bare_vf?agent.harness.id=bash")
    assert Verifiers("bare_vf").rows(0, 1, 1)
    assert Verifiers("bare_vf?agent.harness.id=bash&agent.runtime.type=docker").rows(0, 1, 1)


@needs_uv
def test_the_librarys_own_harness_talks_with_a_member(engine, sums):
    (episode,) = play(engine, Verifiers("bare_vf"), [{"task": 3}], limits={"seconds": 300.0})
    assert (episode.error, episode.reward, episode.turns) == (None, 1.0, 1)
    assert episode.messages[0]["content"] == "3+3"


@needs_uv
def test_the_model_calls_the_tools_of_an_environment(sums, tmp_path, monkeypatch):
    (tmp_path / "tools_vf.py").write_text(TOOLS)
    # a tool server is a process that imports the environment, as it would an installed one
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tokenizer = small_model()[1]
    tokenizer.chat_template = (
        "{{ tools[0].function.name }}|{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    )

    class Caller:
        max_new_tokens, tokens = 40, 0

        def generate(self, prompts, seeds=None):
            call = '<tool_call>{"name": "NAME", "arguments": {"a": 20, "b": 1}}</tool_call>'
            return ["21!" if "tool:21" in p else call.replace("NAME", p.split("|")[0]) for p in prompts]

        def close(self):
            pass

    episodes = Episodes(Verifiers("tools_vf"), Caller(), tokenizer, Settings(Limits(seconds=300)))
    with contextlib.closing(episodes):
        (episode,) = episodes.generate([{"task": 1}])
    assert (episode.error, episode.reward, episode.turns) == (None, 1.0, 2)
    assert [m["role"] for m in episode.messages] == ["user", "assistant", "tool", "assistant"]


def test_another_api_of_verifiers_is_named(sums, monkeypatch):
    monkeypatch.delattr("verifiers.v1.configs.agent.agent_config_fields")
    with pytest.raises(ImportError, match=r"needs the package verifiers, 0.4 or later"):
        Verifiers(sums)


def test_without_verifiers_the_name_says_what_to_install(monkeypatch):
    for name in ("verifiers", "verifiers.v1", "verifiers.v1.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs the package verifiers, 0.4 or later .*esfast\[verifiers\]"):
        Verifiers("sums")
