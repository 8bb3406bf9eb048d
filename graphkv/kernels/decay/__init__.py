"""One-shot propagation: the sources' signal to their look-alikes: `naive` the formula, `chunked` torch in bounded memory."""
