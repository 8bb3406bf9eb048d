"""The contract of graphkv.v1, and the only place that knows its messages from the inside.

`messages` (plain values to messages and back), `tensors` (arrays to bytes and back), `status` (errors to status codes and
back), `service` (the RPC table), `encodings`; the generated classes are `graphkv_proto.v1`. Knows `graphkv.terms`, numpy,
protobuf and grpc; never torch, the algorithm, the client or the server.
"""
