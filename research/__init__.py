"""research: DeepSeek-V2 and its parts, trained for real.  `python -m research --help`.

One alphabet of shape letters serves the whole package:

    B sequences          T positions          S key positions      M tokens (B * T)
    D width (hidden)     H heads              C key/value latent   Q query latent
    R rotary width       N non-rotary width   V value width
    E routed experts     K chosen experts     F expert hidden      G devices (expert groups)
    L layers

Locals may carry them as a suffix (`expert_ids_MK`); parameters never do, so that checkpoint keys
stay free of notation.  In prose the paper's own symbols are kept: D devices and the limit M of
device-limited routing are `expert_devices` and `device_limit`.

`config`, `presets`, `accounting`, `routing_trace`, `configfile` and `errors` import no torch: the
simulator and the reports use them without it.
"""
