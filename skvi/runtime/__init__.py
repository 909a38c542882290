"""Devices, random generators, row blocks, small linear algebra: nothing else touches them."""
