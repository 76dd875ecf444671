"""The YAML file of a cluster: what it may say, what it becomes, and how it is refused."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from headrace.cli.app import app
from headrace.cli.serve import serve
from headrace.config.cluster import read_cluster

WHOLE = {
    "model": "m",
    "served_model_name": "name",
    "pools": {"prefill": {"replicas": 1}, "decode": {"replicas": 2}, "both": {"replicas": 3}},
    "split_policy": {"prompt_length_threshold": 100, "prefill_queue_max": 7},
    "cache": {"reuse_prefix": False},
    "engine": {
        "dtype": "float32",
        "quantization": "int8",
        "threads": 4,
        "max_model_len": 100,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 50,
        "max_waiting": 9,
        "kv_cache_memory": "64MiB",
        "block_size": 8,
        "batch_invariant": True,
        "step_timeout": 30,
    },
}


def written(directory: Path, content: object) -> Path:
    path = directory / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_every_field_is_an_option_of_serve(tmp_path: Path) -> None:
    options = read_cluster(written(tmp_path, WHOLE)).as_options()
    assert options == {
        "model": "m",
        "served_model_name": "name",
        "prefill": 1,
        "decode": 2,
        "both": 3,
        "no_prefix_caching": True,
        **WHOLE["split_policy"],
        **WHOLE["engine"],
    }
    assert set(options) <= set(inspect.signature(serve).parameters)


def test_what_is_not_said_is_left_to_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, {"pools": {"decode": {"replicas": 1}}})
    assert read_cluster(path).as_options() == {"decode": 1, "no_prefix_caching": False}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"pool": {}}, "pool: is not a known field"),
        ({"pools": {"decode": {"replica": 1}}}, "pools.decode.replica: is not a known field"),
        ({"pools": {"decode": {"replicas": -1}}}, "pools.decode.replicas: input should be greater"),
        ({"engine": {"threads": "two"}}, "engine.threads: input should be a valid integer"),
        ({"engine": {"kv_cache_memory": "lots"}}, "engine.kv_cache_memory: 'lots' is not a size"),
        ([1], "has no fields"),
        (None, "has no fields"),
    ],
)
def test_what_is_wrong_is_refused_by_name(tmp_path: Path, content: object, said: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=said):
        read_cluster(path)
    done = CliRunner().invoke(app, ["serve", "--config", str(path)])
    assert done.exit_code == 1
    assert said in done.stderr


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        read_cluster(path)


def test_a_key_that_comes_twice(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("pools: {decode: {replicas: 1}}\npools: {decode: {replicas: 2}}\n")
    with pytest.raises(ValueError, match="the key 'pools' comes twice"):
        read_cluster(path)


def test_a_section_without_a_field_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("engine:\npools:\n  decode: {replicas: 1}\n")
    assert read_cluster(path).as_options() == {"decode": 1, "no_prefix_caching": False}
