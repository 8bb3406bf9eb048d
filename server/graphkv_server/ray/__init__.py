"""Many replicas under Ray Serve: the only room that knows Ray. `graphkv_server.ray:app` is what Serve's tools import.

`cluster` is `graphkv-serve --ray`; `deployment` is one replica as Serve runs it; `directory` lets replicas know each other
without Serve; `front` is the address callers are given; `autoscaling` decides how many there are.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphkv_server.ray.application import app, default_app

__all__ = ["app", "default_app"]


def __getattr__(name: str) -> Any:
    # Ray takes a second to load: the rooms that do without it should not wait for it.
    if name in __all__:
        from graphkv_server.ray import application

        return getattr(application, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
