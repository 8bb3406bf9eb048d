"""The service: one replica is one process with one device that answers `graphkv.v1.Compression`.

`graphkv-serve` (cli) builds a `replica.Replica` from a `config.ServerConfig`; a call's life runs through servicer,
admission, assembler and engine, in that order. Importing this package loads nothing: torch and gRPC come with the rooms.
"""
