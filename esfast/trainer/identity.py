"""The identity of a run beyond its settings: reward functions, training data and model. A resumed run must have the
same. The weights themselves are checked by the journal's fingerprint."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.random_stream import DRAWS_VERSION
from ..utils.errors import BadValue
from ..utils.rows import Rows

# Settings that say where a model came from or how it is run, and don't affect its results.
_OF_NO_CONSEQUENCE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
    "id2label",
    "label2id",
    "prompt_task",
    "prompt_style",
)


def identity(
    model: Mapping[str, Any], reward_funcs: Sequence[Callable], train_dataset: Rows | Callable
) -> dict[str, Any]:
    """A dict, fit for JSON, of what must be the same when the run is resumed. `model` is a Tuned's."""
    found = {
        **model,
        "reward_funcs": [name_of(f) for f in reward_funcs],
        "draws": DRAWS_VERSION,
    }
    if not callable(train_dataset):
        found["train_dataset"] = digest(train_dataset)
    elif source := getattr(train_dataset, "source", ""):
        found["train_dataset"] = source
    elif not name_of(train_dataset).startswith("esfast."):
        # The command line's tasks are compared by name.
        found["train_dataset"] = f"the function {name_of(train_dataset)}"
    return _plain(found)


def check(found: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """ValueError if a run with the identity `found` can't continue as `mine`; the message names what differs. Entries
    that only one of them has are not compared, since folders of older versions have fewer."""
    for name in found.keys() & mine.keys():
        before, now = found[name], mine[name]
        if isinstance(before, dict) and isinstance(now, dict):
            check({f"{name}: {k}": v for k, v in before.items()}, {f"{name}: {k}": v for k, v in now.items()})
        elif before != now:
            raise BadValue(f"resume: the run has {name} {_shown(before)}, asked for is {_shown(now)}")


def name_of(function: Callable) -> str:
    """`module:qualname` of a function, or of the type of a callable object."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def config_of(model) -> dict[str, Any]:
    """The configuration of a Hugging Face model, without settings that don't affect its results."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    settings = to_dict() if to_dict is not None else {}
    return {k: v for k, v in settings.items() if k not in _OF_NO_CONSEQUENCE and not k.startswith("_")}


def digest(rows: Rows) -> str:
    """The number of rows and a hash of their contents."""
    found = hashlib.sha256()
    for i in range(len(rows)):
        row = sorted(rows[i].items())
        found.update(json.dumps(row, skipkeys=True, default=_stated).encode(errors="surrogatepass") + b"\n")
    return f"of {len(rows)} rows (sha256 {found.hexdigest()[:16]})"


def _stated(value) -> Any:
    """For JSON: arrays become lists, other objects the name of their type (a repr may contain an address)."""
    return value.tolist() if hasattr(value, "tolist") else type(value).__qualname__


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(fields, default=_stated))


def _shown(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
