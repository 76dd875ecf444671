"""Servers that tests of the API share."""

from collections.abc import Iterator

import httpx
import openai
import pytest
from api_house import ApiHouse


@pytest.fixture(scope="session")
def shared_house() -> Iterator[ApiHouse]:
    with ApiHouse() as house:
        yield house


@pytest.fixture
def house(shared_house: ApiHouse) -> Iterator[ApiHouse]:
    """A server that many tests use; each must leave it quiet."""
    yield shared_house
    shared_house.assert_quiet()


@pytest.fixture
def client(house: ApiHouse) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def http(house: ApiHouse) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=house.url, timeout=20) as client:
        yield client
