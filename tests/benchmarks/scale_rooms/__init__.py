"""The rooms of `./dev bench scale`: measured -> crowd (balance, Locate) and scaling (the autoscaler), on a simulated clock."""
