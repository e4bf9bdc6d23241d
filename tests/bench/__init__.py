"""Benches: programs that measure. `bench_model.py` is cut into the modules beside it; the other programs stand alone.

A package, so that no other module called `bench` on somebody's path comes before it.
"""
