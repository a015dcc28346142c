"""Small embedded models for tests that need one and not what it has learned."""

import pytest

from esfast.tasks import embedded


def build(folder, steps=1, **options):
    """As embedded.build, from a twentieth of the worked examples, since making those takes nearly all of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "CORPUS", 1)
        return embedded.build(folder, steps=steps, progress=False, **options)
