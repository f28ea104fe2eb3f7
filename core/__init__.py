"""The arithmetic of the Transformer, written once, as pure JAX functions free of any framework.

Axes, in annotations, einsum strings and error messages: `B` batch, `T` query length, `S` key/value
length, `D` model width, `N` heads, `K` key/value heads, `H` head width, `F` feed-forward width,
`V` vocabulary; `*B` is any number of leading axes, none included.
"""
