"""What the tests judge the packages by: a float64 reference, the rule for comparing with it, and cases."""
