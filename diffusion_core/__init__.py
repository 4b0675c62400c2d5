"""Diffusion in pure PyTorch: tensors in, tensors out. Import the modules by name; nothing is loaded here."""
