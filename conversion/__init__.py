"""Training checkpoint to Hub folder and back, imported as `modeling_delta_llava.conversion`.

A source folder is opened once, as mapped tensors (`source`), renamed by one table (`tables`), joined with its tower,
projector, LoRA and vocabulary rows and checked against the model on the meta device (`assemble`, over `configs`), and
written (`write`) into a folder that appears when it is complete, with a record (`configs`) for the way back. The three
commands are `convert`, `export` and `verify`.
"""
