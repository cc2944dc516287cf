"""One module a command of `sailguard`. What is heavy is imported inside the functions."""
