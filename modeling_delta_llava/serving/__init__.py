"""A model behind an OpenAI-style address.

Import the modules by their full name; none of them is imported here, since each needs packages of its own.
"""
