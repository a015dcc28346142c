"""Sharded weights in real processes: what is gathered from 2 and 4 ranks equals the unsharded run to the bit.

The checks are those of sharded.py, sharded_meshes.py and sharded_models.py; one launch of a world runs all of them.
"""

import json

import forks
import pytest
import sharded_models

WORLDS = (2, 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(world): what every rank wrote, a dict from the check's name to "ok" or a traceback."""
    kept = {}

    def run(world):
        if world not in kept:
            folder = tmp_path_factory.mktemp(f"world{world}")
            ranks = [
                forks.Fork(
                    sharded_models.run_all,
                    rank,
                    world,
                    folder,
                    folder=folder,
                    environment=forks.environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world)),
                )
                for rank in range(world)
            ]
            errors = [fork.communicate(timeout=240)[1] for fork in ranks]
            kept[world] = [
                (json.loads(path.read_text()) if (path := folder / f"{rank}.json").exists() else {})
                | {"stderr": errors[rank][-3000:]}
                for rank in range(world)
            ]
        return kept[world]

    return run


@pytest.mark.parametrize(
    ("world", "name"), [(w, name) for w in WORLDS for name, (worlds, _) in sharded_models.CHECKS.items() if w in worlds]
)
def test_shards(world, name, results):
    outcomes = [found.get(name, "not run: " + found["stderr"]) for found in results(world)]
    assert outcomes == ["ok"] * world, "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(outcomes))
