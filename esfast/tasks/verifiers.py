"""Environments of the library verifiers (v1): `--environment verifiers:NAME`."""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..utils.errors import BadImport, BadValue, EsfastError
from .base import draw, split_of

# Tasks that are taken of a taskset without an end.
MOST = 10_000


class Verifiers:
    """An environment of verifiers by the name of its taskset, unmodified: `gsm8k-v1`, `gsm8k-v1?taskset.split=train`.

    Options are fields of the library's configuration of the environment (EnvConfig), by their paths. Agents run on this
    machine (the runtime "subprocess"), and without a harness of the taskset's own with "null", which only talks. Their
    requests reach the member on a port of this machine. The reward of an episode is the sum of its traces' rewards. A
    hash of each task holds out a quarter.

    Raises ImportError if verifiers is missing or has another API, ValueError if it can't make the environment, or if an
    agent would run on this machine what the model writes.
    """

    needs_port = True
    max_new_tokens = 512

    def __init__(self, spec: str):
        name, _, query = spec.partition("?")
        try:
            from verifiers.v1.configs.agent import agent_config_fields
            from verifiers.v1.utils import loaders
        except ImportError as error:
            raise BadImport(
                f"environment: verifiers:{name} needs the package verifiers, 0.4 or later (pip install "
                f"'esfast[verifiers]'): {error}"
            ) from None
        try:
            self._environment = loaders.load_environment(_config(loaders, agent_config_fields, name, _options(query)))
            tasks = self._environment.taskset
            self._tasks = list(tasks if tasks.bounded else tasks.take(MOST))
            identities = [task.data.model_dump_json(exclude={"idx"}) for task in self._tasks]
        except EsfastError:
            raise
        except (Exception, SystemExit) as error:
            # The library and the user's taskset raise exceptions of many types.
            raise BadValue(f"environment: verifiers can't make {spec!r}: {type(error).__name__}: {error}") from error
        splits: dict[str, list[dict]] = {"train": [], "test": []}
        for number, identity in enumerate(identities):
            splits[split_of(identity)].append({"task": number})
        if not splits["train"]:
            raise BadValue(f"environment: verifiers:{spec} has no tasks to train on")
        self._splits = splits

    def rows(self, generation: int, count: int, seed: int) -> list[dict]:
        return [dict(row) for row in draw(self._splits["train"], generation, count, seed)]

    def held_out(self, count: int) -> list[dict]:
        return self._splits["test"][:count]

    async def episode(self, client: Any, row: Mapping[str, Any]) -> float:
        from verifiers.v1.clients import EvalClientConfig, ModelContext

        # Each episode has an interception server of its own, which the library keeps in the environment.
        environment = copy.copy(self._environment)
        with _in_environ(client.api_key) as variable:
            member = EvalClientConfig(base_url=str(client.base_url), api_key_var=variable)
            async with environment.serving():
                played = await environment.run_episode(
                    self._tasks[row["task"]], ModelContext(model=client.model, client=member)
                )
        if not played.ok:
            errors = [*played.errors, *(error for trace in played.traces for error in trace.errors)]
            raise RuntimeError("; ".join(f"{error.type}: {error.message}" for error in errors) or "it is not ok")
        return float(sum(trace.reward for trace in played.traces))


def _config(loaders: Any, agents_of: Callable[[Any], dict[str, Any]], name: str, options: dict[str, Any]) -> Any:
    """The configuration of the environment. ValueError if an agent would run what the model writes on this machine."""
    asked = {**options, "taskset": {**_section(options, "taskset"), "id": name}}
    quiet = loaders.default_harness_id(name) == "bash"
    for role, declared in agents_of(loaders.resolve_env_config(asked)).items():
        here = dict(_section(asked, role))
        if declared.runtime.type == "prime" and "runtime" not in here:
            here["runtime"] = {"type": "subprocess"}
        if declared.harness is None and quiet:
            here["harness"] = {"id": "null"}
        asked[role] = here
    config = loaders.resolve_env_config(asked)
    for role, agent in agents_of(config).items():
        harness = config.agent_harnesses()[role]
        if agent.runtime.type == "subprocess" and loaders.harness_class(harness.id).EXECUTES_CODE:
            raise BadValue(
                f"environment: verifiers:{name}: the harness {harness.id!r} of {role} would run on this machine what "
                f"the model writes; give it a container, {role}.runtime.type=docker, or the harness that only talks, "
                f"{role}.harness.id=null"
            )
    return config


def _options(query: str) -> dict[str, Any]:
    """`a.b=1&c=x` as {"a": {"b": "1"}, "c": "x"}. ValueError for another form."""
    options: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        path, equals, value = pair.partition("=")
        *sections, last = path.split(".")
        place = options
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                break
        if not equals or not all([*sections, last]) or not isinstance(place, dict) or last in place:
            raise BadValue(f"environment: verifiers: expected FIELD=VALUE, each field once, got {pair!r:.60}")
        place[last] = value
    return options


def _section(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = options.get(name, {})
    if not isinstance(section, Mapping):
        raise BadValue(f"environment: verifiers: {name} has fields, {name}.FIELD=VALUE; got {section!r:.60}")
    return section


@contextlib.contextmanager
def _in_environ(key: str) -> Iterator[str]:
    """The name of an environment variable with the key, from where the library's clients read theirs. What agents start
    does not inherit it: the library leaves out variables that have API_KEY in their names."""
    variable = f"ESFAST_API_KEY_{secrets.token_hex(8).upper()}"
    os.environ[variable] = key
    try:
        yield variable
    finally:
        del os.environ[variable]
