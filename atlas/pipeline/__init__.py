"""Which steps make a release, in which order, and which of them are already done."""
