"""Training checkpoint to Hub folder and back, imported as `modeling_delta_llava.conversion`.

A source folder is read as headers only (`checkpoints`, over `safetensors_files` and `torch_files`), recognised
(`forms`), renamed (`keys`, `entries`), planned and checked against the model on the meta device (`plan`, over
`configs`), and streamed (`streams`, `writer`) into a folder that appears when it is complete (`workspace`). The three
commands are `convert`, `export` and `verify`; `reference` computes a checkpoint without the tables, to check them.
"""
