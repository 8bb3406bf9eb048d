"""graphkv_server."""
