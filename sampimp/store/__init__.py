"""The store of a study: records, commits, digests, plan and the cube over them."""
