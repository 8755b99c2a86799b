"""The launchers' paths for CUDA tensors, in Triton. Arguments were checked by the launcher; kernels assume."""
