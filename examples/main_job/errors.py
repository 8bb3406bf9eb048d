"""What the demo says to its user, in one sentence, when it cannot go on."""


class DemoError(Exception):
    """A mistake of the user's, or something missing on this machine; the message says what to do."""


EXTRA = "torch, transformers, gguf and accelerate are needed: run the demo by ./dev demo, or pip install 'graphkv[demo]'"
