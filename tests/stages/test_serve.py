"""What stage=serve refuses before it opens a page. tests/app has the page."""

import pytest
from helpers.settings import composed

from tartvg.config import ServeConfig, SettingError
from tartvg.stages import serve


def test_without_gradio_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"^stage=serve needs Gradio, the extra `app`: pip install .*'\.\[app\]'$"):
        serve.run_serve(composed("stage=serve"))


def test_policies_are_found_and_refused_under_their_setting(tmp_path):
    runs = f"runs_dir={tmp_path}"
    assert serve.choose_policies(composed(runs)) == {"base": None}
    with pytest.raises(SettingError, match=r"^grpo2: .*adapter"):
        serve.choose_policies(composed(runs, "serve.policies=[base,grpo2]"))
    with pytest.raises(SettingError, match=r"^serve\.policies=nowhere"):
        serve.choose_policies(composed(runs, "serve.policies=[nowhere]"))
    for refused in ("[base,base]", "[base,sft,grpo2]"):
        with pytest.raises(SettingError, match=r"^serve\.policies must be"):
            composed(f"serve.policies={refused}")


def test_only_loopback_addresses_are_private():
    private = {host: ServeConfig(host=host).is_loopback for host in ("127.0.0.1", "127.0.0.9", "::1", "localhost")}
    assert all(private.values())
    assert not any(ServeConfig(host=host).is_loopback for host in ("0.0.0.0", "::", "192.168.0.3", "example.org"))
