"""Merging checkpoints: named tensors in, named tensors out, without any model code.

The data's way: stores (`store/`) give named tensors; `config` reads mergekit's YAML; `plan` turns
both into one `Job` for every output tensor; `methods` say how a tensor is merged; `engine` streams
the jobs through a bounded amount of memory into the output; `report` describes what happened.
"""
