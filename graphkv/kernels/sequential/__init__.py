"""Sequential propagation: every token becomes a source the moment it is kept: `naive` the formula, `chunked` torch in bounded memory."""
