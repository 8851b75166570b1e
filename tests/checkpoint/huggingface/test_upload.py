"""Directories go to the hub as they lie on disk, and what is in the way is one line."""

from __future__ import annotations

import huggingface_hub
import pytest

from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.huggingface.upload import upload


class Hub:
    """What was asked of the hub."""

    def __init__(self):
        self.asked = []
        self.error: Exception | None = None

    def create_repo(self, name, **options):
        self.asked.append(("create", name, options))

    def upload_folder(self, **options):
        if self.error is not None:
            raise self.error
        self.asked.append(("upload", options))


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return found


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("adapter.json", "an adapter"),
        ("adapter_config.json", "an adapter for PEFT"),
        ("config.json", "a merged model"),
    ],
)
def test_a_directory_goes_into_a_private_repository_that_is_made_for_it(tmp_path, hub, file, what):
    (tmp_path / file).write_text("{}")
    assert upload(tmp_path, "me/mine") == "https://huggingface.co/me/mine"
    (_, name, options), (_, sent) = hub.asked
    assert (name, options) == ("me/mine", {"private": True, "exist_ok": True})
    assert (sent["repo_id"], sent["folder_path"]) == ("me/mine", tmp_path)
    assert sent["commit_message"] == f"Upload {what} made with smoa_jax"
    upload(tmp_path, "me/mine", private=False, message="Second try")
    assert hub.asked[2][2]["private"] is False
    assert hub.asked[3][1]["commit_message"] == "Second try"


def test_nothing_is_asked_of_the_hub_for_another_directory_or_name(tmp_path, hub):
    with pytest.raises(CheckpointError, match=r"no adapter and no export; expected one with adap"):
        upload(tmp_path, "me/mine")
    (tmp_path / "adapter.json").write_text("{}")
    with pytest.raises(CheckpointError, match="got the name 'mine'; expected organisation/name"):
        upload(tmp_path, "mine")
    assert hub.asked == []


def test_a_missing_token_names_the_command_that_gets_one(adapter, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(CheckpointError, match=r"no token of the hub.*`hf auth login`"):
        upload(adapter, "me/mine")
    assert hub.asked == []


@pytest.mark.parametrize("error", [ConnectionError("refused\nby proxy"), OSError()])
def test_a_lost_connection_is_one_line_and_may_be_tried_again(adapter, hub, error):
    hub.error = error
    with pytest.raises(CheckpointError, match=r"got no connection to the hub \(\w+\).*again") as e:
        upload(adapter, "me/mine")
    assert "\n" not in str(e.value)
