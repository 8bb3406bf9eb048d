"""Sequential propagation: every token a source once it is kept. `naive` the formula, `chunked` torch in bounded memory."""
