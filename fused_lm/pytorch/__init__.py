"""PyTorch's own operators: what ``auto`` runs wherever no record speaks for a kernel of ours."""
