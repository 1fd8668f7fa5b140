"""One local Ray for the whole tier, stopped at its end."""

from collections.abc import Iterator

import pytest

from pipelines.ray_session import ray_session


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[None]:
    with ray_session():
        yield
