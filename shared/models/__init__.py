"""Model checkpoints: what (`config`), where (`resolve`), which (`fingerprint`), and how they run (`decoder`).

`config`, `resolve` and `fingerprint` import no torch: the gateway uses the first two.
"""
