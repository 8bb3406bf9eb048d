"""Adapters for serving stacks, one module a stack. Each imports torch and its stack, so import it by name."""
