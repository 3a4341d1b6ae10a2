"""Which sample each row of an output gradient belongs to, and its proof."""
