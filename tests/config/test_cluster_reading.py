"""From YAML and overrides to a cluster's file: what may be written, and how the rest is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from headrace.config.reading import ConfigError, fields, read_cluster

SEED = Path(__file__).with_name("seed.yaml")


def written(directory: Path, content: object) -> Path:
    path = directory / "cluster.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def problems(directory: Path, content: object, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refused:
        read_cluster(written(directory, content), overrides)
    return refused.value.problems


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"pool": {}}, "pool: is not a known field; did you mean pools?"),
        (
            {"pools": {"both": {"replica": 1, "replicas": 1}}},
            "pools.both.replica: is not a known field; did you mean pools.both.replicas?",
        ),
        (
            {"split_policy": {"prefix_weight": 1}},
            "split_policy.prefix_weight: is not a known field; did you mean split_policy.prefix_cache_w",
        ),
        (
            {"routing": {"queue_length_weights": 1}},
            "routing.queue_length_weights: is not a known field; did you mean split_policy.queue_length",
        ),
        ({"routing": {"xyz": 1}}, "routing.xyz: is not a known field; routing has policy"),
        (
            {"autoscale": {"prefill": {"min_replicas": 1, "max_replicas": 1, "scale_up": {"queue": 1}}}},
            "autoscale.prefill.scale_up.queue: is not a known field; did you mean "
            "autoscale.prefill.scale_up.queue_length?",
        ),
        (
            {"pools": {"both": {"replicas": -1}}},
            "pools.both.replicas: should be greater than or equal to 0, got -1",
        ),
        ({"pools": {"both": {}}}, "pools.both.replicas: is missing"),
        ({"pools": {"both": 2}}, "pools.both: is a section of fields, got 2"),
        ({"engine": {"threads": "two"}}, "engine.threads: should be a valid integer, got 'two'"),
        ({"engine": {"threads": 1.5}}, "engine.threads: should be a valid integer, got 1.5"),
        ({"engine": {"kv_cache_memory": "lots"}}, "engine.kv_cache_memory: 'lots' is not a size"),
        ({"engine": {"kv_cache_memory": True}}, "engine.kv_cache_memory: should be a valid string, got True"),
        ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms: should be greater than 0, got 0"),
        ({"slo": {"ttft_ms": float("inf")}}, "slo.ttft_ms: should be a finite number, got inf"),
        ({"slo": {"ttft_ms": True}}, "slo.ttft_ms: should be a valid number, got True"),
        ({"cache": {"reuse_prefix": 1}}, "cache.reuse_prefix: should be a valid boolean, got 1"),
        (
            {"cache": {"min_cache_hit_ratio": 75}},
            "cache.min_cache_hit_ratio: should be less than or equal to 1",
        ),
        (
            {"routing": {"policy": "best"}},
            "routing.policy: there is no policy 'best'; there are cost, latency",
        ),
        ({"routing": {"policy": "my.module:"}}, "routing.policy: there is no policy 'my.module:'"),
        (
            {"models": {"chat": {"versions": {"a": 1e308, "b": 1}}}},
            "models.chat.versions.a: should be less than or equal to 1000000, got 1e+308",
        ),
        (
            {"split_policy": {"prefix_cache_weight": 1e308}},
            "split_policy.prefix_cache_weight: should be less than or equal to 1000000, got 1e+308",
        ),
        (
            {"pools": {"both": {"replicas": 100_001}}},
            "pools.both.replicas: should be less than or equal to 10000, got 100001",
        ),
        (
            {"split_policy": {"prompt_length_threshold": 2**64}},
            "split_policy.prompt_length_threshold: should be less than or equal to 100000000",
        ),
        ({"engine": {"kv_cache_memory": "9" * 400}}, "engine.kv_cache_memory: '9999"),
        ({"engine": {"kv_cache_memory": "2000000TiB"}}, "engine.kv_cache_memory: '2000000TiB' is more than"),
        ("slo: {ttft_ms: 1e400}", "slo.ttft_ms: should be a finite number, got inf"),
        ({"qos": {"policy": "guess"}}, "qos.policy: should be 'predictive' or 'naive', got 'guess'"),
        ({"qos": {"degrade": ["n"]}}, "qos.degrade.0: is a section of fields, got 'n'"),
        (
            {"qos": {"degrade": [{"lower": "n", "to": 0}]}},
            "qos.degrade.0.to: should be greater than or equal",
        ),
        (
            {"qos": {"degrade": [{"lower": "n", "to": 1, "abov": 1}]}},
            "qos.degrade.0.abov: is not a known field; did you mean qos.degrade.0.above?",
        ),
        ([1], "there are no fields; write for example: pools:"),
        ("", "there are no fields"),
        ("a: [", "this is not YAML"),
        ("model: a\nmodel: b\n", "this is not YAML: the key 'model' comes twice"),
    ],
)
def test_what_is_wrong_is_refused_by_name(tmp_path: Path, content: object, said: str) -> None:
    (problem,) = problems(tmp_path, content)
    assert problem.startswith(said)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", ".1e-2", "+1e-3", "1.0e-3", "0.001"])
def test_numbers_may_be_written_as_in_json(number: str, tmp_path: Path) -> None:
    assert read_cluster(written(tmp_path, f"slo: {{ttft_ms: {number}}}\n")).slo.ttft_ms == 0.001
    assert read_cluster(None, [f"slo.ttft_ms={number}"]).slo.ttft_ms == 0.001


def test_what_only_looks_like_a_number_is_a_text() -> None:
    for name in ("12e", "e5", "3e5f", "1.2.3e5", "1e5-instruct"):
        assert read_cluster(None, [f"model={name}"]).model == name


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    assert len(problems(tmp_path, {"pool": {}, "slo": {"ttft_ms": 0, "tpot_ms": "x"}})) == 3


def test_integers_are_fine_where_numbers_are_meant(tmp_path: Path) -> None:
    file = read_cluster(written(tmp_path, {"slo": {"ttft_ms": 300}, "engine": {"kv_cache_memory": 1 << 20}}))
    assert file.slo.ttft_ms == 300
    assert file.engine.kv_cache_memory == str(1 << 20)


def test_a_section_without_a_field_says_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "engine:\nautoscale:\nslo: {ttft_ms: 10}\n")
    assert read_cluster(path).as_options() == {}


def test_a_users_own_policy_is_named_by_its_class(tmp_path: Path) -> None:
    file = read_cluster(written(tmp_path, {"routing": {"policy": "my.module:Mine"}}))
    assert file.routing.policy == "my.module:Mine"


def test_the_seed_loads_unchanged_and_every_field_of_it_is_kept() -> None:
    content = yaml.safe_load(SEED.read_text())
    assert read_cluster(SEED).model_dump(exclude_unset=True) == content


def test_overrides_replace_add_and_are_taken_in_order() -> None:
    file = read_cluster(
        SEED,
        (
            "model=smollm2-135m",
            "autoscale.prefill.scale_up.kv_cache_usage=90",
            "slo.ttft_ms=1",
            "slo.ttft_ms=400",
            "qos.degrade=[{lower: n, to: 1}]",
            "cache.reuse_prefix=false",
        ),
    )
    assert file.model == "smollm2-135m"
    assert file.autoscale.prefill is not None
    assert file.autoscale.prefill.scale_up.kv_cache_usage == 90
    assert file.autoscale.prefill.scale_up.queue_length == 8
    assert file.slo.ttft_ms == 400
    assert [(step.lower, step.to, step.above) for step in file.qos.degrade] == [("n", 1, 0.8)]
    assert not file.cache.reuse_prefix


def test_overrides_do_without_a_file() -> None:
    assert read_cluster(None, ("routing.policy=random",)).routing.policy == "random"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("slo.ttft_ms", "--set slo.ttft_ms: give KEY.PATH=VALUE"),
        ("=3", "--set =3: give KEY.PATH=VALUE"),
        ("slo..ttft_ms=3", "--set slo..ttft_ms=3: give KEY.PATH=VALUE"),
        ("slo.ttft_ms=[", "--set slo.ttft_ms=[: the value is not YAML"),
        ("model.name=x", "--set model.name=x: model is 'llama-70b', and has no fields"),
        ("slo.ttft=3", "--set: slo.ttft: is not a known field; did you mean slo.ttft_ms?"),
        ("slo.ttft_ms=-3", "--set: slo.ttft_ms: should be greater than 0, got -3"),
    ],
)
def test_overrides_that_cannot_be(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_cluster(SEED, (override,))
    assert said in str(refused.value)


def test_fields_are_the_leaves() -> None:
    found = list(fields())
    assert "pools.prefill.replicas" in found
    assert "autoscale.decode.scale_down.kv_cache_usage" in found
    assert len(found) == len(set(found)) > 50


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 20_000, "this is not YAML: it is nested too deeply"),
        ("model: 2026-13-45", "this is not YAML: '2026-13-45' is no timestamp"),
        ('model: x\nslo: {ttft_ms: !!int "abc"}', "this is not YAML: 'abc' is no int"),
        ('model: !!float "0x_"', "this is not YAML: '0x_' is no float"),
        ('model: !!bool "abc"', "this is not YAML: 'abc' is no bool"),
        ('model: !!timestamp "abc"', "this is not YAML: 'abc' is no timestamp"),
    ],
    ids=["deep", "date", "int", "float", "bool", "timestamp"],
)
def test_what_yaml_itself_cannot_read_is_told_with_file_and_place(
    content: str, said: str, tmp_path: Path
) -> None:
    (problem,) = problems(tmp_path, content)
    assert problem.startswith(said)
    if "nested" not in said:
        assert f", line {1 + content.count(chr(10))}, column " in problem
    with pytest.raises(ConfigError, match="the value is not YAML"):
        read_cluster(
            None, ("model=" + content.partition(": ")[2] if ": " in content else "model=" + content,)
        )


def test_a_value_without_end_is_shown_in_part(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    found = problems(tmp_path, bomb + "model: *j\npools: *j\n")
    assert all(len(problem) < 3000 for problem in found)
    assert any(problem.startswith("pools: is a section of fields, got [[") for problem in found)
