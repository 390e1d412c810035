"""A model for programs and people that ask over a network: `delta-llava serve` and `delta-llava app`.

Import the modules by their full name; none of them is imported here, since each needs packages of its own.
"""
