"""Influence: what each training sample did to the final model (Gao & Jojic 2017, section 4)."""
