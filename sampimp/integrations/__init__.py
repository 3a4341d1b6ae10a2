"""Callbacks that record importance in trainers.

=================== ====================================================================
`lightning`         `LightningImportance`, for PyTorch Lightning
`huggingface`       `HuggingFaceImportance`, for the `Trainer` of transformers
`recorded_steps`    their common part: one recorded step at a time
=================== ====================================================================
"""
