"""The messages of graphkv.v1 under one name, `from graphkv_proto import v1 as pb`; `./dev gen` makes them from *.proto."""

from graphkv_proto.v1.compression_pb2 import *  # noqa: F403
from graphkv_proto.v1.policy_pb2 import *  # noqa: F403
from graphkv_proto.v1.select_pb2 import *  # noqa: F403
