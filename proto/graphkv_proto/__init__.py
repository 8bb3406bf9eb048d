"""graphkv_proto."""
