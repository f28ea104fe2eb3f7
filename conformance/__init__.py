"""The conformance kit: the laws of attention and its neighbours, for any implementation.

`isoformer conform pkg.module:adapter` runs them; `docs/conformance.md` says how to write an adapter.
"""
