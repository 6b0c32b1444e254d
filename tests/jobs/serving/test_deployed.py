"""The application that a configuration file names, on a real Ray Serve."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from actors.serving import ServedApplication
from jobs.serving.deployed import app
from tests.support.dashboard import free_port
from tests.support.ray_cluster import local_ray
from tests.support.served import expected_text, make_run, write_checkpoint


@pytest.mark.ray
def test_it_answers_who_bears_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REKNIT_SERVE_TOKEN", "not-a-secret")
    folder = tmp_path / "run"
    layers = write_checkpoint(folder, make_run(folder), 10, 10)
    port = free_port()
    asked = {"prompt": "abc", "max_tokens": 5, "temperature": 0}
    with local_ray(1), ServedApplication(app({"run": str(folder)}), "127.0.0.1", port):
        url = f"http://127.0.0.1:{port}/v1/completions"
        assert httpx.post(url, json=asked, timeout=60).status_code == 401
        answer = httpx.post(url, json=asked, timeout=60, headers={"authorization": "Bearer not-a-secret"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected_text(layers, "abc", 5)


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="replicas"):
        app({"run": str(tmp_path), "replicas": 2})
    with pytest.raises(ValueError, match="holds no run"):
        app({"run": str(tmp_path)})
    make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="no whole checkpoint yet"):
        app({"run": str(tmp_path / "run")})
