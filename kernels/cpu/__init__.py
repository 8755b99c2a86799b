"""The launchers' paths for CPU tensors: vectorised torch, no Python loop over tokens, pages or heads."""
