"""The Serve application `graphkv_server.ray:app`: replicas, where they stand, when they are replaced, how many there are.

`serve deploy` and a RayService's serveConfigV2 name `graphkv_server.ray:app` and give `Arguments`; `graphkv-serve --ray`
builds the same. `serve build` takes no function and no arguments: it reads `graphkv_server.ray:default_app`.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray import serve
from ray.serve import Application

from graphkv_server import config
from graphkv_server.ray.deployment import ServedReplica

__all__ = ["APPLICATION", "DEPLOYMENT", "Arguments", "app", "default_app"]

APPLICATION = "graphkv"
"""The application's name where `graphkv-serve --ray` runs it; a Serve config gives it another as it likes."""
DEPLOYMENT = "Replica"

_AFTER_GRACE = 15.0
"""Seconds beyond the grace that Serve leaves a replica: its last statuses, its thread, its buffers."""

_OURS = {"ray", "replicas", "max_replicas", "replica_gpus", "replica_cpus", "ray_address"}


class Arguments(BaseModel):
    """What the application can be given (`args` in a Serve config). Values are checked when it is built."""

    model_config = ConfigDict(extra="forbid")

    replicas: Annotated[int, Field(ge=1, description="Replicas; with a larger max_replicas the fewest there are.")] = 1
    max_replicas: Annotated[int | None, Field(ge=1, description="The most replicas; left out: no autoscaling.")] = None
    gpus: Annotated[float, Field(ge=0, description="GPUs reserved for a replica: a share below 1, or a whole number.")] = 0.0
    cpus: Annotated[float, Field(ge=0, description="CPUs reserved for a replica.")] = 1.0
    surge_percent: Annotated[
        int, Field(ge=0, le=100, description="New replicas a rolling update starts before old ones end.")
    ] = 100
    start_tries: Annotated[int, Field(ge=1, description="Replicas that may fail to start before an update is given up.")] = 20
    target_bytes_ratio: Annotated[
        float, Field(gt=0, le=1, description="Share of its bytes in flight a replica should hold.")
    ] = 0.5
    target_rows: Annotated[float, Field(gt=0, description="Rows in flight a replica should have.")] = 2048.0
    up_delay: Annotated[float, Field(ge=0, description="Seconds above the target until replicas are added.")] = 10.0
    down_delay: Annotated[float, Field(ge=0, description="Seconds below the target until replicas are taken away.")] = 300.0
    settings: Annotated[
        dict[str, str | int | float],
        Field(description="Settings of each replica, as graphkv-serve's flags: address, metrics_address, grace, ..."),
    ] = {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0"}  # pydantic copies it

    @field_validator("settings")
    @classmethod
    def _known(cls, settings: dict[str, str | int | float]) -> dict[str, str | int | float]:
        if mine := sorted(_OURS & settings.keys()):
            raise ValueError(f"{', '.join(mine)}: not a setting of one replica")
        config.from_values(settings)  # a ConfigError is a ValueError, with the setting's name
        return settings

    @model_validator(mode="after")
    def _ordered(self) -> "Arguments":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}; it must be at least replicas, {self.replicas}")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus is {self.gpus}; it must be a share below 1 or a whole number")
        return self


def app(args: Arguments) -> Application:
    """The application that Serve runs."""
    grace = config.from_values(args.settings).grace
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": args.cpus, "num_gpus": args.gpus},
        "max_surge_percent": args.surge_percent,
        "max_constructor_retry_count": args.start_tries,
        "graceful_shutdown_timeout_s": grace + _AFTER_GRACE,
        "graceful_shutdown_wait_loop_s": 0.1,  # Serve waits so long for calls of its own, of which there are none
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,  # a replica that was frozen for some seconds is not replaced
    }
    if args.max_replicas is None or args.max_replicas == args.replicas:
        options["num_replicas"] = args.replicas
    else:
        options["autoscaling_config"] = _autoscaling(args, args.max_replicas)
    deployment = serve.deployment(name=DEPLOYMENT, **options)(ServedReplica)
    return deployment.bind(dict(args.settings), args.cpus)


def _autoscaling(args: Arguments, most: int) -> dict[str, Any]:
    rule = {
        "least": args.replicas,
        "most": most,
        "target_bytes_ratio": args.target_bytes_ratio,
        "target_rows": args.target_rows,
        "up_delay": args.up_delay,
        "down_delay": args.down_delay,
    }
    return {
        "min_replicas": args.replicas,
        "initial_replicas": args.replicas,
        "max_replicas": most,
        "look_back_period_s": 3.0,  # the policy has windows of its own
        "metrics_interval_s": 1.0,
        "upscale_delay_s": 0.0,  # Serve delays what a policy decides, too, by half a minute and ten minutes
        "downscale_delay_s": 0.0,
        "policy": {"policy_function": "graphkv_server.ray.autoscaling:Policy", "policy_kwargs": rule},
    }


default_app = app(Arguments())
"""The application with nothing given: one replica, on ports of its own, reached from this machine."""
