"""Where a setting's value comes from, and what is said about a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from embedwire.cli.options import load
from embedwire.cli.settings import Settings
from embedwire.errors import ConfigurationError

if TYPE_CHECKING:
    from tests.cli.conftest import Run


def test_a_flag_goes_before_a_variable_before_the_file_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "embedwire.toml"
    file.write_text("block_size = 1\nnum_blocks = 2\nmax_batch = 3\n")
    monkeypatch.setenv("EMBEDWIRE_BLOCK_SIZE", "10")
    monkeypatch.setenv("EMBEDWIRE_NUM_BLOCKS", "20")
    loaded = load({"block_size": 100, "port": None}, config=file)
    found = loaded.settings
    assert (found.block_size, found.num_blocks, found.max_batch, found.port) == (100, 20, 3, 0)
    origins = [loaded.origins[name] for name in ("block_size", "num_blocks", "max_batch", "port")]
    assert origins == ["--block-size", "EMBEDWIRE_NUM_BLOCKS", str(file), "default"]


def test_the_file_may_be_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "embedwire.toml"
    file.write_text('transport = "tcp"\n')
    monkeypatch.setenv("EMBEDWIRE_CONFIG", str(file))
    assert load().settings.transports == ("tcp",)


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [("EMBEDWIRE_BLOK_SIZE", "EMBEDWIRE_BLOCK_SIZE"), ("EMBEDWIRE_NUMBLOCKS", "EMBEDWIRE_NUM_BLOCKS")],
)
def test_an_unknown_variable_is_an_error_that_says_the_nearest(
    variable: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigurationError, match=rf"no setting {variable}; did you mean {nearest}\?"):
        load()


def test_an_unknown_name_in_the_file_is_an_error_that_says_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "embedwire.toml"
    file.write_text("trasport = 1\n")
    with pytest.raises(ConfigurationError, match=r"embedwire\.toml: .* trasport; did you mean transport\?"):
        load(config=file)


@pytest.mark.failure_mode("request-never-fits")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_blocks", 0),
        ("block_size", -1),
        ("port", 65536),
        ("transport", "pigeon"),
        ("source_memory", "4 parsecs"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_it_and_where_it_came_from(
    name: str, value: object
) -> None:
    """A pool of zero blocks and other values out of range are refused at start."""
    with pytest.raises(ConfigurationError, match=rf"{name} is {value!r} \(--{name.replace('_', '-')}\)"):
        load({name: value})


@pytest.mark.failure_mode("lease-shorter-than-write")
def test_two_limits_that_contradict_each_other_are_an_error() -> None:
    """A configuration in which a round could end during a permitted write is refused."""
    with pytest.raises(ConfigurationError, match=r"round_s is 10\.0"):
        load({"round_s": 10.0})


def test_sizes_are_written_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDWIRE_SOURCE_MEMORY", "1.5GiB")
    found = load({"assembly_memory": "256 MiB"}).settings
    assert (found.source_memory, found.assembly_memory) == (3 * 2**29, 2**28)


def test_children_get_what_was_set_as_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDWIRE_WORKER_URLS", "http://a:1, http://b:2")
    told = load({"source_memory": "1MiB", "allow_private_media": True, "transport": "tcp"})
    variables = told.as_variables()
    assert variables == {
        "EMBEDWIRE_WORKER_URLS": "http://a:1,http://b:2",
        "EMBEDWIRE_SOURCE_MEMORY": str(2**20),
        "EMBEDWIRE_ALLOW_PRIVATE_MEDIA": "True",
        "EMBEDWIRE_TRANSPORT": "tcp",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert load().settings == told.settings


def test_the_command_prints_values_and_origins(embedwire: Run, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    ended = embedwire("settings", "--block-size", 16, "--json", file, EMBEDWIRE_TRANSPORT="tcp")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(file.read_text())
    assert found["block_size"] == {"value": 16, "from": "--block-size"}
    assert found["transport"] == {"value": "tcp", "from": "EMBEDWIRE_TRANSPORT"}
    assert found["num_blocks"] == {"value": 128, "from": "default"}
    assert len(ended.stdout.splitlines()) == 1 + len(Settings.model_fields)


def test_the_command_ends_with_2_and_one_line(embedwire: Run) -> None:
    ended = embedwire("settings", EMBEDWIRE_BLOK_SIZE="1")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1
    assert "did you mean EMBEDWIRE_BLOCK_SIZE?" in ended.stderr


def test_urls_may_be_given_several_times() -> None:
    assert load({"encoder": ["http://a,http://b", "http://c"]}).settings.encoder == (
        "http://a",
        "http://b",
        "http://c",
    )
    assert load({"encoder": []}).origins["encoder"] == "default"
