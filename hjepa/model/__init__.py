"""Encoder, predictor, pyramid of levels, and the model that joins them."""
