"""The words all floors share: policy, catalogue, shapes, selection, rope and errors. Standard library only."""
