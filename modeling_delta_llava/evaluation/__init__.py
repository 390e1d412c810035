"""Evaluation of a model's efficiency: counts from its config, measurements on the present device, and their figure."""
