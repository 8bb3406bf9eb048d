"""The application's arguments: what they become for Serve, and what is refused. Ray is imported, no cluster is started."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from graphkv_server.ray import app
from graphkv_server.ray.application import Arguments
from pydantic import ValidationError
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

DEPLOY = Path(__file__).parents[2] / "deploy/ray"


def built(**fields: Any) -> Any:
    application = app(Arguments(**fields))
    assert isinstance(application, Application)
    return application._bound_deployment


def test_a_fixed_number() -> None:
    deployment = built(replicas=3, gpus=0.5, cpus=2, settings={"grace": 5})
    assert deployment.num_replicas == 3
    assert deployment.ray_actor_options == {"num_cpus": 2, "num_gpus": 0.5}
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 20
    assert deployment._deployment_config.max_surge_percent == 100
    assert deployment._deployment_config.autoscaling_config is None


def test_a_number_that_follows_the_load() -> None:
    scaling = built(replicas=2, max_replicas=5, up_delay=3)._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (0, 0)
    assert scaling.policy.policy_function == "graphkv_server.ray.autoscaling:Policy"
    assert scaling.policy.policy_kwargs["up_delay"] == 3
    assert scaling.policy.get_policy()(**scaling.policy.policy_kwargs)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"replicas": 0}, "replicas"),
        ({"replicas": 3, "max_replicas": 2}, "at least replicas, 3"),
        ({"gpus": 1.5}, "a share below 1 or a whole number"),
        ({"replica": 1}, "Extra inputs"),
        ({"settings": {"grace": "long"}}, "grace is 'long'; it must be seconds"),
        ({"settings": {"graces": 1}}, "there is no such setting"),
        ({"settings": {"ray": "true"}}, "ray: not a setting of one replica"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Arguments(**fields)


def unknown_keys(given: Any, model: Any) -> set[str]:
    """Keys that the schema would take and forget."""
    return set(given) - set(model.model_fields)


@pytest.mark.parametrize("source", ["serve.yaml", "rayservice.yaml"])
def test_the_shipped_configs_are_what_serve_and_the_builder_take(source: str) -> None:
    config = next(yaml.safe_load_all((DEPLOY / source).read_text()))
    if source == "rayservice.yaml":
        assert (config["apiVersion"], config["kind"]) == ("ray.io/v1", "RayService")
        config = yaml.safe_load(config["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    assert not unknown_keys(config, ServeDeploySchema)
    (application,) = schema.applications
    assert not unknown_keys(config["applications"][0], type(application))
    assert application.import_path == "graphkv_server.ray:app"
    assert isinstance(app(Arguments(**application.args)), Application)
