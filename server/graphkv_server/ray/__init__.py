"""Many replicas under Ray Serve: the only room that knows Ray. Serve's tools import `graphkv_server.ray:app`
(the builder), `:default_app` and `:add_compression` (for its gRPC proxy).

`cluster` is `graphkv-serve --ray`; `deployment` is one replica as Serve runs it; `directory` lets replicas know each other
without Serve; `front` is the address callers are given; `autoscaling` decides how many there are.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphkv_server.ray.application import app, default_app
    from graphkv_server.ray.proxied import add_compression

__all__ = ["add_compression", "app", "default_app"]


def __getattr__(name: str) -> Any:
    # Ray takes a second to load: the rooms that do without it should not wait for it.
    if name in ("app", "default_app"):
        from graphkv_server.ray import application

        return getattr(application, name)
    if name == "add_compression":
        from graphkv_server.ray.proxied import add_compression

        return add_compression
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
