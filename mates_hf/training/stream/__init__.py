"""A run on a stream: its buffers, who makes them, and the order that is read from them.

A closed room. Read `sampler` first: it asks `maker` for the next buffer, which `rules` choose from and `files` keep.
"""
