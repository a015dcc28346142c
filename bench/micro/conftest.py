"""Options of the microbenchmarks."""


def pytest_addoption(parser):
    group = parser.getgroup("esfast", "esfast microbenchmarks")
    group.addoption("--numel", default="1e7", help="weights of a model in all, about (default: 1e7)")
    group.addoption("--members", default=30, type=int, help="members of an update (default: 30)")
