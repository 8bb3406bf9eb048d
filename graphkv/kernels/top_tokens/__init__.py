"""The best tokens of each row, ties to the lower index: `naive` the formula, `chunked` torch in bounded memory."""
