"""Several models behind one address: names, versions, the step down, texts in the tokens of who serves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import openai
import pytest
from api_house import EOS, TEMPLATE, VOCAB_SIZE, ApiHouse, byte_tokenizer
from house import EngineShape
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from headrace.api import ServedModel, Server
from headrace.api.generation import _in_header
from headrace.api.naming import untalkative
from headrace.cluster.options import (
    AdmissionOptions,
    AliasOptions,
    DegradeStep,
    GatewayOptions,
    ModelOptions,
    ServiceLevels,
)
from headrace.engine import Engine
from headrace.protocol.requests import GenerateRequest, SamplingParams
from headrace.sim.hash_executor import expected, model_of
from headrace.sim.launcher import TaskLauncher
from headrace.text import ChatTemplate, Tokenizer
from headrace.worker import Supervisor, WorkerOptions, serve
from headrace.world import real_world

BIG, SMALL, BARE = "big", "small", "bare"
SHAPE = EngineShape(
    max_model_len=512,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=frozenset({EOS}),
    max_num_batched_tokens=128,
    num_blocks=2000,
)
SHAPES = {BIG: SHAPE, SMALL: EngineShape(max_model_len=64, vocab_size=400, num_blocks=2000), BARE: SHAPE}
OPTIONS = GatewayOptions(
    models=(ModelOptions(name=BIG, smaller=SMALL), ModelOptions(name=SMALL), ModelOptions(name=BARE)),
    aliases=(
        AliasOptions(name="mixed", versions=((BIG, 50.0), (SMALL, 50.0))),
        AliasOptions(name="alike", versions=((BIG, 75.0), (BARE, 25.0))),
        AliasOptions(name="to bare", versions=((BIG, 1.0),), smaller=BARE),
        AliasOptions(name="mute", versions=((BARE, 1.0), (BIG, 0.0))),
    ),
    slo=ServiceLevels(ttft_s=1e-9),
    admission=AdmissionOptions(degrade=(DegradeStep(lower="model", above=1e9),)),
)
"""No pressure is ever so high; see `pressing`."""


def backward_tokenizer() -> Tokenizer:
    """Bytes, numbered from the last to the first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    backend = Backend(models.BPE(vocab={each: number for number, each in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, eos_token_ids=[7])


class SeveralHouse(ApiHouse):
    """A server of three models: two of one vocabulary, of which one has no chat template, and a small one."""

    def __init__(self, options: GatewayOptions = OPTIONS) -> None:
        super().__init__(SHAPE, options=options)
        self.engines: dict[str, Engine] = {}
        self.workers: dict[str, asyncio.Task[None]] = {}
        self.texts = {
            BIG: ServedModel(BIG, self.tokenizer, ChatTemplate(TEMPLATE)),
            SMALL: ServedModel(SMALL, backward_tokenizer(), ChatTemplate("{{ messages[0].content }}")),
            BARE: ServedModel(BARE, byte_tokenizer(), None),
        }

    def server(self) -> Server:
        others = (self.texts[SMALL], self.texts[BARE])
        names = (BIG, SMALL, BARE, "mixed", "alike", "to bare", "mute")
        chance = random.Random(0)
        return Server(self.gateway, self.texts[BIG], self.metrics, chance, others=others, names=names)

    async def _dial(self) -> None:
        for model in SHAPES:
            await self.dial(model)
        self.engine, self.worker = self.engines[BIG], self.workers[BIG]

    async def dial(self, model: str) -> None:
        engine, info = SHAPES[model].build()
        info = msgspec.structs.replace(info, model=model, revision=model)
        launcher = TaskLauncher(lambda address: serve(real_world(), address, engine, info))
        options = WorkerOptions(worker_id=model, join=(self.gateway.address,))
        supervisor = Supervisor(real_world(), options, launcher, f"{self.gateway.address}.{model}")
        self.engines[model] = engine
        self.workers[model] = asyncio.create_task(supervisor.run())
        while not any(True for _ in self.gateway.registry.live(model)):
            await self.gateway.wait_changed()

    def without(self, model: str) -> None:
        """Let the worker of a model go."""

        async def gone() -> None:
            self.workers[model].cancel()
            await asyncio.gather(self.workers[model], return_exceptions=True)
            while any(True for _ in self.gateway.registry.live(model)):
                await self.gateway.wait_changed()

        self.call(gone)

    def says(self, model: str, text: str, **sampling: Any) -> str:
        """What a model says after a text, as its own tokens have it."""
        tokenizer, engine = self.texts[model].tokenizer, self.engines[model]
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, **sampling})
        asked = GenerateRequest(request_id="r", prompt=tokenizer.encode(text), sampling=params)
        found = expected(asked, 0, model_of(engine), SHAPES[model].max_model_len)
        return tokenizer.decode(found.tokens)


@pytest.fixture(scope="module")
def several() -> Iterator[SeveralHouse]:
    with SeveralHouse() as house:
        yield house


@pytest.fixture
def pressing() -> Iterator[SeveralHouse]:
    """Whatever is asked for would be too late, and the big model has shown to be slow."""
    ladder = (DegradeStep(lower="model", above=1.0),)
    options = GatewayOptions(
        models=OPTIONS.models,
        aliases=OPTIONS.aliases,
        slo=ServiceLevels(ttft_s=1e-9),
        admission=AdmissionOptions(degrade=ladder),
    )
    with SeveralHouse(options) as house:
        for model in (SMALL, BARE):
            complete(house, model=model, priority=-1)
        slow = next(iter(house.gateway.registry.live(BIG)))

        def slowly() -> None:
            from headrace.cluster.facts import Fact

            slow.facts[Fact.BASE_S] = 10.0

        house.do(slowly)
        yield house


def complete(house: ApiHouse, path: str = "completions", **body: Any) -> httpx.Response:
    given = {"prompt": "Hello", "temperature": 0, **body}
    if path == "chat/completions":
        given["messages"] = [{"role": "user", "content": given.pop("prompt")}]
    return httpx.post(f"{house.url}/v1/{path}", json=given, timeout=20)


def test_all_names_are_listed(several: SeveralHouse) -> None:
    cards = httpx.get(f"{several.url}/v1/models").json()["data"]
    assert [card["id"] for card in cards] == [BIG, SMALL, BARE, "mixed", "alike", "to bare", "mute"]
    assert [card["max_model_len"] for card in cards] == [512, 64, 512, 64, 512, 512, 512]
    assert [card.get("versions") for card in cards[2:5]] == [
        None,
        {BIG: 0.5, SMALL: 0.5},
        {BIG: 0.75, BARE: 0.25},
    ]
    assert httpx.get(f"{several.url}/v1/models/mixed").json() == cards[3]


@pytest.mark.parametrize("model", [BIG, SMALL, BARE])
def test_each_model_answers_in_its_own_tokens(several: SeveralHouse, model: str) -> None:
    answer = complete(several, model=model)
    assert answer.json()["model"] == model
    assert answer.json()["choices"][0]["text"] == several.says(model, "Hello")
    assert "X-Headrace-Model" not in answer.headers


def test_without_a_name_the_first_is_meant(several: SeveralHouse) -> None:
    assert complete(several).json()["model"] == BIG


def test_an_unknown_name_is_told_what_there_is(several: SeveralHouse) -> None:
    answer = complete(several, model="huge")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    names = "'big', 'small', 'bare', 'mixed', 'alike', 'to bare' and 'mute'"
    assert error["message"] == f"the model 'huge' does not exist here; {names} are served"


def test_the_official_client_sees_which_version_streams(several: SeveralHouse) -> None:
    with openai.OpenAI(base_url=f"{several.url}/v1", api_key="none", max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="mixed",
            messages=[{"role": "user", "content": "Hello"}],
            stream=True,
            max_tokens=4,
            extra_headers={"X-Session-ID": "s"},
        )
        models = {chunk.model for chunk in raw.parse()}
        assert models == {raw.headers["X-Headrace-Model"]}
        assert models <= {BIG, SMALL}


def test_a_session_keeps_its_version_and_explain_shows_the_draw(several: SeveralHouse) -> None:
    for header in ("a", "b", "c", "d"):
        answers = [
            httpx.post(
                f"{several.url}/v1/completions",
                json={"model": "mixed", "prompt": f"Hello {turn}", "max_tokens": 2},
                headers={"X-Session-ID": header},
            )
            for turn in range(4)
        ]
        (model,) = {answer.json()["model"] for answer in answers}
        (way,) = httpx.get(f"{several.url}/cluster/requests/{answers[0].json()['id']}").json()["requests"]
        drawn = way["events"][0]
        assert (drawn["what"], drawn["detail"]["model"]) == ("version drawn", model)
        assert drawn["detail"]["why"] == "mixed is big 50%, small 50%: by its session"
    by_user = {complete(several, model="mixed", user="u").json()["model"] for _ in range(6)}
    assert len(by_user) == 1


def test_a_name_of_any_characters_fits_into_a_header() -> None:
    assert _in_header("größe\n") == "gr\\xf6\\xdfe\\n"


def test_without_a_session_both_versions_serve(several: SeveralHouse) -> None:
    drawn = [complete(several, model="mixed", max_tokens=1).json()["model"] for _ in range(30)]
    assert set(drawn) == {BIG, SMALL}


@pytest.mark.parametrize(
    ("field", "value"), [("prompt", [1, 2]), ("logit_bias", {"1": 1.0}), ("stop_token_ids", [5])]
)
def test_token_ids_go_to_one_vocabulary(several: SeveralHouse, field: str, value: Any) -> None:
    answer = complete(several, model="mixed", **{field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert "the versions of 'mixed' have different tokens; name 'big' and 'small' instead" in answer.text
    assert complete(several, model="alike", **{field: value}).status_code == 200


def test_tokenize_is_of_a_model(several: SeveralHouse) -> None:
    def tokens(model: str) -> httpx.Response:
        return httpx.post(f"{several.url}/tokenize", json={"model": model, "prompt": "Hi"})

    assert tokens(BIG).json()["tokens"] == several.texts[BIG].tokenizer.encode("Hi")
    assert tokens(SMALL).json()["tokens"] == several.texts[SMALL].tokenizer.encode("Hi")
    assert tokens("alike").json()["tokens"] == tokens(BIG).json()["tokens"]
    assert tokens("mixed").status_code == 400
    text = httpx.post(
        f"{several.url}/detokenize", json={"model": SMALL, "tokens": tokens(SMALL).json()["tokens"]}
    )
    assert text.json()["prompt"] == "Hi"


def test_metrics_say_which_model_served(several: SeveralHouse) -> None:
    def served() -> dict[tuple[str, str], float]:
        page = httpx.get(f"{several.url}/metrics").text
        return {
            (sample.labels["model_name"], sample.labels["finished_reason"]): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == "headrace:request_success_total"
        }

    before = served()
    model = complete(several, model="alike", max_tokens=1).json()["model"]
    after = served()
    assert {name for name, _ in after} == {BIG, SMALL, BARE}
    grown = [name for name in after if after[name] > before[name]]
    assert grown == [(model, "length")]


def test_a_model_without_workers_is_a_503_and_its_share_goes_to_the_others() -> None:
    with SeveralHouse() as house:
        house.without(SMALL)
        answer = complete(house, model=SMALL)
        assert answer.status_code == 503
        assert "no worker of the model 'small' serves now" in answer.text
        assert "Retry-After" in answer.headers
        assert httpx.get(f"{house.url}/ready").status_code == 200
        answers = [complete(house, model="mixed", max_tokens=1) for _ in range(12)]
        assert {one.json()["model"] for one in answers} == {BIG}
        (way,) = httpx.get(f"{house.url}/cluster/requests/{answers[0].json()['id']}").json()["requests"]
        assert "without small, which no worker serves now" in way["events"][0]["detail"]["why"]


def test_under_pressure_the_smaller_model_answers_in_its_own_tokens(pressing: SeveralHouse) -> None:
    answer = complete(pressing, model=BIG)
    assert answer.json()["model"] == SMALL
    assert answer.headers["X-Headrace-Degraded"] == f"model={SMALL}"
    assert answer.headers["X-Headrace-Model"] == SMALL
    assert answer.json()["choices"][0]["text"] == pressing.says(SMALL, "Hello")
    chat = complete(pressing, "chat/completions", model=BIG, max_tokens=8)
    said = chat.json()["choices"][0]["message"]["content"]
    assert said == pressing.says(SMALL, "Hello", max_tokens=8)
    page = httpx.get(f"{pressing.url}/metrics").text
    assert 'request_degraded_total{class="normal",model_name="small",step="model=small"} 2.0' in page


def test_a_chat_does_not_fall_to_a_model_that_cannot_chat(pressing: SeveralHouse) -> None:
    assert complete(pressing, model="to bare", max_tokens=2).json()["model"] == BARE
    chat = complete(pressing, "chat/completions", model="to bare", max_tokens=2)
    assert chat.json()["model"] == BIG


def test_who_cannot_chat_is_told_at_the_start(several: SeveralHouse) -> None:
    said = "note: chats with alike go to big alone; without a template: bare"
    assert untalkative(several.server()) == [said]


def test_a_chat_goes_to_a_version_that_can_chat_and_explain_says_so(several: SeveralHouse) -> None:
    chats = [
        complete(several, "chat/completions", model="alike", max_tokens=1, user=user)
        for user in ("", "", "", "", "a", "b", "c", "d", "e", "f")
    ]
    assert {chat.json()["model"] for chat in chats} == {BIG}
    (way,) = httpx.get(f"{several.url}/cluster/requests/{chats[0].json()['id'][9:]}").json()["requests"]
    why = "alike is big 100%: by chance; without bare, which has no chat template"
    assert way["events"][0]["detail"]["why"] == why
    drawn = [complete(several, model="alike", max_tokens=1).json()["model"] for _ in range(40)]
    assert set(drawn) == {BIG, BARE}
    ids = {"logit_bias": {"1": 1.0}, "max_tokens": 1}
    assert complete(several, "chat/completions", model="alike", **ids).status_code == 200


def test_where_no_version_can_chat_the_name_that_was_asked_for_is_told(several: SeveralHouse) -> None:
    answer = complete(several, "chat/completions", model="mute")
    assert answer.status_code == 400
    assert "no version of 'mute' has a chat template; send a prompt to /v1/completions" in answer.text
    assert answer.json()["error"]["param"] == "messages"


def test_a_conversation_is_tokenised_for_a_version_that_can_chat(several: SeveralHouse) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    answers = [
        httpx.post(f"{several.url}/tokenize", json={"model": model, "messages": messages})
        for model in ("alike", BIG, "mute")
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 400]
    assert answers[0].json()["tokens"] == answers[1].json()["tokens"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [1, 2, 3]},
        {"logit_bias": {"5": 1.0}},
        {"stop_token_ids": [5]},
        {"prompt": "x" * 64},
        {"priority": -1},
        {"model": BARE},
    ],
)
def test_what_the_smaller_model_cannot_take_is_served_as_asked(
    pressing: SeveralHouse, body: dict[str, Any]
) -> None:
    answer = complete(pressing, **{"model": BIG, "max_tokens": 2, **body})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == body.get("model", BIG)
    assert "X-Headrace-Degraded" not in answer.headers
