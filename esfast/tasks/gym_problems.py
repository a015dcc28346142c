"""A process that makes reasoning-gym's problems: the same ones for the same arguments, in every run and process.

Some tasks of reasoning-gym go through Python's sets of texts, whose order differs from process to process unless
PYTHONHASHSEED is fixed when Python starts; others draw from global generators, seed them, or print. A process of its
own has a fixed hash seed, keeps all that away from the run, and can be stopped if options let a task search for ever.
It gets requests and gives answers in JSON. The parts of a problem that a grader needs travel as a Python literal
(tuples stay tuples), which is read back and never evaluated.
"""

from __future__ import annotations

import ast
import atexit
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..core.random_stream import RandomStream
from ..utils.child import child
from ..utils.errors import BadType, BadValue
from ..utils.interrupts import blocked, outlive
from .base import split_of
from .gym_options import PREFIX, Part, dataset, names, parse, require_package

log = logging.getLogger(__name__)

# Seconds without a problem, after which the process is stopped.
PATIENCE = 300
# Seconds after which a message says that the making takes time.
QUIET = 15
# Problems of one seed of reasoning-gym's: its datasets draw problem i from seed + i.
CHUNK = 64
# Draws in a row that give nothing new, after which a task counts as exhausted.
FRUITLESS = 400
# Metadata that names what a problem was made from. All that was made from one thing belongs to one split.
SOURCES = {"arc_agi": "task_id"}
# For which an answer is given elsewhere than in "answer": any of many answers is right.
ANSWERS = {
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}


def make(spec: str, count: int, seed: str, split: str) -> list[dict[str, Any]]:
    """At most `count` different problems, the same for the same arguments. No problem is in both "train" and "test". If
    fewer are found, a warning says so.

    Each is a dict of `problem` (the task and its options), `question`, `answer` (None if reasoning-gym gives none), and
    `entry` (what the task's grader needs, as a Python literal).

    Raises ValueError or TypeError for a wrong spec and if there is no problem; ImportError without reasoning-gym.
    """
    require_package()
    parse(spec)
    return _Process.of_this_run().ask({"spec": PREFIX + spec, "count": count, "seed": seed, "split": split})


def known() -> list[str]:
    """The names of reasoning-gym's tasks."""
    require_package()
    return [row["name"] for row in _Process.of_this_run().ask({"spec": "the names"})]


class _Process:
    """This side of the process. It ends when the connection is closed, which the end of this process does too."""

    _running: _Process | None = None

    @classmethod
    def of_this_run(cls) -> _Process:
        if cls._running is None or cls._running._process.poll() is not None:
            cls._running = cls()
            atexit.register(cls._running.stop)
        return cls._running

    def __init__(self):
        mine, theirs = socket.socketpair()
        with mine, theirs, blocked():
            self._process = subprocess.Popen(
                child("from esfast.tasks.gym_problems import serve; serve(int(sys.argv[1]))", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"PYTHONHASHSEED": "0"},
            )
            self._connection = Connection(mine.detach())

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers to a request. ValueError or TypeError as the process has it, and if it is silent for too long."""
        try:
            rows, last = self._exchange(request)
        except (EOFError, OSError):
            self.stop()
            raise BadValue(
                f"task: the process that makes problems of {request['spec']} ended (status {self._process.returncode})"
            ) from None
        except BaseException:
            # What is on its way belongs to this request, and must not be read as an answer to the next.
            self.stop()
            raise
        if "error" in last:
            raise (BadType if last["type"] else BadValue)(last["error"])
        if last["note"]:
            log.warning("%s: %s", request["spec"], last["note"])
        return rows

    def _exchange(self, request: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        self._connection.send_bytes(json.dumps(request).encode())
        rows: list[dict[str, Any]] = []
        began, said = time.monotonic(), False
        while True:
            if not self._connection.poll(PATIENCE):
                raise BadValue(
                    f"task: {request['spec']} gave no problem in {PATIENCE} s: other options may be easier to meet, or "
                    "there is no such problem"
                )
            answer = json.loads(self._connection.recv_bytes())
            if "error" in answer or "note" in answer:
                return rows, answer
            rows.append(answer)
            if not said and time.monotonic() - began > QUIET:
                said = True
                log.info("%s: it takes time, %d problems are made", request["spec"], len(rows))

    def stop(self) -> None:
        self._connection.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def serve(descriptor: int) -> None:
    """The process's side: answers until the connection is closed."""
    outlive()
    connection = Connection(descriptor)
    os.set_inheritable(descriptor, False)
    # Tasks print.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def send(message: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(message).encode())

    while True:
        try:
            request = json.loads(connection.recv_bytes())
            note = ""
            try:
                for found in _answers(request):
                    if isinstance(found, str):
                        note = found
                    else:
                        send(found)
                send({"note": note})
            except (BadValue, BadType) as error:
                send({"error": str(error), "type": isinstance(error, TypeError)})
        except (EOFError, ConnectionError):
            return


def _answers(request: dict[str, Any]) -> Iterator[dict[str, Any] | str]:
    if "count" not in request:
        return ({"name": name} for name in names())
    spec = request["spec"].removeprefix(PREFIX)
    return problems(parse(spec), request["count"], request["seed"], request["split"])


def problems(parts: Sequence[Part], count: int, seed: str, split: str) -> Iterator[dict[str, Any] | str]:
    """The problems that `make` gives; at last, if they are fewer than asked for, a text that says so."""
    stream = RandomStream(f"gym/{split}/{seed}", "problems")
    draws = [_draw(part, RandomStream(f"gym/{split}/{seed}/{part}", "problems"), split) for part in parts]
    left = list(range(len(parts)))
    made = 0
    failed: list[str] = []
    while made < count and left:
        i = _by_weight([parts[j].weight for j in left], stream)
        found = next(draws[left[i]])
        if isinstance(found, str):
            failed.append(f"gym:{parts[left.pop(i)]} {found}")
            continue
        made += 1
        yield found
    if not made and count:
        raise BadValue(f"task: {'; '.join(failed)}")
    if made < count:
        yield f"{made} different problems instead of {count}: {'; '.join(failed)}"


def _by_weight(weights: Sequence[float], stream: RandomStream) -> int:
    if len(weights) == 1:
        return 0
    place = stream.below(2**32) / 2**32 * sum(weights)
    for i, weight in enumerate(weights):
        place -= weight
        if place < 0:
            return i
    return len(weights) - 1


def _draw(part: Part, stream: RandomStream, split: str) -> Iterator[dict[str, Any] | str]:
    """Different problems of a split; then a text that says why there are no more."""
    seen: set[str] = set()
    fruitless, error = 0, ""
    while True:
        # NumPy's generator takes 32 bits.
        seed = stream.below(2**31)
        _seed_globals(seed)
        chunk = dataset(part, seed, CHUNK)
        for i in range(CHUNK):
            if fruitless >= FRUITLESS:
                yield f"has no more: {FRUITLESS} draws in a row gave none of split {split} that was new{error}"
                return
            fruitless += 1
            _seed_globals(seed + i)
            try:
                entry = chunk[i]
            except Exception as raised:
                # Some options have no problem behind some seeds.
                error = f"; it raised {type(raised).__name__}: {raised!s:.200}"
                continue
            question = entry["question"]
            source = entry["metadata"].get(SOURCES.get(part.name), question)
            if question in seen or split_of((part.name, source)) != split:
                continue
            seen.add(question)
            fruitless = 0
            metadata = entry["metadata"]
            answer = entry["answer"] if entry["answer"] is not None else metadata.get(ANSWERS.get(part.name))
            yield {
                "problem": str(part),
                "question": question,
                "answer": answer if answer is None or isinstance(answer, str) else json.dumps(answer),
                "entry": repr(_literal(entry)),
            }


def _seed_globals(seed: int) -> None:
    """Seeds Python's and NumPy's global generators, from which a few tasks draw."""
    random.seed(seed)
    np.random.seed(seed)


def _literal(value: Any) -> Any:
    """The value with nothing in it but what Python has literals for; what has none becomes None."""
    if isinstance(value, dict):
        return {_literal(k): _literal(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        made: Any = list if isinstance(value, list) else tuple if isinstance(value, tuple) else set
        return made(map(_literal, value))
    plain = value.item() if hasattr(value, "item") else value
    for kind in (bool, int, float, str):
        if isinstance(plain, kind):
            plain = kind(plain)
            break
    try:
        ast.literal_eval(repr(plain))
    except (ValueError, SyntaxError):
        return None
    return plain
