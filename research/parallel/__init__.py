"""One run on several workers: attention and shared experts by data, routed experts by device (V2 sections 2.2 and 3.1.3).

`world` says who is who and moves tensors, `exchange` sends tokens to the workers of their experts and back, `sharding`
reduces gradients and shares the optimizer's state out (ZeRO-1), `traffic` counts the bytes.
"""
