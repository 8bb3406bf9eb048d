"""The rooms of `./dev bench quality`: texts -> tasks -> prefill -> methods -> judging -> intervals -> report."""
