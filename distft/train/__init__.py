"""What runs on the ranks. The modules below import torch; this one must not."""
