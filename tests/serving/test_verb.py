"""The verb `thinkimg chat`: its refusals before anything starts."""

import pytest

from thinkimg.cli.main import app
from thinkimg.errors import UserError


def chat(*arguments) -> None:
    app(["chat", "--preset", "tiny", "--policy", "nothing", *arguments])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_without_a_key_only_this_machine_is_served(host, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Without a key.*--api-key-env"):
        chat("--host", host)
    for value in (None, "", "  "):
        monkeypatch.setenv("CHAT_KEY", value or "") if value is not None else monkeypatch.delenv("CHAT_KEY", False)
        with pytest.raises(UserError, match="CHAT_KEY is not set"):
            chat("--host", host, "--api-key-env", "CHAT_KEY")


def test_its_flags_are_checked_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        chat("--media", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nothing"):
        chat("--port", "18765")
