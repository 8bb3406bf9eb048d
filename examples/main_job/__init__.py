"""The steps of the demo (`examples/demo.py`), one file each."""
