"""`hjepa eval`: what a finished run's encoder is worth, by the probes of the literature, beside what costs nothing."""
