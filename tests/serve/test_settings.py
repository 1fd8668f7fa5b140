"""What the application is told is checked before anything starts."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

import serve
from pipelines.errors import UserError
from serve.run import settings_for
from serve.settings import Settings, Traffic

pytestmark = pytest.mark.slow  # it imports Ray and torch


def test_beyond_loopback_a_key_is_asked_for() -> None:
    for host, wanted in (("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("me", True)):
        assert settings_for(["b"], host).require_key is wanted
    assert settings_for(["b"], "127.0.0.1", keys_file="hashes").require_key
    assert not settings_for(["b"], "0.0.0.0", keyless=True).require_key


def test_by_default_a_key_is_asked_for() -> None:
    assert Settings(bundles=("b",)).require_key


def test_wrong_settings_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^serve: bundles.*"):
        settings_for([], "127.0.0.1")


def test_shares_are_a_whole() -> None:
    Traffic(shares={"m": {"1": 0.9, "2": 0.1}})
    with pytest.raises(ValidationError, match=r"add up to 0\.9"):
        Traffic(shares={"m": {"1": 0.8, "2": 0.1}})


def test_the_shipped_configuration_is_one_of_ray_serve_and_of_ours() -> None:
    content = yaml.safe_load(Path(serve.__file__).with_name("config.yaml").read_text(encoding="utf-8"))
    deployed = ServeDeploySchema.model_validate(content)
    application = deployed.applications[0]
    assert Settings.model_validate(application.args).require_key
    assert deployed.http_options.host == "0.0.0.0"
    Traffic.model_validate(application.deployments[0].user_config)
