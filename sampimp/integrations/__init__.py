"""Callbacks for PyTorch Lightning and Hugging Face Trainer."""
