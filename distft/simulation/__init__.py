"""Memory counted on fake tensors: the real model class, without weights or a GPU. Needs torch."""
