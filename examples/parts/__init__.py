"""What several of the programs share, by subject. Nothing here is part of byol_pytorch."""
