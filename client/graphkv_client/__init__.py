"""graphkv_client."""
