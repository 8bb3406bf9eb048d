"""The register: where replicas put down their addresses for each other, in the store of Ray's head (GCS).

Only the way to meet: who is alive is what `directory` finds out. Calls into the store block as long as the head is away.
"""

from ray.experimental import internal_kv

from graphkv_server.ray.blocking import BlockingCalls

__all__ = ["Register"]

_NAMESPACE = b"graphkv"


class Register:
    """The addresses of one application's replicas."""

    def __init__(self, application: str) -> None:
        self._prefix = f"replica/{application}/"
        self._calls = BlockingCalls("graphkv-register")

    async def read(self) -> list[str]:
        """Every address that was put down and not taken away."""
        keys: list[bytes] = await self._calls.call(
            lambda: internal_kv._internal_kv_list(self._prefix, namespace=_NAMESPACE),
        )
        return [key.decode().removeprefix(self._prefix) for key in keys]

    async def put(self, address: str) -> None:
        """Puts an address down."""
        await self._calls.call(lambda: internal_kv._internal_kv_put(self._prefix + address, b"", namespace=_NAMESPACE))

    async def take_away(self, address: str) -> None:
        """Takes an address away."""
        await self._calls.call(lambda: internal_kv._internal_kv_del(self._prefix + address, namespace=_NAMESPACE))

    def close(self) -> None:
        """Asks for nothing more."""
        self._calls.close()
