"""Operations on tensors: a launcher for each here, Triton in `gpu`, vectorised torch in `cpu`, plain truth in `oracle`.

Imports torch and triton only. A launcher checks its arguments, raises ValueError, and picks the path by device.
"""
