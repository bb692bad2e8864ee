"""Memory counted on fake tensors: the real model class, no weights, no GPU. Needs torch."""
