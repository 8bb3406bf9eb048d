"""Attention received from the observation window: `naive` the formula, `chunked` torch in bounded memory."""
