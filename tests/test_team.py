"""Teams in this process alone: how work is shared, how members and rewards are handed round, how all stop with one."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import esfast
from esfast.distributed import team as distributed
from esfast.distributed.team import Team, even_ranges


@pytest.mark.parametrize("count", (1, 2, 3, 8))
@pytest.mark.parametrize("sizes", ([5], [1, 1, 1, 1], [100, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7], list(range(1, 60))))
def test_shares_are_neighbours_of_about_equal_size(sizes, count):
    parts = even_ranges(sizes, count)
    assert len(parts) == count and parts[0][0] == 0 and parts[-1][1] == len(sizes)
    assert all(a[1] == b[0] for a, b in zip(parts, parts[1:], strict=False))
    assert max(sum(sizes[a:b]) for a, b in parts) <= sum(sizes) / count + max(sizes)


def test_a_team_of_one_needs_no_store():
    team = Team()
    assert list(team.members("0", 3)) == [0, 1, 2] and team.is_group_leader and not team.restarted
    assert team.exchange("0", {0: 1.0, 2: None}, 3) == [1.0, None, None]
    assert team.broadcast_from_rank0("key", lambda: b"x") == b"x"
    team.assert_equal_on_all_ranks("fingerprint", "a")
    team.fail(ValueError())
    team.close()


def test_two_teams_over_one_store():
    """Two processes of a team, both played by this one, hand out members, exchange rewards, and tell each other why
    they stop."""
    store = torch.distributed.HashStore()
    teams = [Team(store, rank, 2) for rank in range(2)]
    turns = [team.members("0", 5) for team in teams]
    handed = [next(turns[0]), next(turns[1]), next(turns[1]), next(turns[0]), next(turns[1])]
    assert handed == [0, 1, 2, 3, 4] and [list(t) for t in turns] == [[], []]
    packets = [team.packets("p", 11, size) for team, size in zip(teams, (4, 3), strict=True)]
    assert [next(packets[i]) for i in (0, 1, 1, 0)] == [range(0, 4), range(4, 7), range(7, 10), range(10, 11)]
    assert [list(p) for p in packets] == [[], []] and list(Team().packets("p", 5, 2))[-1] == range(4, 5)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(teams[1].exchange, "0", {1: 1.0, 2: None, 4: 4.0}, 5)
        assert teams[0].exchange("0", {0: 0.0, 3: -3.0}, 5) == [0.0, 1.0, None, -3.0, 4.0] == other.result(timeout=10)
    teams[1].fail(ValueError("no"))
    teams[0].fail(ValueError("too late"))
    with pytest.raises(distributed.Stopped, match="process 1 stopped with ValueError: no"):
        next(teams[0].members("1", 5))
    for team in teams:
        team._ended.set()


def test_at_the_end_of_a_block_all_wait_for_each_other_or_stop():
    def block(team, error=None):
        with team:
            if error:
                raise error
        return time.monotonic()

    with ThreadPoolExecutor(1) as pool:
        store = torch.distributed.HashStore()
        first = pool.submit(block, Team(store, 0, 2))
        time.sleep(0.2)
        began = time.monotonic()
        block(Team(store, 1, 2))
        assert first.result(timeout=10) > began
        store = torch.distributed.HashStore()
        first = pool.submit(block, Team(store, 0, 2))
        other = Team(store, 1, 2)
        with pytest.raises(ZeroDivisionError):
            block(other, ZeroDivisionError("why"))
        with pytest.raises(distributed.Stopped, match="process 1 stopped with ZeroDivisionError: why"):
            first.result(timeout=10)
        other._ended.set()


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:1", 1), ("cpu", None)])
def test_a_process_uses_its_gpu(device, index, monkeypatch):
    used = {}
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "rendezvous", lambda url: iter([(torch.distributed.HashStore(), 0, 2)]))
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: used.update(index=i))

    def init(backend, **others):
        used["backend"] = backend
        raise StopIteration

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(StopIteration):
        Team.join(device)
    assert used == ({"backend": "gloo"} if index is None else {"index": index, "backend": "cpu:gloo,cuda:nccl"})


def test_who_is_amidst_something_is_ended_and_who_is_not_goes_on(monkeypatch):
    ends = []
    monkeypatch.setattr(distributed, "BEAT", 0.01)
    monkeypatch.setattr(distributed, "SILENCE", 0.05)
    monkeypatch.setattr(distributed, "GRACE", 0.1)
    monkeypatch.setattr(os, "_exit", ends.append)
    for at_work, notices, expected in ((False, False, []), (True, True, []), (True, False, [1])):
        team = Team(torch.distributed.HashStore(), 0, 2)
        team.at_work = at_work
        time.sleep(0.1)  # nobody else is there
        if notices:
            with pytest.raises(distributed.Stopped, match="process 1 has not been heard of"):
                team.check()
        time.sleep(0.3)
        assert ends == expected
    team = Team(torch.distributed.HashStore(), 0, 2)
    with pytest.raises(distributed.Stopped, match="process 1 has not been heard of"), team:
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    es = esfast.ES([("a", torch.zeros(3))], population_size=2)
    for member in es.population():
        assert es.team.at_work
        member.reward = float(member.index)
    es.step()
    assert not es.team.at_work


def test_inplace_is_refused_in_a_team():
    team = Team(torch.distributed.HashStore(), 0, 2)
    with pytest.raises(ValueError, match='"inplace" drifts apart'):
        esfast.ES([("a", torch.zeros(3))], weights="inplace", team=team)
    team._ended.set()
    with pytest.raises(ValueError, match="can't be grouped by 3"):
        Team(torch.distributed.HashStore(), 0, 4, shards=3)
