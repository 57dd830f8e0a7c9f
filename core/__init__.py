"""Imprint's methods in PyTorch and transformers. No Ray, no server.

Axes, as suffixes of tensor names:

    B  rows of a batch: documents, adapters or conversations; `index_B` says which adapter a conversation row uses
    T  tokens
    L  decoder layers
    M  memory tokens of the hypernetwork
    H  hidden size of the base
    I  input features of a linear
    O  output features of a linear
    R  LoRA rank
    N  numbers of one adapter, flat
    V  vocabulary
    K  tensors of an adapter (entries of its table)

`flat_BN` is B adapters of N numbers each; `a_BIR` the A factors of B adapters at one linear.
"""
