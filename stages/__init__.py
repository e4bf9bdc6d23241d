"""What happens on one device: a slice of the model's layers, its rolling KV buffers, and the contract with the router.

This package imports nothing by itself: `config`, `split`, `kv_layout` and `microbatch` are free of torch, so that
routers and gateways can share them; everything else belongs to the stage worker's process.
"""
