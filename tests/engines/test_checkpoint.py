"""Only what is wanted is read, and nothing is left without memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from embedwire.engines.transformers import checkpoint
from embedwire.errors import ConfigurationError

pytestmark = pytest.mark.model


class Rotary(nn.Module):
    """As rotary embeddings are: computed by the constructor, in no checkpoint."""

    def __init__(self, config: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("frequencies", torch.arange(config, dtype=torch.float32), persistent=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.rotary = Rotary(4)


def weights() -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.ones(3, 2), "layer.bias": torch.zeros(3)}


def test_only_wanted_tensors_are_read_from_their_shards(tmp_path: Path) -> None:
    save_file({"a.x": torch.ones(2), "b.x": torch.ones(3)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a.x": "one.safetensors", "b.x": "one.safetensors", "b.y": "missing.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    asked: list[str] = []

    def wanted(name: str) -> str | None:
        asked.append(name)
        return name.replace("a.", "renamed.") if name.startswith("a.") else None

    tensors = checkpoint.read_tensors(tmp_path, wanted, dtype=torch.float32)
    assert sorted(asked) == ["a.x", "b.x", "b.y"]
    assert list(tensors) == ["renamed.x"]


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    tensors = checkpoint.read_tensors(tmp_path, lambda name: name, dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {"x": torch.bfloat16, "n": torch.int64}


def test_an_index_that_was_left_behind_counts_for_nothing(tmp_path: Path) -> None:
    """Saved anew into one file, a checkpoint may keep the index of its former shards, and these: as for transformers, the file counts."""
    save_file({"x": torch.zeros(2)}, tmp_path / "old.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "old.safetensors"}}')
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    tensors = checkpoint.read_tensors(tmp_path, lambda name: name, dtype=torch.float32)
    assert tensors["x"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", "model.safetensors"),
        ("model.safetensors.index.json", "version https://git-lfs.github.com/spec/v1", "index.json"),
        ("model.safetensors.index.json", "{}", "index.json"),
        ("model.safetensors.index.json", '{"weight_map": {"x": "gone.safetensors"}}', "gone.safetensors"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str, content: str, named: str) -> None:
    """A pointer to a file that was not fetched, half a file, a shard that is not there."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError, match=named):
        checkpoint.read_tensors(tmp_path, lambda name: name, dtype=torch.float32)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2), "y": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match="more than one tensor is 'z'"):
        checkpoint.read_tensors(tmp_path, lambda _: "z", dtype=torch.float32)


def test_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no safetensors"):
        checkpoint.read_tensors(tmp_path, lambda name: name, dtype=torch.float32)


def test_buffers_that_no_checkpoint_holds_are_computed_again() -> None:
    module = checkpoint.fill(checkpoint.build_on_meta(Model), weights())
    assert torch.equal(module.get_buffer("rotary.frequencies"), torch.arange(4.0))
    assert torch.equal(module.get_parameter("layer.weight"), torch.ones(3, 2))
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_tensors_are_assigned_not_copied() -> None:
    tensors = weights()
    module = checkpoint.fill(checkpoint.build_on_meta(Model), tensors)
    assert module.get_parameter("layer.weight").data_ptr() == tensors["layer.weight"].data_ptr()


def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named() -> None:
    for change, name in (({"layer.bias": None}, "layer.bias"), ({"extra": torch.ones(1)}, "extra")):
        tensors = {key: value for key, value in (weights() | change).items() if value is not None}
        with pytest.raises(ConfigurationError, match=name):
            checkpoint.fill(checkpoint.build_on_meta(Model), tensors)
    with pytest.raises(ConfigurationError, match=r"layer\.bias"):
        checkpoint.fill(checkpoint.build_on_meta(Model), weights() | {"layer.bias": torch.zeros(4)})


def test_what_would_stay_without_memory_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(2), persistent=False)

    with pytest.raises(ConfigurationError, match=r"\['table'\] of Bare"):
        checkpoint.fill(checkpoint.build_on_meta(Bare), {})
    with pytest.raises(ConfigurationError, match="lacks lost"):
        checkpoint.refuse_meta([("there", torch.ones(1)), ("lost", torch.ones(1, device="meta"))])


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.resolve_model(str(tmp_path)) == tmp_path
    asked: list[str] = []

    def download(model: str, *, allow_patterns: list[str]) -> str:
        asked.append(model)
        assert "*.safetensors" in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert checkpoint.resolve_model("someone/model") == tmp_path
    assert asked == ["someone/model"]


@pytest.mark.parametrize("model", ["/no/such/directory", "a/b/c", ""])
def test_a_model_that_is_nowhere(model: str) -> None:
    with pytest.raises(ConfigurationError, match="neither a directory nor"):
        checkpoint.resolve_model(model)


def test_dtype_of() -> None:
    assert checkpoint.dtype_of("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigurationError, match="'int8' is not one of bfloat16, float16, float32"):
        checkpoint.dtype_of("int8")


def test_a_directory_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no usable model configuration"):
        checkpoint.load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(ConfigurationError, match="never-heard-of"):
        checkpoint.load_config(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_both_configurations_say_whether_the_head_is_tied(
    tied: bool, tmp_path: Path, tiny_model_dir: Callable[[str], Path]
) -> None:
    config = json.loads((tiny_model_dir("qwen3_vl") / "config.json").read_text())
    config["tie_word_embeddings"] = tied
    config["text_config"].pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = checkpoint.load_config(tmp_path)
    assert (loaded.tie_word_embeddings, loaded.text_config.tie_word_embeddings) == (tied, tied)
